"""Scaling matrices to a root mean square entry, whole or in shards."""

import torch
from torch import Tensor

from . import wire
from .layout import Layout, shard_length
from .rule import Tensors

View = tuple[int, int, int]  # (batch, m, n) that a parameter is seen as


def rescale_whole(tensors: Tensors, views: list[View], rms: float) -> Tensors:
    """Scale each matrix, in place, to this root mean square entry; a zero matrix stays zero."""
    for tensor, (batch, m, n) in zip(tensors, views, strict=True):
        matrices = tensor.view(batch, m * n)
        norm = torch.linalg.vector_norm(matrices, dim=1, keepdim=True)  # (batch, 1)
        _scale(matrices, norm, rms * (m * n) ** 0.5)
    return tensors


def rescale_shards(tensors: Tensors, views: list[View], lengths: list[int], layout: Layout, rms: float) -> Tensors:
    """Do the same to shards of matrices; lengths are those of the whole tensors' cut dimension.

    One all-reduce of a float64 a matrix along a replica's row. Sums of signs are whole numbers, so their norm is, bit
    for bit, that of the whole matrix.
    """
    counts = [batch for batch, _, _ in views]
    parts = [_parts(*each, layout) for each in zip(tensors, views, lengths, strict=True)]
    squares = [tensors[0].new_zeros(count, dtype=torch.float64) for count in counts]
    for mine, sums in zip(parts, squares, strict=True):
        for which, entries in mine:
            sums[which] += torch.linalg.vecdot(entries, entries)
    total = wire.all_reduce(torch.cat(squares), layout.row, "norms")
    for mine, sums, (_, m, n) in zip(parts, total.split(counts), views, strict=True):
        for which, entries in mine:
            norm = sums[which].sqrt().to(entries.dtype).unsqueeze(1)  # (b, 1)
            _scale(entries, norm, rms * (m * n) ** 0.5)
    return tensors


def _parts(tensor: Tensor, view: View, length: int, layout: Layout) -> list[tuple[slice, Tensor]]:
    """Return (which of the batch, their entries here (b, entries)) for this rank's shard of a tensor."""
    batch, m, _ = view
    if tensor.ndim > 2 or layout.dim != 0:
        return [(slice(0, batch), tensor.view(batch, tensor.numel() // batch))]
    # Rows of one or more blocks below each other: which block a row is of depends on where the shard starts.
    start = min(layout.here[1] * shard_length(length, layout.shards, 0), length)
    end = start + len(tensor)
    return [
        (slice(j, j + 1), tensor[max(start, j * m) - start : min(end, (j + 1) * m) - start].view(1, -1))
        for j in range(start // m, -(-end // m))
    ]


def _scale(entries: Tensor, norm: Tensor, wanted: float) -> None:
    entries.mul_(torch.where(norm == 0, norm, wanted / norm))
