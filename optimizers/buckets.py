"""Buckets: the matrices that travel together on the way to their owners and back."""

from dataclasses import dataclass
from math import prod

import torch

from .layout import Layout, shard_length

# Entries of a bucket on one owner: past one 4096 x 4096 matrix a larger batch is no faster, and smaller buckets
# leave more to overlap.
_LIMIT = 2**24

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Matrix:
    """What a route must know of a parameter: its whole shape, the (batch, m, n) it is seen as, its owner's rank."""

    shape: Shape
    view: tuple[int, int, int]
    owner: int


@dataclass(frozen=True)
class Bucket:
    """Matrices of one shape.

    members: indices of parameters, by replica and shard of their owner. counts: (R, W), how many each rank owns.
    piece: shape of a padded shard. sizes: (R, W), bytes that each owner sends to one rank.
    """

    members: list[int]
    counts: list[list[int]]
    shape: Shape
    view: tuple[int, int, int]
    piece: Shape
    sizes: list[list[int]]


def fill_buckets(matrices: list[Matrix], layout: Layout, outward: torch.dtype | None) -> list[Bucket]:
    """Group equal matrices; a bucket holds as many of each owner as the limit allows, at least one.

    outward: what directions travel in; None is signs.
    """
    alike: dict[tuple, dict[int, list[int]]] = {}
    for i, matrix in enumerate(matrices):
        alike.setdefault((matrix.shape, matrix.view), {}).setdefault(matrix.owner, []).append(i)
    buckets = []
    for (shape, view), owned in alike.items():
        size = max(1, _LIMIT // max(1, prod(shape)))
        for start in range(0, max(map(len, owned.values())), size):
            chosen = [[owned.get(rank, [])[start : start + size] for rank in row] for row in layout.grid]
            members = [i for row in chosen for mine in row for i in mine]
            counts = [[len(mine) for mine in row] for row in chosen]
            piece = _piece(shape, layout)
            sizes = [[_message_size(count, prod(piece), outward) for count in row] for row in counts]
            buckets.append(Bucket(members, counts, shape, view, piece, sizes))
    return buckets


def _message_size(count: int, entries: int, outward: torch.dtype | None) -> int:
    """Bytes of so many pieces: entries, or packed signs and a flag a piece."""
    if outward is None:
        return -(-count * entries // 8) + count
    return count * entries * outward.itemsize


def _piece(shape: Shape, layout: Layout) -> Shape:
    dim = layout.dim
    if dim is None:
        return shape
    return (*shape[:dim], shard_length(shape[dim], layout.shards, 0), *shape[dim + 1 :])
