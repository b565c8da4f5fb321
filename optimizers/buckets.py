"""Buckets: the matrices of one shape that travel together to their owners, and their directions back."""

from dataclasses import dataclass
from itertools import chain
from math import prod

from .layout import Layout, Shape
from .matrices import Blocks

# Entries of a bucket per owner: past one 4096 x 4096 matrix a larger batch is no faster, and smaller buckets leave more
# to overlap.
_LIMIT = 2**24


@dataclass(frozen=True)
class MatrixSpec:
    """One parameter to a route: its whole shape, its matrices, and the global rank of their owner."""

    shape: Shape
    blocks: Blocks
    owner: int


@dataclass(frozen=True)
class Bucket:
    """Matrices of one shape.

    members: indices of the parameters, in the order of their owners in the grid. counts: (R, W), how many each rank of
    the grid owns. piece: shape of a padded shard.
    """

    members: list[int]
    counts: list[list[int]]
    shape: Shape
    blocks: Blocks
    piece: Shape


def fill_buckets(matrices: list[MatrixSpec], layout: Layout) -> list[Bucket]:
    """Group equal matrices; a bucket holds as many per owner as the limit allows, at least one."""
    alike: dict[tuple, dict[int, list[int]]] = {}
    for i, matrix in enumerate(matrices):
        alike.setdefault((matrix.shape, matrix.blocks), {}).setdefault(matrix.owner, []).append(i)
    buckets = []
    for (shape, blocks), by_owner in alike.items():
        size = max(1, _LIMIT // max(1, prod(shape)))
        for start in range(0, max(map(len, by_owner.values())), size):
            owned = [[by_owner.get(rank, [])[start : start + size] for rank in row] for row in layout.grid]
            counts = [[len(mine) for mine in row] for row in owned]
            members = list(chain(*chain(*owned)))
            buckets.append(Bucket(members, counts, shape, blocks, layout.padded_shard(shape)))
    return buckets
