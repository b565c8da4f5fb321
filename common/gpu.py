"""Properties of NVIDIA GPUs: a driver that torch can use, allocator settings, bfloat16 and peak FLOPS."""

import os
import re
import warnings
from functools import cache
from unittest import mock

import torch

from common import UserError, one_line, warn

# Dense bf16 peaks from NVIDIA's data sheets, of cards that torchtitan 0.2.2 does not know (it looks for "l40s").
OTHER_PEAKS = {"A10": 125e12, "L40S": 362e12}
A100_PEAK = 312e12  # also torchtitan's value for unknown cards


def count() -> int:
    """Return the number of GPUs; raises UserError if torch cannot use them.

    Falling back to CPUs would train a model meant for GPUs for months.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warning, of three lines
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
    """Let GPU memory grow in segments, against fragmentation, unless the user set it; call it before CUDA starts."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a GPU computes in bfloat16, as NVIDIA's from compute capability 8.0 on."""
    return bool(torch.version.hip) or torch.cuda.get_device_properties(device).major >= 8


@cache  # once per process
def warn_without_bfloat16(device: torch.device, instead: str) -> None:
    """Warn that a GPU has no bfloat16, and name the dtype used instead."""
    warn(f"{torch.cuda.get_device_name(device)} has no bfloat16: computing in {instead}")


@cache
def peak_flops(name: str) -> float | None:
    """Return the dense bf16 FLOPS of a GPU by name, from torchtitan; None for an unknown one."""
    for card, peak in OTHER_PEAKS.items():
        if re.search(rf"\b{card}\b", name):
            return peak
    from torchtitan.tools import utils  # here: takes seconds, and only GPUs need it

    # Without lspci, whose output torchtitan prefers to the name, and without torchtitan's warnings.
    with mock.patch.object(utils.subprocess, "run", side_effect=FileNotFoundError), mock.patch.object(utils, "logger"):
        peak = utils.get_peak_flops(name)
    return None if peak == A100_PEAK and "A100" not in name else peak
