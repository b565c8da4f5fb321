"""beta C + alpha A B with a symmetric result: about half of it is computed, the rest mirrored.

Newton-Schulz forms X X' and products of commuting symmetric matrices only, so every m x m product is of this kind. On
a CPU block rows right of the diagonal are computed; on a GPU with Triton one kernel computes the tiles on and below
the diagonal and writes each twice. Other devices compute the whole product.
"""

from functools import cache

import torch
from torch import Tensor

_BLOCK = 128  # rows of a block on a CPU; on two CPUs 64 and 256 were slower, in bf16 by a tenth
# Rows from which the kernel is used. Not measured here: flash-muon reports 0.184 ms against 0.296 at 4096 on an H800,
# and little below 2048; scripts/gpu_check.sh measures it on your GPU.
KERNEL_FROM = 2048


def symmetric_product(
    left: Tensor, right: Tensor, add: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """Return beta add + alpha left @ right, known to be symmetric.

    left (batch, m, k), right (batch, k, m), add (batch, m, m) symmetric -> (batch, m, m).
    """
    m = left.shape[-2]
    if kernel := _kernel_for(m, left.dtype, left.device):
        return kernel(left, right, add, beta, alpha)
    blocks = _blocks(m, left.device)
    if blocks == 1:
        if add is None:
            return left @ right if alpha == 1 else alpha * (left @ right)
        return torch.baddbmm(add, left, right, beta=beta, alpha=alpha)
    rows = -(-m // blocks)
    out = left.new_empty(left.shape[0], m, m)
    for i in range(0, m, rows):
        j = min(i + rows, m)
        upper_left, upper_right = left[:, i:j], right[:, :, i:]
        if add is None:
            out[:, i:j, i:] = upper_left @ upper_right if alpha == 1 else alpha * (upper_left @ upper_right)
        else:
            out[:, i:j, i:] = torch.baddbmm(add[:, i:j, i:], upper_left, upper_right, beta=beta, alpha=alpha)
        out[:, i:j, :i] = out[:, :i, i:j].mT
    return out


def computed_share(m: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the share of an (m, m) product that is computed."""
    blocks = -(-m // 128) if _kernel_for(m, dtype, device) else _blocks(m, device)
    return (blocks + 1) / (2 * blocks)


def _blocks(m: int, device: torch.device) -> int:
    return max(1, round(m / _BLOCK)) if device.type == "cpu" else 1


def _kernel_for(m: int, dtype: torch.dtype, device: torch.device):
    """Return the Triton kernel's launcher if it is available and used for such a product, else None."""
    if device.type != "cuda" or m < KERNEL_FROM or dtype not in (torch.bfloat16, torch.float16):
        return None
    return _launcher(device)


@cache
def _launcher(device: torch.device):
    # FakeTensors of a dry run are on "cuda" in a build without it.
    if not torch.cuda.is_available() or torch.version.hip or torch.cuda.get_device_properties(device).major < 8:
        return None
    try:
        from .symmetric_kernel import launch
    except ImportError:
        return None  # no Triton: Windows, or a build without it
    return launch
