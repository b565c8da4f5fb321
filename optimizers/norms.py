"""Scaling matrices to a root mean square entry, whole or in shards."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from . import wire
from .rule import Tensors

View = tuple[int, int, int]  # (batch, m, n) that a parameter is seen as
Part = tuple[slice, Tensor]  # which matrices of a batch, and their entries here (b, entries)


def rescale_whole(tensors: Tensors, views: list[View], rms: float) -> Tensors:
    """Scale each matrix, in place, to this root mean square entry; a zero matrix stays zero."""
    for tensor, (batch, m, n) in zip(tensors, views, strict=True):
        matrices = tensor.view(batch, m * n)
        norm = torch.linalg.vector_norm(matrices, dim=1, keepdim=True)  # (batch, 1)
        _scale(matrices, norm, rms * (m * n) ** 0.5)
    return tensors


def rescale_parts(
    tensors: Tensors, parts: list[list[Part]], views: list[View], groups: Sequence[dist.ProcessGroup], rms: float
) -> Tensors:
    """Do the same to shards, given as parts of their matrices; the ranks that the groups connect have the rest.

    One all-reduce a group, of a float64 a matrix. Sums of signs are whole numbers, so their norm is, bit for bit, that
    of the whole matrix.
    """
    counts = [batch for batch, _, _ in views]
    squares = tensors[0].new_zeros(sum(counts), dtype=torch.float64)
    for mine, sums in zip(parts, squares.split(counts), strict=True):
        for which, entries in mine:
            sums[which] += torch.linalg.vector_norm(entries, dim=1, dtype=torch.float64).square()
    for group in groups:
        wire.all_reduce(squares, group, "norms")
    for mine, sums, (_, m, n) in zip(parts, squares.split(counts), views, strict=True):
        for which, entries in mine:
            norm = sums[which].sqrt().to(entries.dtype).unsqueeze(1)  # (b, 1)
            _scale(entries, norm, rms * (m * n) ** 0.5)
    return tensors


def parts_of(shard: Tensor, view: View, dim: int, start: int) -> list[Part]:
    """Return what a shard holds of its tensor's matrices; it starts there along the cut dimension."""
    batch, m, _ = view
    if shard.ndim > 2 or dim != 0:
        return [(slice(0, batch), shard.view(batch, shard.numel() // batch))]
    # Rows of one or more blocks below each other: which block a row is of depends on where the shard starts.
    end = start + len(shard)
    return [
        (slice(j, j + 1), shard[max(start, j * m) - start : min(end, (j + 1) * m) - start].view(1, -1))
        for j in range(start // m, -(-end // m))
    ]


def _scale(entries: Tensor, norm: Tensor, wanted: float) -> None:
    entries.mul_(torch.where(norm == 0, norm, wanted / norm))
