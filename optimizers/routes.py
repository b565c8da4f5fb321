"""Routes: computation of a rule's direction, which needs whole matrices, from the shards of this process.

A route serves parameters of one param group with one layout, bucket by bucket, so that the temporaries of a step are
those of a few buckets. It knows layouts, and a rule only by the fields of `UpdateRule`.

    Local            whole matrices in this process, or a rule without a direction: nothing is sent
    OwnerExchange    each matrix has an owner among the ranks, which computes it for all (exchange.py)
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import wire
from .elementwise import each
from .matrices import Blocks, multiplied, products_of, to_rms
from .rule import Tensors, UpdateRule
from .update import Update

# Entries of a stack: larger ones are no faster, and temporaries are about six times as large. A model of many more
# entries has larger stacks, at most about 40.
_STACK_ENTRIES, _STACKS, _TOGETHER = 2**25, 20, 2


@dataclass
class Entry:
    """One parameter of the plan; the fields after `rule` are of matrices, None for elementwise rules.

    layout: None if this process needs no other. whole: the shape of the tensor that the ranks of the layout hold
    together. blocks: its matrices. owner: a global rank. flops: of its direction. to_owner_dtype: of its shards sent to
    the owner; to_owner_codec: None sends them as they are. codec: of the direction sent back. floats: the numbers sent
    with the direction, one per matrix, if the rule needs them. row_dims: the leading dimensions that count rows of
    matrices. owner_only: whether the owner alone gets the gradient. coded: its buffers in int8. scales: (bytes, ranks)
    of the all-reduces of their rows' maxima, of this rank's shard.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    layout: Any = None
    whole: tuple[int, ...] = ()
    blocks: Any = None
    owner: int | None = None
    flops: float = 0.0
    grad_dtype: Any = None
    to_owner_dtype: Any = None
    to_owner_codec: Any = None
    codec: Any = None
    floats: int = 0
    row_dims: int = 0
    owner_only: bool = False
    coded: int = 0
    scales: Any = ()

    @property
    def route(self) -> str:
        """local, replicated, sharded or hsdp."""
        return self.layout.kind if self.layout else "local"

    @property
    def outline(self) -> str:
        """The properties that determine the messages between ranks about it."""
        sent = f"{self.to_owner_codec or self.to_owner_dtype} to owners, directions in {self.codec}"
        sent += ", gradients to owners" if self.owner_only else ""
        return f"{self.name} {self.shape} as {self.blocks}, {self.rule}, {self.route}, {sent}"

    @property
    def direction_bytes(self) -> int:
        """Bytes of the whole direction in messages, if it has no zero; 0 if nothing is sent."""
        return 0 if self.owner is None else self.codec.nbytes(prod(self.whole), self.floats)


class Route:
    """Steps the parameters of one param group with equal layout, dtypes of messages and codec.

    Args:
        rule: of the group.
        indices: of the parameters in their group; everything else here is in their order.
        entries: of the parameters in the plan.
    """

    def __init__(self, rule: UpdateRule, indices: list[int], entries: list[Entry]):
        self.rule, self.indices, self.entries = rule, indices, entries
        self.blocks = [entry.blocks for entry in entries]

    def of(self, rule: UpdateRule) -> "Route":
        """Return the route of a step by this rule: an elementwise one of the same group needs no other rank."""
        return self if rule is self.rule else Local(rule, self.indices, self.entries)

    def run(self, update: Update) -> list[Any]:
        """Step the parameters; return what `exchange.finish_all` has to do once all routes have run."""
        raise NotImplementedError

    def add_traffic(self, traffic: wire.Traffic, rank: int) -> None:
        """Count the bytes that a global rank sends and receives per step if zeros fit into their messages."""


class Local(Route):
    """Steps in this process: equal matrices are stacked and computed in one batch."""

    def run(self, update: Update) -> list[Any]:
        if self.rule.whole_step:
            update.whole_step()
            return []
        weights, sizes = update.weights, [weight.numel() for weight in update.weights]
        limit = max(_STACK_ENTRIES, sum(sizes) // _STACKS)
        alike = defaultdict(list)
        for i, blocks in enumerate(self.blocks):
            # An empty shard of a batch has no direction; elementwise, it takes part in the maxima of rows.
            if update.has_grad[i] and (sizes[i] or not self.rule.direct):
                alike[blocks and tuple(blocks.shape_counts), weights[i].dtype, weights[i].device].append(i)
        stacks = [chunk for members in alike.values() for chunk in _chunks(members, sizes, limit)]
        stack_sizes = [sum(sizes[i] for i in members) for members in stacks]
        # Elementwise work takes fewer launches on the members of several stacks.
        for some in _chunks(list(range(len(stacks))), stack_sizes, _TOGETHER * limit):
            chosen = [stacks[j] for j in some]
            members, sizes = [*chain(*chosen)], []
            directions = self._direct(chosen, update, members, sizes)
            update.finish(members, directions, partial(self._rescale, chosen), partial(self._multiply, chosen, sizes))
            del directions  # before the next are computed
        return []

    def add_traffic(self, traffic: wire.Traffic, rank: int) -> None:
        for size, ranks in chain(*(entry.scales for entry in self.entries)):
            traffic.add_all_reduce("scales", size, ranks)

    def _direct(self, stacks: list[list[int]], update: Update, members: list[int], sizes: Tensors) -> Tensors:
        """Return directions; of a sized rule, append the numbers of each stack to `sizes`."""

        def directed(stack: Tensor) -> Tensor:
            directions = update.directions(stack)
            if self.rule.sized:
                sizes.append(products_of(stack, directions))
            return directions

        prepared = list(update.prepare(members))
        if self.rule.direct:
            return self._each(stacks, directed, prepared)
        factor = update.factor()
        return prepared if factor == 1 else each("mul_", prepared, factor)

    def _multiply(self, stacks: list[list[int]], sizes: Tensors, tensors: Tensors) -> Tensors:
        of_stack = iter(sizes)
        return self._each(stacks, lambda stack: multiplied(stack, next(of_stack), stack.dtype), tensors)

    def _rescale(self, stacks: list[list[int]], tensors: Tensors, rms: float) -> Tensors:
        return self._each(stacks, lambda stack: to_rms(stack, rms, stack.dtype), tensors)

    def _each(self, stacks: list[list[int]], function: Callable[[Tensor], Tensor], tensors: Tensors) -> Tensors:
        """Apply (b, m, n) -> (b, m, n) to the matrices of each stack of tensors, whose list is emptied to free them."""
        results = []
        for members in stacks:
            blocks, mine = [self.blocks[i] for i in members], tensors[: len(members)]
            del tensors[: len(members)]
            shapes, joined = [tensor.shape for tensor in mine], join(mine, blocks)
            del mine
            results += split([function(stack) for stack in joined], blocks, shapes)
        return results


def join(tensors: Tensors, blocks: list[Blocks]) -> Tensors:
    """Stack the matrices of tensors that have the same shapes of them: (b, m, n) for each shape."""
    stacks = zip(*(each.stacks(tensor[None]) for tensor, each in zip(tensors, blocks, strict=True)), strict=True)
    return [torch.cat(stack) for stack in stacks]


def split(stacks: Tensors, blocks: list[Blocks], shapes: list) -> Tensors:
    """Return the tensors that contiguous stacks (b, m, n) were joined from: views of them if blocks are equal."""
    counts = zip(*(each.shape_counts.values() for each in blocks), strict=True)
    parts = zip(*(stack.split(count) for stack, count in zip(stacks, counts, strict=True)), strict=True)
    return [each.join(mine).view(shape) for mine, each, shape in zip(parts, blocks, shapes, strict=True)]


def _chunks(indices: list[int], sizes: list[int], limit: int) -> list[list[int]]:
    """Divide indices, in order, so that the sizes of a chunk add up to the limit at most, or it has one index."""
    chunks, total = [], 0
    for i in indices:
        if not chunks or total + sizes[i] > limit:
            chunks.append([])
            total = 0
        chunks[-1].append(i)
        total += sizes[i]
    return chunks
