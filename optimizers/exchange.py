"""The route on which every matrix has one owner among the ranks: replicated, sharded and hsdp, as one exchange.

The ranks form a grid of R replicas by W shards (layout.py). For each bucket, matrices of one shape:

    1. each rank sends its shards to the owners in its own row of the grid (all-to-all)
    2. owners stack their whole matrices and compute the directions
    3. owners send the ranks of their row their shards of the directions (all-to-all), as the codec writes them
    4. each rank sends what it received to the ranks of its column, as it came (one broadcast per replica)

Where W is 1 (DDP), 1 and 3 fall away, where R is 1 (FSDP2) 4 does. While a bucket is computed, the shards of the next
and the directions of the two before are on their way. Every rank posts the same collectives in the same order, whatever
it owns.

Shards are padded to the longest, so that all messages about a bucket are of equal pieces; where torch.chunk cuts
evenly there is no padding.
"""

from collections.abc import Generator, Iterable
from itertools import chain
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from . import wire
from .buckets import Bucket, MatrixSpec, fill_buckets
from .codec import Codec, as_bytes, most_zeros, read_zeros, write_zeros, zeros_nbytes
from .layout import Layout
from .routes import Direction, Route, rescale_slices, rescale_whole, slices_of
from .rule import Tensors


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
        self.matrices, self.layout, self.to_owner_dtype, self.codec = matrices, layout, to_owner_dtype, codec
        self.matrix_shapes = [matrix.matrix_shape for matrix in matrices]
        self.buckets = fill_buckets(matrices, layout, codec)
        self._replica, self._shard = layout.coordinate_of(dist.get_rank())
        self._shard_group, self._replica_group = (
            groups[0] if groups else None for groups in (layout.shard_groups, layout.replica_groups)
        )

    def direct(self, tensors: Tensors, direction: Direction) -> Tensors:
        """Return this rank's shards of direction(matrices), given its shards of the matrices."""
        results = list(tensors)
        _overlap(self._carry(bucket, tensors, direction, results) for bucket in self.buckets)
        return results

    def rescale(self, tensors: Tensors, rms: float) -> Tensors:
        """Scale each matrix, in place, to this root mean square entry; a zero matrix stays zero."""
        if self.layout.dim is None:
            return rescale_whole(tensors, self.matrix_shapes, rms)
        starts = (self.layout.shard_range(matrix.shape, self._shard)[0] for matrix in self.matrices)
        slices = [
            slices_of(tensor, matrix_shape, self.layout.dim, start)
            for tensor, matrix_shape, start in zip(tensors, self.matrix_shapes, starts, strict=True)
        ]
        return rescale_slices(tensors, slices, self.matrix_shapes, self.layout.shard_groups, rms)

    def add_traffic(self, traffic: wire.Traffic, rank: int, rescales: bool) -> None:
        """Count what a global rank sends and receives per step, when no direction has a zero."""
        if rank not in self.layout.ranks:
            return
        replica, shard = self.layout.coordinate_of(rank)
        for bucket in self.buckets:
            row = bucket.nbytes[replica]
            if self._shard_group:
                traffic.add_all_to_all("to owners", *self._shard_sizes(bucket, replica, shard), shard)
                traffic.add_all_to_all("directions", [row[shard]] * len(row), row, shard)
            if self._replica_group:
                traffic.add_all_gather("directions", [sum(each) for each in bucket.nbytes], replica)
        if rescales and self._shard_group:
            count = sum(batch for batch, _, _ in self.matrix_shapes)
            traffic.add_all_reduce("norms", 8 * count, self.layout.shards)

    def _carry(self, bucket: Bucket, tensors: Tensors, direction: Direction, results: Tensors) -> Generator:
        """Compute a bucket's directions into `results`, yielding while messages travel."""
        shards = self._send_shards(bucket, tensors)
        yield
        cut = self._directed(bucket, tensors, shards, direction)  # (W, k, entries)
        del shards
        received = yield from self._send_to_all(self.codec.write(cut), bucket.nbytes, "directions")
        counts = [len(mine) for row in bucket.owned for mine in row]
        dtype = tensors[bucket.members[0]].dtype
        pieces, flags = self.codec.read(received, counts, prod(bucket.piece), dtype)
        if any(flags):  # on every rank alike: the owners sent the same flags to all
            yield from self._send_zeros(bucket, cut, pieces, flags)
        for i, piece in zip(bucket.members, pieces, strict=True):
            piece = piece.view(bucket.piece)
            if self.layout.dim is not None:
                _, length = self.layout.shard_range(bucket.shape, self._shard)
                piece = piece.narrow(self.layout.dim, 0, length).contiguous()
            results[i] = piece

    def _shard_sizes(self, bucket: Bucket, replica: int, shard: int) -> tuple[list[int], list[int]]:
        """Return the bytes that a rank sends to, and receives from, each rank of its row for the owners to compute."""
        size = prod(bucket.piece) * self.to_owner_dtype.itemsize
        sizes_out = [len(mine) * size for mine in bucket.owned[replica]]
        return sizes_out, [sizes_out[shard]] * len(sizes_out)

    def _send_shards(self, bucket: Bucket, tensors: Tensors) -> wire.Pending | None:
        if not self._shard_group:
            return None
        dim, members = self.layout.dim, chain(*bucket.owned[self._replica])
        parts = [_lengthened(tensors[i], dim, bucket.piece[dim]).reshape(-1) for i in members]
        send = torch.cat([tensors[0].new_empty(0), *parts]).to(self.to_owner_dtype)
        sizes = self._shard_sizes(bucket, self._replica, self._shard)
        return wire.all_to_all(as_bytes(send), *sizes, self._shard_group, "to owners")

    def _whole(self, bucket: Bucket, tensors: Tensors, shards: wire.Pending | None) -> Tensor:
        """Return the whole tensors that this rank owns in a bucket: (k, *shape)."""
        mine, dim = bucket.owned[self._replica][self._shard], self.layout.dim
        if shards is None:
            return torch.stack([tensors[i] for i in mine]) if mine else tensors[0].new_empty(0, *bucket.shape)
        pieces = shards.wait().view(self.to_owner_dtype)
        pieces = pieces.view(self.layout.shards, len(mine), *bucket.piece)  # (W, k, *piece)
        side_by_side = pieces.movedim(0, dim + 1).flatten(dim + 1, dim + 2)  # (k, ..., W x longest, ...)
        return side_by_side.narrow(dim + 1, 0, bucket.shape[dim])

    def _directed(self, bucket: Bucket, tensors: Tensors, shards: wire.Pending | None, direction: Direction) -> Tensor:
        """Return the directions of the matrices that this rank owns, cut for the ranks of its row: (W, k, entries)."""
        whole = self._whole(bucket, tensors, shards)  # (k, *shape)
        _, m, n = bucket.matrix_shape
        directed = direction(whole.reshape(-1, m, n)).reshape(whole.shape) if len(whole) else whole
        dim, parts = self.layout.dim, self.layout.shards
        if dim is not None:
            directed = _lengthened(directed, dim + 1, parts * bucket.piece[dim], 1.0)  # with 1, a sign
            directed = directed.unflatten(dim + 1, (parts, bucket.piece[dim])).movedim(dim + 1, 0)
        return directed.reshape(parts, len(whole), prod(bucket.piece))

    def _send_to_all(self, messages: Tensor, nbytes: list[list[int]], kind: str) -> Generator[None, None, Tensor]:
        """Send my messages, uint8 (W, bytes), one per shard, to all holders of that shard; return those of all owners.

        nbytes: (R, W), of each owner's message to one rank.
        """
        row, mine = nbytes[self._replica], messages.view(-1)

        def along_replicas(received: Tensor) -> wire.Pending:
            return wire.all_gather_uneven(received, [sum(each) for each in nbytes], self._replica_group, kind)

        if self._shard_group:
            pending = wire.all_to_all(mine, [row[self._shard]] * len(row), row, self._shard_group, kind)
        else:
            pending = along_replicas(mine)
        yield
        if self._shard_group and self._replica_group:
            pending = along_replicas(pending.wait())
        yield
        return pending.wait()

    def _send_zeros(self, bucket: Bucket, cut: Tensor, pieces: list[Tensor], flags: list[int]) -> Generator:
        """Put zeros and NaN into the flagged pieces: owners send how many there are, then where."""
        owners = [(r, s) for r, row in enumerate(bucket.owned) for s, mine in enumerate(row) for _ in mine]
        flagged = [j for j, flag in enumerate(flags) if flag]
        own = [bool(flag) for owner, flag in zip(owners, flags, strict=True) if owner == (self._replica, self._shard)]
        cut = cut[:, own]  # (W, own flagged, entries)

        def to_all(messages: Tensor, lengths: list[int]) -> Generator[None, None, Tensor]:
            nbytes = [[0] * self.layout.shards for _ in self.layout.grid]
            for j, length in zip(flagged, lengths, strict=True):
                replica, shard = owners[j]
                nbytes[replica][shard] += length
            return self._send_to_all(messages, nbytes, "zeros")

        mine = most_zeros(cut)  # (own flagged,)
        counts = yield from to_all(as_bytes(mine).repeat(len(cut), 1), [4] * len(flagged))
        counts = counts.view(torch.int32).tolist()
        lengths = [zeros_nbytes(count, cut.shape[2]) for count in counts]
        messages = [write_zeros(cut[:, k], count) for k, count in enumerate(mine.tolist())]
        messages = torch.cat([cut.new_empty(len(cut), 0, dtype=torch.uint8), *messages], dim=1)
        received = yield from to_all(messages, lengths)
        for j, count, written in zip(flagged, counts, received.split(lengths), strict=True):
            read_zeros(pieces[j], written, count)


def _overlap(journeys: Iterable[Generator]) -> None:
    """Run generators to their ends: per turn, start one and advance all by one step, the youngest first."""
    waiting, running = list(journeys), []
    while waiting or running:
        running = waiting[:1] + running
        del waiting[:1]
        running = [each for each in running if next(each, "ended") is None]


def _lengthened(tensor: Tensor, dim: int, length: int, filler: float = 0.0) -> Tensor:
    """Return the tensor with a filler after it, up to this length of one dimension."""
    missing = length - tensor.shape[dim]
    return pad(tensor, [0, 0] * (tensor.ndim - 1 - dim) + [0, missing], value=filler) if missing else tensor
