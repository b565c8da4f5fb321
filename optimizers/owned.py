"""The route on which every matrix has one owner among the ranks: replicated, sharded and hsdp, as one exchange.

The ranks form a grid of R replicas by W shards (layout.py). For each bucket, matrices of one shape:

    1. each rank sends its shards to the owners in its own row of the grid (all-to-all)
    2. owners stack their whole matrices and compute the directions
    3. owners send the ranks of their row their shards of the directions (all-to-all), signs at one bit an entry
    4. each rank sends what it received to the ranks of its column, as it came (a broadcast a replica)

Where W is 1 (DDP), 1 and 3 fall away, where R is 1 (FSDP2) 4 does. While a bucket is computed, the shards of the next
and the directions of the two before are on their way. Every rank posts the same collectives in the same order, whatever
it owns.

Shards are padded to the longest, so that all messages about a bucket are of equal pieces; where torch.chunk cuts
evenly there is no padding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import holes, signs, wire
from .buckets import Bucket, Matrix, fill_buckets
from .layout import Layout, shard_length
from .norms import parts_of, rescale_parts, rescale_whole
from .rule import Tensors


@dataclass
class Returning:
    """The directions of a bucket on their way back."""

    bucket: Bucket
    directed: Tensor  # those that this rank owns (k, *shape), kept until the flags say whether zeros must follow
    dtype: torch.dtype  # of what arrives
    pending: wire.Pending


class Owned:
    """Carries what this rank holds of some parameters to the owners of their matrices, and the directions back.

    Args:
        matrices: of the parameters, the same on every rank.
        layout: how all of them lie.
        inward: dtype in which shards travel to the owners.
        outward: dtype in which directions travel back; None packs them as signs, one bit an entry.
    """

    collective = True

    def __init__(self, matrices: list[Matrix], layout: Layout, inward: torch.dtype, outward: torch.dtype | None):
        self.matrices, self.layout, self.inward, self.outward = matrices, layout, inward, outward
        self.shapes = [matrix.view for matrix in matrices]
        self.replica, self.shard = layout.here
        self.buckets = fill_buckets(matrices, layout, outward)

    def direct(self, tensors: Tensors, direction: Callable[[Tensor], Tensor]) -> Tensors:
        """Return what this rank holds of direction(matrices), for what it holds of each tensor."""
        results: list[Tensor | None] = [None] * len(tensors)
        arriving = self._to_owners(self.buckets[0], tensors)
        in_row, in_column = None, None
        for bucket, following in zip(self.buckets, [*self.buckets[1:], None], strict=True):
            ahead = self._to_owners(following, tensors) if following else None
            whole = self._whole(bucket, tensors, arriving)  # (k, *shape)
            _, m, n = bucket.view
            directed = direction(whole.reshape(-1, m, n)).reshape(whole.shape) if len(whole) else whole
            back = Returning(bucket, directed, tensors[bucket.members[0]].dtype, self._send_back(bucket, directed))
            self._arrive(in_column, results)
            in_column, in_row = self._pass_on(in_row), back
            arriving = ahead
        self._arrive(in_column, results)
        self._arrive(self._pass_on(in_row), results)
        return results

    def rescale(self, tensors: Tensors, rms: float) -> Tensors:
        """Scale each matrix, in place, to this root mean square entry; a zero matrix stays zero."""
        if self.layout.dim is None:
            return rescale_whole(tensors, self.shapes, rms)
        parts = []
        for tensor, matrix in zip(tensors, self.matrices, strict=True):
            length = matrix.shape[self.layout.dim]
            start = min(self.shard * shard_length(length, self.layout.shards, 0), length)
            parts.append(parts_of(tensor, matrix.view, self.layout.dim, start))
        return rescale_parts(tensors, parts, self.shapes, [self.layout.row], rms)

    def add_traffic(self, traffic: wire.Traffic, rank: int, rescales: bool) -> None:
        """Count what a global rank sends and receives a step, when no direction has a zero."""
        replica, shard = self.layout.place(rank)
        beside, below = self.layout.shards - 1, len(self.layout.grid) - 1
        for bucket in self.buckets:
            mine, size = bucket.counts[replica], prod(bucket.piece) * self.inward.itemsize
            sizes = bucket.sizes
            row, everyone = sum(sizes[replica]), sum(map(sum, sizes))
            if beside:
                traffic.add("to owners", (sum(mine) - mine[shard]) * size, mine[shard] * beside * size)
                traffic.add("directions", sizes[replica][shard] * beside, row - sizes[replica][shard])
            if below:
                traffic.add("directions", row * below, everyone - row)
        if rescales and beside:
            norms = wire.ring_bytes(8 * sum(batch for batch, _, _ in self.shapes), beside + 1)
            traffic.add("norms", norms, norms)

    # --- to the owners

    def _to_owners(self, bucket: Bucket, tensors: Tensors) -> wire.Pending | None:
        dim, row = self.layout.dim, self.layout.row
        if row is None:
            return None
        owners = self.layout.grid[self.replica]
        mine = [i for i in bucket.members if self.matrices[i].owner in owners]
        parts = [_lengthened(tensors[i], dim, bucket.piece[dim]).reshape(-1) for i in mine]
        send = torch.cat(parts).to(self.inward) if parts else tensors[0].new_empty(0)
        size, counts = prod(bucket.piece) * self.inward.itemsize, bucket.counts[self.replica]
        sizes_in = [counts[self.shard] * size] * len(owners)
        return wire.all_to_all(wire.as_bytes(send), [count * size for count in counts], sizes_in, row, "to owners")

    def _whole(self, bucket: Bucket, tensors: Tensors, arriving: wire.Pending | None) -> Tensor:
        """Return the whole tensors that this rank owns in a bucket: (k, *shape)."""
        count, dim = bucket.counts[self.replica][self.shard], self.layout.dim
        received = arriving.wait() if arriving else None
        if not count:
            return tensors[0].new_empty(0)
        if received is None:
            owner = self.layout.grid[self.replica][self.shard]
            return torch.stack([tensors[i] for i in bucket.members if self.matrices[i].owner == owner])
        pieces = received.view(self.inward).view(-1, count, *bucket.piece)  # (W, k, *piece)
        side_by_side = pieces.movedim(0, dim + 1).flatten(dim + 1, dim + 2)  # (k, ..., W x longest, ...)
        return side_by_side.narrow(dim + 1, 0, bucket.shape[dim])

    # --- and back

    def _messages(self, directed: Tensor) -> Tensor:
        """Write the directions (k, *shape) that this rank owns as messages, one a shard: uint8 (W, bytes)."""
        if not len(directed):
            return directed.new_empty(self.layout.shards, 0, dtype=torch.uint8)
        shards = self._shards(directed)
        if self.outward is None:
            planes = signs.negatives(pad(shards, [0, -shards.shape[1] % 8])).view(len(shards), -1)
            flags = signs.has_others(directed).to(torch.uint8)  # (k,)
            return torch.cat([planes, flags.expand(len(planes), -1)], dim=1)
        return wire.as_bytes(shards.to(self.outward)).view(len(shards), -1)

    def _along_row(self, messages: Tensor, sizes: list[int], kind: str) -> wire.Pending:
        """Send each rank of my row its message; sizes (W,) are those of each sender."""
        if self.layout.row is None:
            return wire.Pending(messages.view(-1), [])
        sizes_out = [sizes[self.shard]] * len(sizes)
        return wire.all_to_all(messages.view(-1), sizes_out, sizes, self.layout.row, kind)

    def _along_column(self, messages: Tensor, sizes: list[list[int]], kind: str) -> wire.Pending:
        """Send my row's messages to the ranks of my column; sizes (R, W) are those of each owner."""
        if self.layout.column is None:
            return wire.Pending(messages, [])
        return wire.from_each(messages, [sum(row) for row in sizes], self.layout.column, kind)

    def _send_back(self, bucket: Bucket, directed: Tensor) -> wire.Pending:
        messages = self._messages(directed)
        if self.layout.row is None:
            return self._along_column(messages.view(-1), bucket.sizes, "directions")
        return self._along_row(messages, bucket.sizes[self.replica], "directions")

    def _pass_on(self, back: Returning | None) -> Returning | None:
        """Send what came along the row down the column, where there are both."""
        if back and self.layout.row and self.layout.column:
            back.pending = self._along_column(back.pending.wait(), back.bucket.sizes, "directions")
        return back

    def _shards(self, stack: Tensor) -> Tensor:
        """Cut (k, *shape) into the shards of the ranks of a row: (W, entries of k pieces), padded with 1, a sign."""
        dim, shards = self.layout.dim, self.layout.shards
        if dim is None:
            return stack.reshape(1, -1)
        longest = shard_length(stack.shape[dim + 1], shards, 0)
        even = _lengthened(stack, dim + 1, shards * longest, 1.0)
        return even.unflatten(dim + 1, (shards, longest)).movedim(dim + 1, 0).reshape(shards, -1)

    def _arrive(self, back: Returning | None, results: list[Tensor | None]) -> None:
        """Wait for the directions of a bucket, and put what this rank holds of them into `results`."""
        if back is None:
            return
        bucket, dim, received = back.bucket, self.layout.dim, back.pending.wait()
        if self.outward is None:
            pieces = self._unpack(back, received)
        else:
            pieces = received.view(self.outward).to(back.dtype).view(-1, *bucket.piece).unbind()
        for i, piece in zip(bucket.members, pieces, strict=True):
            if dim is not None:
                length = shard_length(bucket.shape[dim], self.layout.shards, self.shard)
                piece = piece.narrow(dim, 0, length).contiguous()
            results[i] = piece

    def _unpack(self, back: Returning, received: Tensor) -> list[Tensor]:
        """Return the pieces of a bucket's members from the owners' messages of signs."""
        bucket = back.bucket
        entries = signs.unpack(received, 8 * len(received), back.dtype)  # eight to a byte, from the flags nonsense
        size, pieces, flags, end = prod(bucket.piece), [], [], 0
        for count, message in zip(_flat(bucket.counts), _flat(bucket.sizes), strict=True):
            start, end = end, end + message
            if count:
                pieces += entries[8 * start : 8 * start + count * size].view(count, *bucket.piece).unbind()
                flags.append(received[end - count : end])
        flagged = torch.cat(flags).tolist()  # the same on every rank: the owners said so to all
        if any(flagged):
            self._restore(back, pieces, flagged)
        return pieces

    def _restore(self, back: Returning, pieces: list[Tensor], flagged: list[int]) -> None:
        """Put zeros and NaN back into the flagged matrices: their owners send how many there are, then where."""
        bucket, entries = back.bucket, prod(back.bucket.piece)
        chosen = [j for j, flag in enumerate(flagged) if flag]
        places = [self.layout.place(self.matrices[i].owner) for i in bucket.members]
        own = [bool(flag) for place, flag in zip(places, flagged, strict=True) if place == (self.replica, self.shard)]
        shards = self._shards(back.directed[own]) if any(own) else back.directed.new_empty(0)
        shards = shards.view(self.layout.shards, sum(own), entries)

        def to_all(messages: Tensor, lengths: list[int]) -> Tensor:
            """Send my messages (W, bytes) of lengths by chosen matrix to all; return those of all of them."""
            sizes = [[0] * self.layout.shards for _ in self.layout.grid]
            for j, length in zip(chosen, lengths, strict=True):
                replica, shard = places[j]
                sizes[replica][shard] += length
            in_row = self._along_row(messages, sizes[self.replica], "zeros").wait()
            return self._along_column(in_row, sizes, "zeros").wait()

        mine = holes.most(shards)  # (own flagged,)
        counts = to_all(wire.as_bytes(mine).expand(self.layout.shards, -1).contiguous(), [4] * len(chosen))
        counts = counts.view(torch.int32).tolist()
        nothing = shards.new_empty(self.layout.shards, 0, dtype=torch.uint8)
        messages = torch.cat([nothing, *(holes.write(shards[:, k], int(count)) for k, count in enumerate(mine))], dim=1)
        lengths = [holes.size(count, entries) for count in counts]
        received = to_all(messages, lengths)
        for j, count, part in zip(chosen, counts, received.split(lengths), strict=True):
            holes.put_back(pieces[j], part, count)


def _flat(table: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(table))


def _lengthened(tensor: Tensor, dim: int, length: int, filler: float = 0.0) -> Tensor:
    """Return the tensor with a filler after it, up to this length of one dimension."""
    missing = length - tensor.shape[dim]
    return pad(tensor, [0, 0] * (tensor.ndim - 1 - dim) + [0, missing], value=filler) if missing else tensor
