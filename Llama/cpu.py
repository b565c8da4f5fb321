"""What torchtitan 0.2.2 needs in order to run without a GPU: on CPUs, with gloo between the processes."""

import importlib.util
import os
import platform
import sys
import types

import torch
import torch._utils
from torch import nn
from torch.distributed.fsdp import FSDPModule


def adapt_torchtitan() -> None:
    """Make torchtitan importable without triton, and choose the CPU where there is no GPU that it can use."""
    if importlib.util.find_spec("triton") is None:  # comes with torch's CUDA builds, and on other systems is not needed
        # The one module that imports triton, for mixtures of experts, which no Llama here has.
        kernels = types.ModuleType("torchtitan.models.moe.kernels")
        kernels.generate_permute_indices = None
        sys.modules.setdefault(kernels.__name__, kernels)
    if not on_cpu():
        return
    probe = torch._utils._get_available_device_type
    torch._utils._get_available_device_type = lambda: "cpu"
    try:
        import torchtitan.tools.utils  # noqa: F401  (keeps the answer)
    finally:
        torch._utils._get_available_device_type = probe
    for name, stand_in in STAND_INS.items():
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, stand_in)


def on_cpu() -> bool:
    """Whether there is no GPU with collectives here (Apple's has none)."""
    return not torch.accelerator.is_available() or torch.accelerator.current_accelerator().type == "mps"


def adapt_model(model: nn.Module) -> None:
    """Let FSDP2 sum gradients where it would ask gloo for a multiply-and-sum, which gloo lacks."""
    if on_cpu():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


# What torchtitan's memory monitor asks of torch.cuda, and torch.cpu does not have.
STAND_INS = {
    "get_device_name": lambda device=None: platform.processor() or platform.machine(),
    "get_device_properties": lambda device=None: types.SimpleNamespace(total_memory=_memory_bytes()),
    "memory_stats": lambda device=None: {},
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
}


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
