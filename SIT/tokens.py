"""Embeddings of images, positions and times, all DiT's: patches, sin-cos positions, cosines and sines of a timestep.

Shapes: B images, H = W side, N patches, P side of a patch, C width.
"""

import torch
from torch import Tensor

FREQUENCIES = 128  # of the timestep, with a cosine and a sine each (DiT)
LONGEST_PERIOD = 10_000  # divided by 2 pi; of timesteps and positions (Vaswani et al. 2017)


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Cut (B, channels, H, W) into patches (B, N, P P channels), row by row; within a patch channels vary fastest."""
    B, channels, H, W = x.shape
    rows, columns = H // patch_size, W // patch_size
    x = x.reshape(B, channels, rows, patch_size, columns, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, rows * columns, -1)


def unpatchify(patches: Tensor, patch_size: int, channels: int) -> Tensor:
    """Invert patchify for a square: (B, N, P P channels) -> (B, channels, H, W)."""
    B, N, _ = patches.shape
    grid = round(N**0.5)
    x = patches.reshape(B, grid, grid, patch_size, patch_size, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, channels, grid * patch_size, grid * patch_size)


def timestep_frequencies(dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Return the angular frequencies (FREQUENCIES,) of the timestep embedding, from 1 down to nearly 1 / 10,000."""
    return LONGEST_PERIOD ** (-torch.arange(FREQUENCIES, dtype=dtype, device=device) / FREQUENCIES)


def timestep_waves(t: Tensor) -> Tensor:
    """Return cosines, then sines, of times t (B,): (B, 2 FREQUENCIES), in fp32 or wider."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    angles = t[:, None] * timestep_frequencies(t.dtype, t.device)  # (B, FREQUENCIES)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_positions(width: int, grid: int) -> Tensor:
    """Return the position embeddings (grid grid, width) of row-major tokens in float64.

    The first half of the channels encodes the column, the second the row, as sines, then cosines of width / 4
    frequencies (MAE, He et al. 2021, which DiT follows).
    """
    frequencies = LONGEST_PERIOD ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies  # (grid, C / 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (grid, C / 2)
    columns, rows = waves.repeat(grid, 1), waves.repeat_interleave(grid, dim=0)  # (N, C / 2) each
    return torch.cat([columns, rows], dim=-1)
