"""Settings every test shares: few threads, fixed seeds, and no `gpu` test where there is no GPU."""

import os

# Before torch is imported; worker processes inherit it. On matrices this small more threads only cost time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import signal
from contextlib import ExitStack

import numpy
import pytest
import torch

from tests.warm import warm_python

# A shell's background job ignores Ctrl-C, and so would every program that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers use the same
        starting = ExitStack()
        os.environ["WARM_PYTHON"] = starting.enter_context(warm_python())
        config.add_cleanup(starting.close)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # not item.keywords, which also hold the names of folders
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeds():
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
