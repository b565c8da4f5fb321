"""Buckets: the matrices of one shape that travel together to their owners, and their directions back."""

from dataclasses import dataclass
from itertools import chain
from math import prod

from .layout import Layout, Shape

# Entries of a bucket per owner: past one 4096 x 4096 matrix a larger batch is no faster, and smaller buckets leave more
# to overlap.
_LIMIT = 2**24


@dataclass(frozen=True)
class MatrixSpec:
    """One parameter to a route: its whole shape, the (batch, m, n) it is treated as, and its owner's global rank."""

    shape: Shape
    matrix_shape: tuple[int, int, int]
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
    matrix_shape: tuple[int, int, int]
    piece: Shape


def fill_buckets(matrices: list[MatrixSpec], layout: Layout) -> list[Bucket]:
    """Group equal matrices; a bucket holds as many per owner as the limit allows, at least one."""
    alike: dict[tuple, dict[int, list[int]]] = {}
    for i, matrix in enumerate(matrices):
        alike.setdefault((matrix.shape, matrix.matrix_shape), {}).setdefault(matrix.owner, []).append(i)
    buckets = []
    for (shape, matrix_shape), by_owner in alike.items():
        size = max(1, _LIMIT // max(1, prod(shape)))
        for start in range(0, max(map(len, by_owner.values())), size):
            owned = [[by_owner.get(rank, [])[start : start + size] for rank in row] for row in layout.grid]
            counts = [[len(mine) for mine in row] for row in owned]
            members = list(chain(*chain(*owned)))
            buckets.append(Bucket(members, counts, shape, matrix_shape, layout.padded_shard(shape)))
    return buckets
