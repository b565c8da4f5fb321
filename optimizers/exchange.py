"""The route on which every matrix has one owner among the ranks: replicated, sharded and hsdp, as one exchange.

The ranks form a grid of R replicas by W shards (layout.py). For each bucket, matrices of one shape:

    1. each rank prepares its shards and sends them to the owners in its own row of the grid (all-to-all)
    2. owners stack their whole matrices and compute the directions
    3. owners send the ranks of their row their shards of the directions (all-to-all), in the codec's format
    4. each rank forwards the rows that it received to the ranks of its column (all-to-all)
    5. each rank reads the shards of the directions and updates its shards of the weights

If W is 1 (DDP), 1 and 3 are skipped; if R is 1 (FSDP2), 4 is. While a bucket is computed, the shards of the next
and the directions of the two before are on their way. Every rank posts the same collectives in the same order, whatever
it owns. Messages are rows of equal length, one per matrix, of multiples of 16 bytes: NCCL copies others byte by byte.

Packed signs stay packed until all have arrived: then one read of their flags shows whether a matrix has more zeros than
its row has room for, and their planes follow. Shards are padded to the longest; if torch.chunk cuts evenly there is
no padding.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from . import wire
from .codec import padded_entries
from .layout import Layout, Shape
from .matrices import Blocks
from .routes import Entry, Route
from .rule import Tensors, UpdateRule
from .update import Update

# Entries of a bucket per owner: past one 4096 x 4096 matrix a larger batch is no faster, and smaller buckets leave more
# to overlap.
_LIMIT = 2**24
# Entries that a rank prepares, or reads and applies, at once: a step's temporaries are a few times as large.
_CHUNK = 2**25


@dataclass(frozen=True)
class Bucket:
    """Matrices of one shape that are sent together to their owners, and their directions back.

    members: indices of the parameters, in the order of their owners in the grid. counts: (R, W), how many each rank of
    the grid owns. shape, blocks, floats, row_dims: of their entries in the plan. piece: shape of a padded shard.
    """

    members: list[int]
    counts: list[list[int]]
    shape: Shape
    blocks: Blocks
    floats: int
    row_dims: int
    piece: Shape

    @property
    def rows(self) -> list[int]:
        """The number of matrices that the ranks of each row of the grid own."""
        return [sum(row) for row in self.counts]

    @property
    def chunks(self) -> list[slice]:
        """Ranges of the members that are prepared, or applied, at once."""
        size = max(1, _CHUNK // max(1, prod(self.piece)))
        return [slice(start, min(start + size, len(self.members))) for start in range(0, len(self.members), size)]


def fill_buckets(entries: list[Entry], layout: Layout) -> list[Bucket]:
    """Group equal matrices; a bucket holds as many per owner as the limit allows, at least one."""
    alike: dict[tuple, dict[int | None, list[int]]] = {}
    for i, entry in enumerate(entries):
        key = entry.shape, entry.blocks, entry.floats, entry.row_dims
        alike.setdefault(key, {}).setdefault(entry.owner, []).append(i)
    buckets = []
    for (shape, blocks, floats, row_dims), by_owner in alike.items():
        size = max(1, _LIMIT // max(1, prod(shape)))
        for start in range(0, max(map(len, by_owner.values())), size):
            owned = [[by_owner.get(rank, [])[start : start + size] for rank in row] for row in layout.grid]
            counts = [[len(mine) for mine in row] for row in owned]
            members = list(chain(*chain(*owned)))
            buckets.append(Bucket(members, counts, shape, blocks, floats, row_dims, layout.padded_shard(shape)))
    return buckets


@dataclass
class PendingDirections:
    """Received directions of a bucket, not yet decoded.

    rows: (n, bytes), one per member. zeros: (W, k, bytes), the planes of this rank's own directions, in case they
    must follow. dtype: of the directions once they are read.
    """

    bucket: Bucket
    rows: Tensor
    zeros: Tensor | None
    dtype: torch.dtype


class OwnerExchange(Route):
    """Sends shards to each matrix's owner and returns the directions."""

    def __init__(self, rule: UpdateRule, indices: list[int], entries: list[Entry]):
        super().__init__(rule, indices, entries)
        self.to_owner_dtype, self.codec = entries[0].to_owner_dtype, entries[0].codec
        self.layout = layout = entries[0].layout
        self.buckets = fill_buckets(entries, layout)
        self._replica, self._shard = layout.coordinate_of(dist.get_rank())
        self._shard_group, self._replica_group = (
            groups[0] if groups else None for groups in (layout.shard_groups, layout.replica_groups)
        )

    def run(self, update: Update) -> None:
        pending: list[PendingDirections] = []
        _overlap(self._carry(bucket, update, pending) for bucket in self.buckets)
        if not pending:
            return
        # Every rank reads the same flags, as the owners sent the same to all.
        flags = torch.stack([self.codec.overflow(each.rows) for each in pending]).tolist()  # the one sync
        _overlap(self._send_zeros(each, update) for each, flag in zip(pending, flags, strict=True) if flag)
        for each, flag in zip(pending, flags, strict=True):
            if not flag:
                self._finish(each, update)

    def add_traffic(self, traffic: wire.Traffic, rank: int) -> None:
        if rank not in self.layout.ranks:
            return
        replica, shard = self.layout.coordinate_of(rank)
        for bucket in self.buckets:
            row, rows, entries = bucket.counts[replica], bucket.rows, prod(bucket.piece)
            mine, all_mine = [row[shard]] * len(row), [rows[replica]] * len(rows)
            shards = padded_entries(entries, self.to_owner_dtype) * self.to_owner_dtype.itemsize
            directions = self.codec.nbytes(entries, bucket.floats)
            traffic.add_all_to_all("to owners", row, mine, shard, shards)
            traffic.add_all_to_all("directions", mine, row, shard, directions)
            traffic.add_all_to_all("directions", all_mine, rows, replica, directions)
            for chunk in bucket.chunks if self.rule.scales_refined else ():
                size = 8 * (chunk.stop - chunk.start) * bucket.blocks.count
                traffic.add_all_reduce("norms", size, self.layout.shards)
            for chunk in bucket.chunks if self.rule.rows and self._cuts_rows(bucket) else ():
                size = 8 * (chunk.stop - chunk.start) * prod(bucket.shape[: bucket.row_dims])
                traffic.add_all_reduce("rows", size, self.layout.shards)

    def _carry(self, bucket: Bucket, update: Update, pending: list[PendingDirections]) -> Generator:
        """Compute and send a bucket's directions, yielding while messages are in transit."""
        shards, dtype = self._prepare(bucket, update)  # (n, entries)
        counts = bucket.counts[self._replica]
        from_all = [counts[self._shard]] * len(counts)
        transit = wire.all_to_all(shards, counts, from_all, self._shard_group, "to owners")
        yield
        shards = transit.wait()
        del transit
        whole, directed = self._direct(bucket, update, shards)  # (k, *shape) both
        del shards
        messages, zeros = self.codec.write(self._cut(bucket, directed), self._floats(bucket, whole, directed))
        del whole
        del directed
        rows = yield from self._send_to_all(bucket, messages, "directions")
        received = PendingDirections(bucket, rows, zeros, dtype)
        if zeros is None:
            self._finish(received, update)
        else:  # small, so that a whole step's may stay in memory
            pending.append(received)

    def _prepare(self, bucket: Bucket, update: Update) -> tuple[Tensor, torch.dtype]:
        """Prepare all members; return the shards for my row's owners, (n, entries), and the dtype of directions."""
        first = sum(bucket.rows[: self._replica])
        last = first + bucket.rows[self._replica]
        rows, dtype = torch.empty(0), torch.float32
        for chunk in bucket.chunks:  # there is one
            shards = update.prepare(bucket.members[chunk])
            if chunk.start == 0:
                dtype = shards[0].dtype
                sent_in = self.to_owner_dtype if self._shard_group else dtype
                rows = shards[0].new_empty(last - first, padded_entries(prod(bucket.piece), sent_in), dtype=sent_in)
            mine = range(max(first, chunk.start), min(last, chunk.stop))
            if mine:
                kept = [shards[i - chunk.start] for i in mine]
                places = [rows[i - first, : prod(bucket.piece)].view(bucket.piece) for i in mine]
                torch._foreach_copy_([self._unpadded(bucket, place) for place in places], kept)
        return rows, dtype

    def _unpadded(self, bucket: Bucket, shards: Tensor) -> Tensor:
        """Return this rank's part of padded shards (..., *piece)."""
        dim = self.layout.dim - len(bucket.piece)
        return shards.narrow(dim, 0, self.layout.shard_range(bucket.shape, self._shard)[1])

    def _direct(self, bucket: Bucket, update: Update, shards: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's matrices and directions, (k, *shape), from the shards of all ranks, (W k, entries)."""
        dim, count = self.layout.dim, bucket.counts[self._replica][self._shard]
        pieces = shards[:, : prod(bucket.piece)].view(self.layout.shards, count, *bucket.piece)  # (W, k, *piece)
        side_by_side = pieces.movedim(0, dim + 1).flatten(dim + 1, dim + 2)  # (k, ..., W x longest, ...)
        whole = side_by_side.narrow(dim + 1, 0, bucket.shape[dim])
        if not whole.numel():
            return whole, whole
        directions = [update.direct(stack) for stack in bucket.blocks.stacks(whole)]
        return whole, bucket.blocks.join(directions).reshape(whole.shape)

    def _floats(self, bucket: Bucket, whole: Tensor, directed: Tensor) -> Tensor:
        """Return the numbers sent with directions (k, *shape): norms or products, (k, floats)."""
        if not bucket.floats:
            return directed.new_empty(len(directed), 0, dtype=torch.float64)
        if self.rule.sized:
            return bucket.blocks.products(whole, directed)
        return bucket.blocks.norms(directed, torch.float64)

    def _cut(self, bucket: Bucket, directed: Tensor) -> Tensor:
        """Cut directions (k, *shape) into the pieces of the ranks of my row: (W, k, entries), padded with 1, a sign."""
        dim, parts = self.layout.dim, self.layout.shards
        missing = parts * bucket.piece[dim] - directed.shape[dim + 1]
        even = pad(directed, [0, 0] * (directed.ndim - 2 - dim) + [0, missing], value=1.0) if missing else directed
        pieces = even.unflatten(dim + 1, (parts, bucket.piece[dim])).movedim(dim + 1, 0)
        return pieces.reshape(parts, len(directed), prod(bucket.piece))

    def _send_to_all(self, bucket: Bucket, messages: Tensor, kind: str) -> Generator[None, None, Tensor]:
        """Send messages (W, k, bytes), one per shard, to all ranks that hold that shard; return those of all owners."""
        row, rows = bucket.counts[self._replica], bucket.rows
        received = wire.all_to_all(messages.flatten(0, 1), [row[self._shard]] * len(row), row, self._shard_group, kind)
        yield
        if self._replica_group:
            to_all = [rows[self._replica]] * len(rows)
            received = wire.all_to_all(received.wait().repeat(len(rows), 1), to_all, rows, self._replica_group, kind)
        yield
        return received.wait()

    def _send_zeros(self, pending: PendingDirections, update: Update) -> Generator:
        """Finish a bucket with more zeros than its rows have room for: planes of all of them follow."""
        assert pending.zeros is not None
        planes = yield from self._send_to_all(pending.bucket, pending.zeros, "zeros")
        self._finish(pending, update, planes)

    def _finish(self, pending: PendingDirections, update: Update, zeros: Tensor | None = None) -> None:
        """Read the directions and apply them. zeros: planes, (n, bytes)."""
        bucket = pending.bucket
        for chunk in bucket.chunks:
            rows, planes = pending.rows[chunk], None if zeros is None else zeros[chunk]
            stack, floats = self.codec.read(rows, prod(bucket.piece), bucket.floats, pending.dtype, planes)
            stack = self._unpadded(bucket, stack.unflatten(1, bucket.piece))
            if update.direct_rms is not None:
                stack = self._blocks_here(bucket).scaled(stack, floats, update.direct_rms, bucket.blocks)
            stack = stack.contiguous()
            self._blocks_here(bucket).multiply_(stack, [update.factor(m, n) for m, n in bucket.blocks.shapes])
            update.finish(
                bucket.members[chunk],
                list(stack),
                partial(self._rescale, bucket),
                partial(self._multiply, bucket, floats),
                partial(self._sum_rows, bucket),
            )

    def _rescale(self, bucket: Bucket, shards: Tensors, rms: float) -> Tensors:
        """Scale shards of matrices, whose norms are all-reduced."""
        blocks, stack = self._blocks_here(bucket), torch.stack(shards)
        squares = blocks.norms(stack, torch.float64).square()  # (k, count)
        norms = wire.all_reduce(squares, self.layout.shard_groups, "norms").sqrt()
        return list(blocks.scaled(stack, norms, rms, bucket.blocks))

    def _multiply(self, bucket: Bucket, sizes: Tensor, shards: Tensors) -> Tensors:
        """Multiply shards by the numbers (k, count) of their matrices."""
        return list(self._blocks_here(bucket).multiplied(torch.stack(shards), sizes))

    def _cuts_rows(self, bucket: Bucket) -> bool:
        return self.layout.dim >= bucket.row_dims

    def _sum_rows(self, bucket: Bucket, sums: Tensors) -> Tensors:
        """Sum over the shards of each row."""
        if not self._cuts_rows(bucket):
            return sums
        return list(wire.all_reduce(torch.stack(sums), self.layout.shard_groups, "rows"))

    def _blocks_here(self, bucket: Bucket) -> Blocks:
        """Return the parts of a bucket's matrices that this rank holds."""
        if self.layout.shards == 1:
            return bucket.blocks
        dim, (start, length) = self.layout.dim, self.layout.shard_range(bucket.shape, self._shard)
        return bucket.blocks.shard((*bucket.shape[:dim], length, *bucket.shape[dim + 1 :]), dim, start)


def _overlap(journeys: Iterable[Generator]) -> None:
    """Run generators to their ends: per turn, start one and advance all by one step, the youngest first."""
    waiting, running = iter(journeys), []
    starting = next(waiting, None)
    while starting or running:
        running = [starting, *running] if starting else running
        running = [each for each in running if next(each, "ended") is None]
        starting = next(waiting, None)
