"""Adaptations of torchtitan 0.2.2 to machines without a GPU: CPUs, with gloo between processes."""

import importlib.util
import os
import platform
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import BlockMask, create_mask

from common.launch import peak_memory_mb


@contextmanager
def importing_torchtitan() -> Iterator[None]:
    """Make torchtitan importable without triton, and let it choose the CPU if there is no GPU that it can use."""
    if importlib.util.find_spec("triton") is None:  # part of torch's CUDA builds; others do not use it
        # The only module that imports triton, for mixtures of experts, which no Llama here has.
        kernels = types.ModuleType("torchtitan.models.moe.kernels")
        kernels.generate_permute_indices = None
        sys.modules.setdefault(kernels.__name__, kernels)
    if not on_cpu():
        yield
        return
    with (
        mock.patch("torch._utils._get_available_device_type", lambda: "cpu"),
        mock.patch("torch._utils._get_device_module", lambda device_type: CPU),
        # Importing flex attention would load the compiler in every process, which takes seconds.
        mock.patch("torch.compile", lambda function, **options: function),
    ):
        yield
        import torchtitan.tools.utils  # noqa: F401  (chooses the device on import)


def on_cpu() -> bool:
    """Return whether there is no GPU, or one without collectives (Apple's)."""
    return not torch.accelerator.is_available() or torch.accelerator.current_accelerator().type == "mps"


def adapt_model(model: nn.Module) -> None:
    """Replace FSDP2's scaled sum of gradients, which gloo lacks, and flex attention, which CPUs lack."""
    if on_cpu():
        from torchtitan.models.attention import FlexAttentionWrapper

        FlexAttentionWrapper._compiled_flex_attn = dense_attention
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask, scale: float | None, enable_gqa: bool, return_lse: bool
) -> Tensor:
    """Compute flex attention (b, heads, T, width) with a dense mask."""
    mask = create_mask(block_mask.mask_mod, len(q), None, q.shape[2], k.shape[2], device=q.device)  # (b, 1, T, T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)


class CPU:
    """The device module that torchtitan expects: torch.cpu lacks half of it, and its current device is "cpu"."""

    set_device = torch.cpu.set_device
    synchronize = torch.cpu.synchronize

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_device_name(device=None) -> str:
        return platform.processor() or platform.machine()

    @staticmethod
    def get_device_properties(device=None) -> types.SimpleNamespace:
        pages, page_bytes = map(os.sysconf, ("SC_PHYS_PAGES", "SC_PAGE_SIZE"))
        return types.SimpleNamespace(total_memory=pages * page_bytes)

    @staticmethod
    def memory_stats(device=None) -> dict[str, int]:
        """Return the process's peak memory since its start."""
        peak = int(peak_memory_mb(torch.device("cpu")) * 2**20)
        return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak, "num_alloc_retries": 0, "num_ooms": 0}

    @staticmethod
    def reset_peak_memory_stats(device=None) -> None:
        pass

    @staticmethod
    def empty_cache() -> None:
        pass
