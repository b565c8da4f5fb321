"""The collectives that the routes use, asynchronous, and a counter of the bytes they move.

    with count_bytes() as traffic:
        optimizer.step()
    print(traffic.received)      # {"to owners": ..., "directions": ...}, bytes that this rank received

Nothing is counted outside such a block. Bytes that a rank sends to itself are not counted; an all-reduce of b bytes
over W ranks counts 2 (W - 1) / W b each way, the bytes of a ring; a reduce to one rank counts those of a chain that
ends there, b out of each other rank.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

# Shards to the owners of matrices, directions back, planes of zeros and NaN in them, norms, sums of squares per row;
# gradients, where this package reduces them (to_owners.py); maxima of rows in int8.
KINDS = ("to owners", "directions", "zeros", "norms", "rows", "gradients", "scales")


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

    def add_all_to_all(self, kind: str, counts_out: list[int], counts_in: list[int], me: int, size: int) -> None:
        """Count an all-to-all on group rank `me`, which sends counts_out[q] rows of `size` bytes to each rank q."""
        self.add(kind, size * (sum(counts_out) - counts_out[me]), size * (sum(counts_in) - counts_in[me]))

    def add_all_reduce(self, kind: str, size: int, ranks: int) -> None:
        """Count an all-reduce of `size` bytes."""
        self.add(kind, ring_bytes(size, ranks), ring_bytes(size, ranks))

    def add_reduce(self, kind: str, size: int, me: int, to: int, ranks: int) -> None:
        """Count a reduce of `size` bytes to group rank `to`: a chain of all ranks, from the one after it to it."""
        self.add(kind, size * (me != to), size * (me != (to + 1) % ranks))


_counting: list[Traffic] = []  # the open blocks of count_bytes, of the whole process


@contextlib.contextmanager
def count_bytes() -> Iterator[Traffic]:
    """Count the bytes that the optimizers of this process send and receive inside the block."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting[:] = [each for each in _counting if each is not traffic]  # equal ones may be nested


class Pending:
    """Rows in transit: `wait` returns them once received."""

    def __init__(self, received: Tensor, work: dist.Work | None = None, source: Tensor | None = None):
        self._received, self._work = received, work
        self._source = source  # must live as long as the collective reads it

    def wait(self) -> Tensor:
        """Return the received rows (n, ...)."""
        if self._work is not None:
            self._work.wait()
        self._source = None
        return self._received


def all_to_all(
    rows: Tensor, counts_out: list[int], counts_in: list[int], group: dist.ProcessGroup | None, kind: str
) -> Pending:
    """Send counts_out[q] of the rows to each group rank q, in order, and receive counts_in[q] from it.

    Without a group they stay here.
    """
    if group is None:
        return Pending(rows)
    for traffic in _counting:
        size = rows.element_size() * rows.shape[1]
        traffic.add_all_to_all(kind, counts_out, counts_in, dist.get_rank(group), size)
    received = rows.new_empty(sum(counts_in), rows.shape[1])
    # As bytes: gloo and NCCL know few dtypes.
    out, sent = (each.view(torch.uint8) for each in (received, rows.contiguous()))
    work = dist.all_to_all_single(out, sent, counts_in, counts_out, group=group, async_op=True)
    return Pending(received, work, sent)


def all_reduce(values: Tensor, groups: Iterable[dist.ProcessGroup], kind: str, operation: Any = None) -> Tensor:
    """Sum over groups, one after another, in place; or apply another operation of dist.ReduceOp."""
    for group in groups:
        for traffic in _counting:
            traffic.add_all_reduce(kind, values.nbytes, dist.get_world_size(group))
        dist.all_reduce(values, operation or dist.ReduceOp.SUM, group=group)
    return values


def start_all_reduce(values: Tensor, group: dist.ProcessGroup, kind: str) -> dist.Work:
    """Start to sum over a group, in place."""
    for traffic in _counting:
        traffic.add_all_reduce(kind, values.nbytes, dist.get_world_size(group))
    return cast(dist.Work, dist.all_reduce(values, group=group, async_op=True))


def reduce(values: Tensor, to: int, group: dist.ProcessGroup, kind: str) -> dist.Work:
    """Start to sum over a group on the global rank `to`, in place; other ranks' values become meaningless."""
    for traffic in _counting:
        ranks = dist.get_process_group_ranks(group)
        traffic.add_reduce(kind, values.nbytes, dist.get_rank(group), ranks.index(to), len(ranks))
    return cast(dist.Work, dist.reduce(values, to, group=group, async_op=True))


def ring_bytes(size: int, ranks: int) -> int:
    """Return the bytes that an all-reduce of `size` bytes sends, and receives, on each rank of a ring."""
    return 2 * (ranks - 1) * size // ranks
