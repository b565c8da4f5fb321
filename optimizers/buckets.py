"""Buckets: the matrices of one shape that travel together to their owners, and their directions back."""

from dataclasses import dataclass
from itertools import chain
from math import prod

from .codec import Codec
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

    owned: (R, W), the indices of the parameters that each rank of the grid owns. piece: shape of a padded shard.
    nbytes: (R, W), bytes of each owner's message of directions to one rank.
    """

    owned: list[list[list[int]]]
    shape: Shape
    matrix_shape: tuple[int, int, int]
    piece: Shape
    nbytes: list[list[int]]

    @property
    def members(self) -> list[int]:
        """Indices of all parameters, in the order of their owners' messages."""
        return list(chain(*chain(*self.owned)))


def fill_buckets(matrices: list[MatrixSpec], layout: Layout, codec: Codec) -> list[Bucket]:
    """Group equal matrices; a bucket holds as many per owner as the limit allows, at least one."""
    alike: dict[tuple, dict[int, list[int]]] = {}
    for i, matrix in enumerate(matrices):
        alike.setdefault((matrix.shape, matrix.matrix_shape), {}).setdefault(matrix.owner, []).append(i)
    buckets = []
    for (shape, matrix_shape), by_owner in alike.items():
        piece, size = layout.padded_shard(shape), max(1, _LIMIT // max(1, prod(shape)))
        for start in range(0, max(map(len, by_owner.values())), size):
            owned = [[by_owner.get(rank, [])[start : start + size] for rank in row] for row in layout.grid]
            nbytes = [[codec.nbytes(len(mine), prod(piece)) for mine in row] for row in owned]
            buckets.append(Bucket(owned, shape, matrix_shape, piece, nbytes))
    return buckets
