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


# Files of the fast tier: no ranks, no training programs, and no libraries that take seconds to import.
QUICK = """codec config curvature data engine evidence gpu guests intersection json_files line_search optimizer_options
options pieces polar probe read_ahead readme roles rules schedule signs slurm symmetric untrusted_files""".split()
# Files that take minutes, first: the last file of a run is then a short one, and no core waits for it.
LONG = "routes drill llama_train sit_train shell sit_shell llama_shell parallel to_owners quantized sweep train".split()


def subject(path) -> str:
    return path.stem.removeprefix("test_")


def pytest_ignore_collect(collection_path, config):
    """Leave out the files that the fast tier does not run: to import them takes longer than its tests."""
    if config.option.markexpr == "not slow" and collection_path.name.startswith("test_"):
        return subject(collection_path) not in QUICK or None
    return None


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(subject(item.path)) if subject(item.path) in LONG else len(LONG))
    for item in items:
        if subject(item.path) not in QUICK:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():  # not keywords, which hold folders' names
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeds():
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
