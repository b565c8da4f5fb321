"""The route on which every matrix has one owner among the ranks: replicated, sharded and hsdp, as one exchange.

The ranks form a grid of R replicas by W shards (layout.py). For each bucket, matrices of one shape:

    1. each rank prepares its shards and sends them to the owners in its own row of the grid (all-to-all)
    2. owners stack their whole matrices and compute the directions
    3. owners send the ranks of their row their shards of the directions (all-to-all), as the codec writes them
    4. each rank sends what it received to the ranks of its column, as it came (all-to-all)
    5. each rank reads the shards of the directions and updates its shards of the weights

Where W is 1 (DDP), 1 and 3 fall away, where R is 1 (FSDP2) 4 does. While a bucket is computed, the shards of the next
and the directions of the two before are on their way. Every rank posts the same collectives in the same order, whatever
it owns. Messages are rows of equal length, one per matrix, of multiples of 16 bytes: NCCL copies others byte by byte.

Packed signs stay packed until all have come: then one look at their flags tells whether a matrix has more zeros than
its row has room for, and their planes follow. Shards are padded to the longest; where torch.chunk cuts evenly there is
no padding.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from . import wire
from .buckets import Bucket, MatrixSpec, fill_buckets
from .codec import Codec, padded_entries
from .layout import Layout
from .matrices import Blocks
from .routes import Route, Update

# Entries that a rank prepares, or reads and applies, at once: a step's temporaries are a few times as large.
_CHUNK = 2**25


@dataclass
class PendingDirections:
    """Directions of a bucket that have come, unread.

    rows: (n, bytes), one per member. zeros: (W, k, bytes), the planes of this rank's own directions, in case that they
    must follow. dtype: of the directions once they are read.
    """

    bucket: Bucket
    rows: Tensor
    zeros: Tensor | None
    dtype: torch.dtype


class OwnerExchange(Route):
    """Sends shards to each matrix's owner and returns the directions.

    Args:
        matrices: the parameters, the same on every rank.
        layout: of all of them.
        to_owner_dtype: in which shards travel to the owners.
        codec: of the directions on their way back.
    """

    collective = True

    def __init__(self, matrices: list[MatrixSpec], layout: Layout, to_owner_dtype: torch.dtype, codec: Codec):
        self.layout, self.to_owner_dtype, self.codec = layout, to_owner_dtype, codec
        self.buckets = fill_buckets(matrices, layout)
        self._replica, self._shard = layout.coordinate_of(dist.get_rank())
        self._shard_group, self._replica_group = (
            groups[0] if groups else None for groups in (layout.shard_groups, layout.replica_groups)
        )

    def run(self, update: Update) -> None:
        pending: list[PendingDirections] = []
        _overlap(self._carry(bucket, update, pending) for bucket in self.buckets)
        if not pending:
            return
        # Every rank sees the same flags: the owners sent the same ones to all.
        flags = torch.stack([self.codec.overflow(each.rows) for each in pending]).tolist()  # the one sync
        _overlap(self._send_zeros(each, update) for each, flag in zip(pending, flags, strict=True) if flag)
        for each, flag in zip(pending, flags, strict=True):
            if not flag:
                self._finish(each, update)

    def add_traffic(self, traffic: wire.Traffic, rank: int, rescales: bool, refines: bool) -> None:
        if rank not in self.layout.ranks:
            return
        replica, shard = self.layout.coordinate_of(rank)
        for bucket in self.buckets:
            count, row, rows = bucket.blocks.count, bucket.counts[replica], [sum(each) for each in bucket.counts]
            directions = self.codec.nbytes(prod(bucket.piece), count)
            if self._shard_group:
                shards = self._shard_entries(bucket) * self.to_owner_dtype.itemsize
                traffic.add_all_to_all("to owners", row, [row[shard]] * len(row), shard, shards)
                traffic.add_all_to_all("directions", [row[shard]] * len(row), row, shard, directions)
            if self._replica_group:
                traffic.add_all_to_all("directions", [rows[replica]] * len(rows), rows, replica, directions)
            if rescales and self._shard_group and (refines or not self.codec.packed):
                for chunk in self._chunks(bucket):
                    traffic.add_all_reduce("norms", 8 * len(bucket.members[chunk]) * count, self.layout.shards)

    def _carry(self, bucket: Bucket, update: Update, pending: list[PendingDirections]) -> Generator:
        """Compute and send a bucket's directions, yielding while messages travel."""
        shards, dtype = self._prepare(bucket, update)  # (n, entries)
        counts = bucket.counts[self._replica]
        if self._shard_group:
            from_all = [counts[self._shard]] * len(counts)
            travelling = wire.all_to_all(shards, counts, from_all, self._shard_group, "to owners")
            yield
            shards = travelling.wait()
            del travelling
        else:
            yield
        directed = self._direct(bucket, update, shards)  # (k, *shape)
        del shards
        norms = bucket.blocks.norms(directed, torch.float64)
        messages, zeros = self.codec.write(self._cut(bucket, directed), norms)
        del directed
        received = PendingDirections(
            bucket, (yield from self._send_to_all(bucket, messages, "directions")), zeros, dtype
        )
        if self.codec.packed:
            pending.append(received)
        else:
            self._finish(received, update)

    def _shard_entries(self, bucket: Bucket) -> int:
        """Entries of a shard's row on the way to its owner."""
        return padded_entries(prod(bucket.piece), self.to_owner_dtype) if self._shard_group else prod(bucket.piece)

    def _chunks(self, bucket: Bucket) -> list[slice]:
        """Ranges of a bucket's members that are prepared, or applied, at once."""
        size = max(1, _CHUNK // max(1, prod(bucket.piece)))
        return [slice(start, start + size) for start in range(0, len(bucket.members), size)]

    def _prepare(self, bucket: Bucket, update: Update) -> tuple[Tensor, torch.dtype]:
        """Prepare all members; return the shards for my row's owners, (n, entries), and the dtype of directions."""
        first = sum(map(sum, bucket.counts[: self._replica]))
        last = first + sum(bucket.counts[self._replica])
        rows, dtype = None, torch.float32
        for chunk in self._chunks(bucket):
            shards = update.prepare(bucket.members[chunk])
            dtype = shards[0].dtype
            if rows is None:
                sent_in = self.to_owner_dtype if self._shard_group else dtype
                rows = shards[0].new_empty(last - first, self._shard_entries(bucket), dtype=sent_in)
            places, kept = [], []
            for position, shard in enumerate(shards, chunk.start):
                if first <= position < last:
                    place = rows[position - first, : prod(bucket.piece)].view(bucket.piece)
                    dim = self.layout.dim
                    places.append(place if dim is None else place.narrow(dim, 0, shard.shape[dim]))
                    kept.append(shard)
            if kept:
                torch._foreach_copy_(places, kept)
        assert rows is not None  # a bucket has members
        return rows, dtype

    def _direct(self, bucket: Bucket, update: Update, shards: Tensor) -> Tensor:
        """Return the directions of this rank's matrices, (k, *shape), from the shards of all ranks, (W k, entries)."""
        dim, count = self.layout.dim, bucket.counts[self._replica][self._shard]
        pieces = shards[:, : prod(bucket.piece)].view(self.layout.shards, count, *bucket.piece)  # (W, k, *piece)
        whole = pieces[0]
        if dim is not None:
            side_by_side = pieces.movedim(0, dim + 1).flatten(dim + 1, dim + 2)  # (k, ..., W x longest, ...)
            whole = side_by_side.narrow(dim + 1, 0, bucket.shape[dim])
        if not whole.numel():
            return whole
        return bucket.blocks.join([update.direct(stack) for stack in bucket.blocks.stacks(whole)]).reshape(whole.shape)

    def _cut(self, bucket: Bucket, directed: Tensor) -> Tensor:
        """Cut directions (k, *shape) into the pieces of the ranks of my row: (W, k, entries), padded with 1, a sign."""
        dim, parts = self.layout.dim, self.layout.shards
        pieces = directed[None]
        if dim is not None:
            missing = parts * bucket.piece[dim] - directed.shape[dim + 1]
            even = pad(directed, [0, 0] * (directed.ndim - 2 - dim) + [0, missing], value=1.0) if missing else directed
            pieces = even.unflatten(dim + 1, (parts, bucket.piece[dim])).movedim(dim + 1, 0)
        return pieces.reshape(parts, len(directed), prod(bucket.piece))

    def _send_to_all(self, bucket: Bucket, messages: Tensor, kind: str) -> Generator[None, None, Tensor]:
        """Send messages (W, k, bytes), one per shard, to all who hold that shard; return those of all owners."""
        row, rows = bucket.counts[self._replica], [sum(each) for each in bucket.counts]
        received = messages.flatten(0, 1)
        if self._shard_group:
            received = wire.all_to_all(received, [row[self._shard]] * len(row), row, self._shard_group, kind)
        yield
        if self._replica_group:
            received = wire.arrived(received).repeat(len(rows), 1)
            to_all = [rows[self._replica]] * len(rows)
            received = wire.all_to_all(received, to_all, rows, self._replica_group, kind)
        yield
        return wire.arrived(received)

    def _send_zeros(self, pending: PendingDirections, update: Update) -> Generator:
        """Finish a bucket with more zeros than its rows have room for: planes of all of them follow."""
        assert pending.zeros is not None
        planes = yield from self._send_to_all(pending.bucket, pending.zeros, "zeros")
        self._finish(pending, update, planes)

    def _finish(self, pending: PendingDirections, update: Update, zeros: Tensor | None = None) -> None:
        """Read the directions and apply them. zeros: planes, (n, bytes)."""
        bucket, dim = pending.bucket, self.layout.dim
        for chunk in self._chunks(bucket):
            members, planes = bucket.members[chunk], None if zeros is None else zeros[chunk]
            entries, count = prod(bucket.piece), bucket.blocks.count
            stack, norms = self.codec.read(pending.rows[chunk], entries, count, pending.dtype, planes)
            stack = stack.view(-1, *bucket.piece) if stack.is_contiguous() else stack.unflatten(1, bucket.piece)
            if dim is not None:
                stack = stack.narrow(dim + 1, 0, self.layout.shard_range(bucket.shape, self._shard)[1])
            if update.rms is not None and not update.refines:
                stack = self._rescaled(bucket, stack, norms, update.rms)
            stack = stack.contiguous()
            if update.factor:
                self._blocks_here(bucket).multiply_(stack, [update.factor(m, n) for m, n in bucket.blocks.shapes])
            directions = list(stack)
            if update.refines:
                directions = update.refine(members, directions)
                if update.rms is not None:
                    directions = list(self._rescaled(bucket, torch.stack(directions), None, update.rms))
            update.apply(members, directions)

    def _rescaled(self, bucket: Bucket, stack: Tensor, norms: Tensor | None, rms: float) -> Tensor:
        """Scale shards (k, *shard) of matrices with `norms` (k, count); None: all-reduced over the shards."""
        blocks = self._blocks_here(bucket)
        if norms is None:
            squares = blocks.norms(stack, torch.float64).square()
            if self._shard_group:
                wire.all_reduce(squares, self._shard_group, "norms")
            norms = squares.sqrt()
        return blocks.scaled(stack, norms, rms, bucket.blocks)

    def _blocks_here(self, bucket: Bucket) -> Blocks:
        """Return the parts of a bucket's matrices that this rank holds."""
        dim = self.layout.dim
        if dim is None:
            return bucket.blocks
        start, length = self.layout.shard_range(bucket.shape, self._shard)
        return bucket.blocks.shard((*bucket.shape[:dim], length, *bucket.shape[dim + 1 :]), dim, start)


def _overlap(journeys: Iterable[Generator]) -> None:
    """Run generators to their ends: per turn, start one and advance all by one step, the youngest first."""
    waiting, running = iter(journeys), []
    starting = next(waiting, None)
    while starting or running:
        running = [starting, *running] if starting else running
        running = [each for each in running if next(each, "ended") is None]
        starting = next(waiting, None)
