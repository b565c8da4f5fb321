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

Packed signs stay packed until all of the step have arrived: then one read of their flags shows whether a matrix has
more zeros than its row has room for, and their planes follow. Shards are padded to the longest (pieces.py); if
torch.chunk cuts evenly there is no padding.

The Gram form could do without owners: all-reduce X X' once per run of steps, multiply each rank's columns, send no
directions. Of an (m, n) matrix, m <= n, that is 4 m² entries per rank in two runs instead of m n / W: more, unless n is
above 4 W m. No matrix of a transformer has such a shape; Llama-2-7B on 8 ranks would send 17 times as much.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from . import wire
from .buckets import Bucket, fill_buckets
from .codec import CastCodec, codec_of, padded_entries
from .pieces import Cut
from .routes import Entry, Route
from .rule import Tensors, UpdateRule
from .update import Update


@dataclass
class PendingDirections:
    """Received directions of a bucket, not yet decoded.

    rows: (n, bytes), one per member. zeros: (W, k, bytes), the planes of this rank's own directions, in case they
    must follow. dtype: of the directions once they are read.
    """

    route: "OwnerExchange"
    update: Update
    bucket: Bucket
    rows: Tensor
    zeros: Tensor | None
    dtype: torch.dtype


class OwnerExchange(Route):
    """Sends shards to each matrix's owner and returns the directions."""

    def __init__(self, rule: UpdateRule, indices: list[int], entries: list[Entry]):
        super().__init__(rule, indices, entries)
        self.to_owner_dtype, self.codec = entries[0].to_owner_dtype, entries[0].codec
        self.to_owner_codec = entries[0].to_owner_codec if entries[0].layout.shard_groups else None
        self.layout = layout = entries[0].layout
        self._owner_only, self._between = entries[0].owner_only, None
        self.buckets = fill_buckets(entries, layout)
        self._replica, self._shard = layout.coordinate_of(dist.get_rank())
        self._shard_group, self._replica_group = (
            groups[0] if groups else None for groups in (layout.shard_groups, layout.replica_groups)
        )

    def of(self, rule: UpdateRule) -> Route:
        if rule is self.rule or not self._owner_only:
            return super().of(rule)
        if self._between is None:  # an elementwise rule's signs, which only the owner can compute
            sent = replace(rule, direct=lambda stack, group: stack, signs=True)
            entries = [replace(entry, codec=codec_of(signs=True, dtype=None), floats=0) for entry in self.entries]
            self._between = OwnerExchange(sent, self.indices, entries)
        return self._between

    def run(self, update: Update) -> list[PendingDirections]:
        waiting: list[PendingDirections] = []
        _overlap(self._carry(bucket, update, waiting) for bucket in self.buckets)
        return waiting

    def add_traffic(self, traffic: wire.Traffic, rank: int) -> None:
        if rank not in self.layout.ranks:
            return
        replica, shard = self.layout.coordinate_of(rank)
        for bucket in self.buckets:
            row, rows, entries = bucket.counts[replica], bucket.rows, bucket.entries
            mine, all_mine = [row[shard]] * len(row), [rows[replica]] * len(rows)
            shards = (self.to_owner_codec or CastCodec(self.to_owner_dtype)).nbytes(entries, 0)
            directions = self.codec.nbytes(entries, bucket.floats)
            traffic.add_all_to_all("to owners", row, mine, shard, shards)
            traffic.add_all_to_all("directions", mine, row, shard, directions)
            traffic.add_all_to_all("directions", all_mine, rows, replica, directions)
            for chunk in bucket.chunks if self.rule.scales_refined else ():
                size = 8 * (chunk.stop - chunk.start) * bucket.blocks.count
                traffic.add_all_reduce("norms", size, self.layout.shards)
            rows_here = prod(len(bucket.pieces.indices(shard, dim)) for dim in range(bucket.row_dims))
            for chunk in bucket.chunks:
                for cut, _ in self._cuts_of_columns(bucket):
                    count, coded = (chunk.stop - chunk.start) * rows_here, self.entries[0].coded
                    traffic.add_all_reduce("rows", 8 * count * bool(self.rule.rows), cut.parts)
                    traffic.add_all_reduce("scales", 4 * count * coded, cut.parts)

    def _carry(self, bucket: Bucket, update: Update, waiting: list[PendingDirections]) -> Generator:
        """Compute and send a bucket's directions, yielding while messages are in transit."""
        shards, dtype = self._prepare(bucket, update)
        counts = bucket.counts[self._replica]
        from_all = [counts[self._shard]] * len(counts)
        transit = wire.all_to_all(shards, counts, from_all, self._shard_group, "to owners")
        yield
        shards = transit.wait()
        del transit
        if self.to_owner_codec:
            shards, _ = self.to_owner_codec.read(shards, bucket.entries, 0, self.to_owner_dtype)
        whole, directed = self._direct(bucket, update, shards)  # (k, *shape) both
        del shards
        messages, zeros = self.codec.write(bucket.pieces.cut(directed), self._floats(bucket, whole, directed))
        del whole
        del directed
        rows = yield from self._send_to_all(bucket, messages, "directions")
        received = PendingDirections(self, update, bucket, rows, zeros, dtype)
        if zeros is None:
            self.finish(received)
        else:  # small, so that a whole step's may stay in memory
            waiting.append(received)

    def _prepare(self, bucket: Bucket, update: Update) -> tuple[Tensor, torch.dtype]:
        """Prepare members; return the shards for my row's owners, n rows, and the dtype of directions.

        All members, as their state is on every rank, unless only the owner has it.
        """
        first = sum(bucket.rows[: self._replica])
        last = first + bucket.rows[self._replica]
        rows, dtype = torch.empty(0), torch.float32
        for chunk in bucket.chunks:  # there is one
            mine = range(max(first, chunk.start), min(last, chunk.stop))
            prepared = mine if self._owner_only else range(chunk.start, chunk.stop)
            shards = update.prepare([bucket.members[i] for i in prepared]) if prepared else []
            if chunk.start == 0:
                dtype = update.dtype_of(bucket.members[0]) if self._owner_only else shards[0].dtype
                sent_in = self.to_owner_dtype if self._shard_group else dtype
                width, device = padded_entries(bucket.entries, sent_in), update.weights[bucket.members[0]].device
                new = torch.zeros if self.to_owner_codec else torch.empty  # a scale is of the padding too
                rows = new(last - first, width, dtype=sent_in, device=device)
            if mine:
                kept = [shards[i - prepared.start] for i in mine]
                places = [rows[i - first, : bucket.entries].view(bucket.pieces.shape) for i in mine]
                torch._foreach_copy_([bucket.pieces.unpadded(self._shard, place) for place in places], kept)
        if self.to_owner_codec:
            rows, _ = self.to_owner_codec.write(rows[None, :, : bucket.entries], rows.new_empty(len(rows), 0))
            rows = rows[0]
        return rows, dtype

    def _direct(self, bucket: Bucket, update: Update, shards: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's matrices and directions, (k, *shape), from the shards of all ranks, (W k, entries)."""
        count = bucket.counts[self._replica][self._shard]
        pieces = shards[:, : bucket.entries].view(self.layout.shards, count, *bucket.pieces.shape)  # (W, k, *piece)
        whole = bucket.pieces.join(pieces)
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

    def send_zeros(self, pending: PendingDirections) -> Generator:
        """Finish a bucket with more zeros than its rows have room for: planes of all of them follow."""
        assert pending.zeros is not None
        planes = yield from self._send_to_all(pending.bucket, pending.zeros, "zeros")
        self.finish(pending, planes)

    def finish(self, pending: PendingDirections, zeros: Tensor | None = None) -> None:
        """Read the directions and apply them. zeros: planes, (n, bytes)."""
        bucket, update = pending.bucket, pending.update
        for chunk in bucket.chunks:
            rows, planes = pending.rows[chunk], None if zeros is None else zeros[chunk]
            stack, floats = self.codec.read(rows, bucket.entries, bucket.floats, pending.dtype, planes)
            stack = bucket.pieces.unpadded(self._shard, stack.unflatten(1, bucket.pieces.shape))
            if update.direct_rms is not None:
                stack = bucket.shard_blocks(self._shard).scaled(stack, floats, update.direct_rms, bucket.blocks)
            stack = stack.contiguous()
            bucket.shard_blocks(self._shard).multiply_(stack, [update.factor(m, n) for m, n in bucket.blocks.shapes])
            update.finish(
                bucket.members[chunk],
                list(stack),
                partial(self._rescale, bucket),
                partial(self._multiply, bucket, floats),
                partial(self._sum_rows, bucket),
            )

    def _rescale(self, bucket: Bucket, shards: Tensors, rms: float) -> Tensors:
        """Scale shards of matrices, whose norms are all-reduced."""
        blocks, stack = bucket.shard_blocks(self._shard), torch.stack(shards)
        squares = blocks.norms(stack, torch.float64).square()  # (k, count)
        norms = wire.all_reduce(squares, self.layout.shard_groups, "norms").sqrt()
        return list(blocks.scaled(stack, norms, rms, bucket.blocks))

    def _multiply(self, bucket: Bucket, sizes: Tensor, shards: Tensors) -> Tensors:
        """Multiply shards by the numbers (k, count) of their matrices."""
        return list(bucket.shard_blocks(self._shard).multiplied(torch.stack(shards), sizes))

    def _cuts_of_columns(self, bucket: Bucket) -> list[tuple[Cut, dist.ProcessGroup]]:
        """Return the axes of the mesh that cut rows into shards, and the groups along them."""
        cuts = zip(self.layout.cuts, self.layout.cut_groups, strict=True)
        return [(cut, group) for cut, group in cuts if cut.dim >= bucket.row_dims]

    def _sum_rows(self, bucket: Bucket, sums: Tensors) -> Tensors:
        """Sum over the shards of each row."""
        groups = [group for _, group in self._cuts_of_columns(bucket)]
        return list(wire.all_reduce(torch.stack(sums), groups, "rows")) if groups else sums


def finish_all(waiting: list[PendingDirections]) -> None:
    """Read and apply the packed directions of a step, of all routes, after one read of their flags."""
    if not waiting:
        return
    device = waiting[0].rows.device
    # Every rank reads the same flags, as the owners sent the same to all.
    flags = torch.stack([each.route.codec.overflow(each.rows).to(device) for each in waiting]).tolist()  # the one sync
    _overlap(each.route.send_zeros(each) for each, flag in zip(waiting, flags, strict=True) if flag)
    for each, flag in zip(waiting, flags, strict=True):
        if not flag:
            each.route.finish(each)


def _overlap(journeys: Iterable[Generator]) -> None:
    """Run generators to their ends: per turn, start one and advance all by one step, the youngest first."""
    waiting, running = iter(journeys), []
    starting = next(waiting, None)
    while starting or running:
        running = [starting, *running] if starting else running
        running = [each for each in running if next(each, "ended") is None]
        starting = next(waiting, None)
