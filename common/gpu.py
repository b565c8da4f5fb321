"""NVIDIA's GPUs, before they train: a driver that torch can use, the allocator's settings, bfloat16 and peak FLOPS."""

import os
import re
import warnings
from functools import cache
from unittest import mock

import torch

from common import UserError, one_line, warn

# Dense bf16 peaks of NVIDIA's data sheets, of cards that torchtitan 0.2.2 does not know; it asks for "l40s".
OTHER_PEAKS = {"A10": 125e12, "L40S": 362e12}
A100_PEAK = 312e12  # torchtitan's also for a card that it does not know


def count() -> int:
    """Return the number of GPUs; UserError where torch cannot use those that are there.

    On CPUs a model that is meant for GPUs would train for months.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own words about it, on three lines
        found = torch.cuda.device_count()
        if not found or torch.cuda.is_available():
            return found
        try:
            torch.cuda.init()
            reason = "CUDA finds no device"
        except (RuntimeError, AssertionError) as error:
            reason = one_line(error)
    raise UserError(
        f"torch {torch.__version__} needs a driver for CUDA {torch.version.cuda}; of the {found} GPUs here it can use "
        f"none ({reason}): update the driver, install a torch build for it, or hide them (CUDA_VISIBLE_DEVICES=)"
    )


def set_allocator() -> None:
    """Have the memory of GPUs grow in segments, which leaves no gaps between blocks of different sizes.

    Settings of the user's are kept. Takes effect only before CUDA has started.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU multiplies in bfloat16 itself, as NVIDIA's do from compute capability 8.0 on."""
    return bool(torch.version.hip) or torch.cuda.get_device_properties(device).major >= 8


@cache  # once per process
def warn_without_bfloat16(device: torch.device, instead: str) -> None:
    """Say in one line that a GPU has no bfloat16, and what it computes in."""
    warn(f"{torch.cuda.get_device_name(device)} has no bfloat16: computing in {instead}")


@cache
def peak_flops(name: str) -> float | None:
    """Return the dense bf16 FLOPS of a GPU by its name, as torchtitan knows them; None for one that it does not."""
    for card, peak in OTHER_PEAKS.items():
        if re.search(rf"\b{card}\b", name):
            return peak
    from torchtitan.tools import utils  # seconds, and for GPUs alone

    # Without lspci, whose words it prefers to the name, and without its warnings.
    with mock.patch.object(utils.subprocess, "run", side_effect=FileNotFoundError), mock.patch.object(utils, "logger"):
        peak = utils.get_peak_flops(name)
    return None if peak == A100_PEAK and "A100" not in name else peak
