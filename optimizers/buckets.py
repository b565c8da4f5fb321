"""Buckets: the matrices that travel to their owners together."""

from dataclasses import dataclass
from itertools import chain
from math import prod

from .layout import Layout
from .matrices import Blocks
from .pieces import Pieces, Shape
from .routes import Entry

# Entries of a bucket per owner: past one 4096 x 4096 matrix a larger batch is no faster, and smaller buckets leave more
# to overlap.
_ENTRIES_PER_OWNER = 2**24
# Entries that a rank prepares, or reads and applies, at once: a step's temporaries are a few times as large.
_CHUNK = 2**25


@dataclass(frozen=True)
class Bucket:
    """Matrices of one shape that are sent together to their owners, and their directions back.

    Attributes:
        members: indices of the parameters, in the order of their owners in the grid.
        counts: (R, W), how many each rank of the grid owns.
        shape, blocks, floats, row_dims: `whole`, `blocks`, `floats` and `row_dims` of their entries in the plan.
        pieces: their shards.
    """

    members: list[int]
    counts: list[list[int]]
    shape: Shape
    blocks: Blocks
    floats: int
    row_dims: int
    pieces: Pieces

    @property
    def entries(self) -> int:
        """Entries of a padded shard."""
        return prod(self.pieces.shape)

    @property
    def rows(self) -> list[int]:
        """The number of matrices that the ranks of each row of the grid own."""
        return [sum(row) for row in self.counts]

    @property
    def chunks(self) -> list[slice]:
        """Ranges of the members that are prepared, or applied, at once."""
        size = max(1, _CHUNK // max(1, self.entries))
        return [slice(start, min(start + size, len(self.members))) for start in range(0, len(self.members), size)]

    def shard_blocks(self, shard: int) -> Blocks:
        """Return the parts of each tensor's matrices in a shard."""
        if not self.pieces.cuts:
            return self.blocks
        shape = tuple(len(self.pieces.indices(shard, dim)) for dim in range(len(self.shape)))
        return self.blocks.shard(shape, self.pieces.indices(shard, self.blocks.dim))


def fill_buckets(entries: list[Entry], layout: Layout) -> list[Bucket]:
    """Group equal matrices; a bucket holds as many per owner as the limit allows, at least one."""
    alike: dict[tuple, dict[int | None, list[int]]] = {}
    for i, entry in enumerate(entries):
        key = entry.whole, entry.blocks, entry.floats, entry.row_dims
        alike.setdefault(key, {}).setdefault(entry.owner, []).append(i)
    buckets = []
    for (shape, blocks, floats, row_dims), by_owner in alike.items():
        size, pieces = max(1, _ENTRIES_PER_OWNER // max(1, prod(shape))), Pieces(shape, layout.cuts)
        for start in range(0, max(map(len, by_owner.values())), size):
            owned = [[by_owner.get(rank, [])[start : start + size] for rank in row] for row in layout.grid]
            counts = [[len(mine) for mine in row] for row in owned]
            members = list(chain(*chain(*owned)))
            buckets.append(Bucket(members, counts, shape, blocks, floats, row_dims, pieces))
    return buckets
