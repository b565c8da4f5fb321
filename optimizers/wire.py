"""The collectives that the routes use, asynchronous, and a counter of the bytes they move.

    with count_bytes() as traffic:
        optimizer.step()
    print(traffic.received)      # {"to owners": ..., "directions": ...}, bytes that came to this rank

Nothing is counted outside such a block. Bytes that a rank sends to itself are not counted; an all-reduce of b bytes
over W ranks counts 2 (W - 1) / W b each way, which is what a ring moves.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

# Shards to the owners of matrices, directions back, positions of zeros and NaN in them, norms, whole gathers.
KINDS = ("to owners", "directions", "zeros", "norms", "gather")


@dataclass
class Traffic:
    """Bytes that this rank sent and received, by kind (`KINDS`)."""

    sent: Counter = field(default_factory=Counter)
    received: Counter = field(default_factory=Counter)

    @property
    def total_sent(self) -> int:
        """All bytes that this rank sent."""
        return self.sent.total()

    @property
    def total_received(self) -> int:
        """All bytes that this rank received."""
        return self.received.total()

    def add(self, kind: str, sent: int, received: int) -> None:
        """Count one message or several."""
        if sent:
            self.sent[kind] += sent
        if received:
            self.received[kind] += received

    def add_all_to_all(self, kind: str, sizes_out: list[int], sizes_in: list[int], me: int) -> None:
        """Count an all-to-all on group rank `me`, which sends sizes_out[q] bytes to rank q and gets sizes_in[q]."""
        self.add(kind, sum(sizes_out) - sizes_out[me], sum(sizes_in) - sizes_in[me])

    def add_all_gather(self, kind: str, sizes: list[int], me: int) -> None:
        """Count an all-gather on group rank `me`, to which each rank q gives sizes[q] bytes."""
        self.add(kind, sizes[me] * (len(sizes) - 1), sum(sizes) - sizes[me])

    def add_all_reduce(self, kind: str, size: int, ranks: int) -> None:
        """Count an all-reduce of `size` bytes."""
        self.add(kind, ring_bytes(size, ranks), ring_bytes(size, ranks))


_counting: list[Traffic] = []  # the open blocks of count_bytes, of the whole process


@contextlib.contextmanager
def count_bytes() -> Iterator[Traffic]:
    """Count what the optimizers of this process send and receive inside the block."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting[:] = [each for each in _counting if each is not traffic]  # equal ones may be nested


def count(kind: str, sent: int, received: int) -> None:
    """Add to every open block."""
    for traffic in _counting:
        traffic.add(kind, sent, received)


class Pending:
    """Bytes on their way: `wait` returns them once they have come."""

    def __init__(self, buffer: Tensor, works: list[dist.Work], source: Tensor | None = None):
        self._buffer, self._works = buffer, works
        self._source = source  # must live as long as the collective reads it

    def wait(self) -> Tensor:
        """Return the received bytes, uint8 (n,)."""
        for work in self._works:
            work.wait()
        self._source = None
        return self._buffer


def all_to_all(send: Tensor, sizes_out: list[int], sizes_in: list[int], group: dist.ProcessGroup, kind: str) -> Pending:
    """Send sizes_out[q] bytes of `send` to each group rank q, and receive sizes_in[q] from it."""
    for traffic in _counting:
        traffic.add_all_to_all(kind, sizes_out, sizes_in, dist.get_rank(group))
    received = send.new_empty(sum(sizes_in))
    work = dist.all_to_all_single(received, send, sizes_in, sizes_out, group=group, async_op=True)
    return Pending(received, [work], send)


def all_gather_uneven(mine: Tensor, sizes: list[int], group: dist.ProcessGroup, kind: str) -> Pending:
    """Give my bytes to every rank of the group, and receive sizes[q] from each group rank q, side by side.

    One broadcast per sender: an all-gather would need equal sizes, and ranks without anything send nothing, so there
    are never more broadcasts than matrices.
    """
    me = dist.get_rank(group)
    for traffic in _counting:
        traffic.add_all_gather(kind, sizes, me)
    received = mine.new_empty(sum(sizes))
    works = []
    for sender, part in enumerate(received.split(sizes)):
        if sizes[sender]:
            if sender == me:
                part.copy_(mine)
            works.append(dist.broadcast(part, group=group, group_src=sender, async_op=True))
    return Pending(received, works)


def all_reduce(values: Tensor, group: dist.ProcessGroup, kind: str) -> Tensor:
    """Sum over the group, in place."""
    for traffic in _counting:
        traffic.add_all_reduce(kind, values.nbytes, dist.get_world_size(group))
    dist.all_reduce(values, group=group)
    return values


def ring_bytes(size: int, ranks: int) -> int:
    """Return the bytes that an all-reduce of `size` bytes sends, and receives, on each rank of a ring."""
    return 2 * (ranks - 1) * size // ranks
