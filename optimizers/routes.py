"""Routes: how a rule's direction, which needs whole matrices, is computed from the shards that this process holds.

A route serves parameters of one param group with one layout, bucket by bucket, so that the temporaries of a step are
those of a few buckets. It knows layouts, never rules.

    Elementwise      no direction to compute: any layout, nothing is sent
    Local            whole matrices in this process
    Gathered         every rank gathers every matrix: right for any DTensor, and the oracle of the others
    OwnerExchange    each matrix has an owner among the ranks, which computes it for all (exchange.py)
"""

from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from . import wire
from .layout import Layout
from .matrices import Blocks, factor_dtype, norms_of, scaled
from .rule import Tensors

# Entries of a stack: more gain nothing in speed, and its temporaries are about six times as large. A model of many
# more has larger stacks, so that it has at most about 40.
_STACK_ENTRIES, _STACKS, _TOGETHER = 2**25, 20, 2

Factor = Callable[[int, int], float]


class Update(Protocol):
    """One step of a route's parameters, by their indices; made by the engine.

    weights: this process's shards. has_grad: one per parameter. factor: (m, n) -> what the direction of such a matrix
    is multiplied by, or None. rms: the root mean square entry that each matrix is scaled to, or None. refines: whether
    `refine` does anything; matrices are then scaled after it.
    """

    weights: Tensors
    has_grad: list[bool]
    factor: Factor | None
    rms: float | None
    refines: bool

    def prepare(self, members: list[int]) -> Tensors:
        """Return the shards of the matrices whose directions are wanted; once per step and parameter."""
        ...

    def direct(self, stack: Tensor) -> Tensor:
        """Return the directions of whole matrices, (b, m, n) -> (b, m, n)."""
        ...

    def refine(self, members: list[int], directions: Tensors) -> Tensors:
        """Return the shards of the directions, refined elementwise."""
        ...

    def apply(self, members: list[int], directions: Tensors) -> None:
        """Write the weights that have a gradient."""
        ...


class Route(Protocol):
    """Steps some parameters.

    collective: whether other ranks take part, so that every rank must step all parameters, with a gradient or not.
    """

    collective: bool = False

    def run(self, update: Update) -> None:
        """Step the parameters."""
        ...

    def add_traffic(self, traffic: wire.Traffic, rank: int, rescales: bool, refines: bool) -> None:
        """Count the bytes that a global rank sends and receives per step while zeros fit into their messages.

        rescales, refines: whether the rule scales matrices, and refines directions.
        """
        return  # a route of one process sends nothing


class Elementwise(Route):
    """The route of rules without a direction."""

    def run(self, update: Update) -> None:
        indices = [i for i, has_grad in enumerate(update.has_grad) if has_grad]
        sizes = [weight.numel() for weight in update.weights]
        for members in _chunks(indices, sizes, _TOGETHER * _limit(sizes)):
            update.apply(members, update.refine(members, update.prepare(members)))


class Local(Route):
    """Whole matrices in this process: equal shapes are stacked and computed in one batch."""

    def __init__(self, blocks: list[Blocks]):
        self.blocks = blocks

    def run(self, update: Update) -> None:
        stacks = self._stacks(update)
        sizes = [sum(update.weights[i].numel() for i in members) for members in stacks]
        rms_after_direct = None if update.refines else update.rms
        # Elementwise work takes fewer launches on the members of several stacks.
        for some in _chunks(list(range(len(stacks))), sizes, _TOGETHER * _limit(sizes)):
            chosen = [stacks[j] for j in some]
            members = [*chain(*chosen)]
            tensors = list(update.prepare(members))
            tensors = self._each(
                chosen,
                tensors,
                lambda stack: rescaled(update.direct(stack), rms_after_direct, stack.dtype, update.factor),
            )
            if update.refines:
                tensors = list(update.refine(members, tensors))
                if update.rms is not None:
                    tensors = self._each(chosen, tensors, lambda stack: rescaled(stack, update.rms, stack.dtype))
            update.apply(members, tensors)

    def _each(self, stacks: list[list[int]], tensors: Tensors, function: Callable[[Tensor], Tensor]) -> Tensors:
        """Apply (b, m, n) -> (b, m, n) to the matrices of each stack of tensors, whose list is emptied to free them."""
        results = []
        for members in stacks:
            blocks, mine = [self.blocks[i] for i in members], tensors[: len(members)]
            del tensors[: len(members)]
            shapes, joined = [tensor.shape for tensor in mine], join(mine, blocks)
            del mine
            results += split([function(stack) for stack in joined], blocks, shapes)
        return results

    def _stacks(self, update: Update) -> list[list[int]]:
        """Indices of parameters to stack: of equal shapes of matrices, dtype and device."""
        alike = defaultdict(list)
        for i, weight in enumerate(update.weights):
            if update.has_grad[i] and weight.numel():  # an empty shard of a batch has no direction
                alike[tuple(self.blocks[i].shape_counts), weight.dtype, weight.device].append(i)
        sizes = [weight.numel() for weight in update.weights]
        return [chunk for members in alike.values() for chunk in _chunks(members, sizes, _limit(sizes))]


class Gathered(Route):
    """Every rank gathers every matrix and computes it: right for any DTensor, at the price of all ranks' time.

    The transport is DTensor's own, so its bytes are worked out from the shapes. Matrices travel in `to_owner_dtype`.
    """

    collective = True

    def __init__(self, params: list[DTensor], blocks: list[Blocks], layout: Layout, to_owner_dtype: torch.dtype):
        self.blocks, self.layout, self.to_owner_dtype = blocks, layout, to_owner_dtype
        self._mesh, self._placements = params[0].device_mesh, params[0].placements
        self._sizes = [(param.shape, param.stride()) for param in params]
        self._itemsize = params[0].element_size()
        self._missing = [param.numel() - param.to_local().numel() for param in params]  # entries of other ranks
        alike = defaultdict(list)
        for i, each in enumerate(blocks):
            alike[tuple(each.shape_counts)].append(i)
        sizes = [param.numel() for param in params]
        self._stacks = [chunk for members in alike.values() for chunk in _chunks(members, sizes, _STACK_ENTRIES)]

    def run(self, update: Update) -> None:
        for members in self._stacks:
            shards = update.prepare(members)
            dtype = shards[0].dtype
            wholes = self._gather(members, [shard.to(self.to_owner_dtype) for shard in shards])
            rms = None if update.refines else update.rms
            stacks = join(wholes, [self.blocks[i] for i in members])
            directed = [rescaled(update.direct(stack), rms, dtype, update.factor) for stack in stacks]
            directions = self._shards(members, directed)
            if update.refines:
                directions = update.refine(members, directions)
                if update.rms is not None:
                    directions = self._rescale(members, directions, update.rms)
            update.apply(members, directions)

    def add_traffic(self, traffic: wire.Traffic, rank: int, rescales: bool, refines: bool) -> None:
        """Count what this rank, taken for any, gathers per step."""
        if rank not in self.layout.ranks:
            return
        for members in self._stacks:
            again = rescales and refines and self._hides_rows(members)
            size = sum(self._missing[i] for i in members) * (self.to_owner_dtype.itemsize + again * self._itemsize)
            traffic.add("gather", size, size)
            for group in self.layout.shard_groups if rescales and refines and not again else ():
                traffic.add_all_reduce("norms", 8 * len(members), dist.get_world_size(group))

    def _hides_rows(self, members: list[int]) -> bool:
        """Whether a tensor has several matrices: DTensor does not expose which of their rows a rank has."""
        return any(self.blocks[i].count > 1 for i in members)

    def _rescale(self, members: list[int], directions: Tensors, rms: float) -> Tensors:
        blocks, dtype = [self.blocks[i] for i in members], directions[0].dtype
        if self._hides_rows(members):
            stacks = join(self._gather(members, directions), blocks)
            return self._shards(members, [rescaled(stack, rms, dtype) for stack in stacks])
        squares = torch.cat([norms_of(each.reshape(1, -1), torch.float64) for each in directions]).square()
        for group in self.layout.shard_groups:
            wire.all_reduce(squares, group, "norms")
        wanted = rms * (blocks[0].rows * blocks[0].columns) ** 0.5
        norms = squares.sqrt().split(1)
        return [scaled(each[None], norm, wanted, dtype)[0] for each, norm in zip(directions, norms, strict=True)]

    def _gather(self, members: list[int], shards: Tensors) -> Tensors:
        size = sum(self._missing[i] for i in members) * shards[0].element_size()
        wire.count("gather", size, size)
        return [
            DTensor.from_local(shard, self._mesh, self._placements, run_check=False, shape=shape, stride=stride)
            .full_tensor()
            .contiguous()
            for shard, (shape, stride) in zip(shards, (self._sizes[i] for i in members), strict=True)
        ]

    def _shards(self, members: list[int], stacks: Tensors) -> Tensors:
        everywhere = [Replicate()] * self._mesh.ndim
        return [
            DTensor.from_local(whole, self._mesh, everywhere, run_check=False)
            .redistribute(placements=self._placements)  # from a replica this is a cut, and sends nothing
            .to_local()
            for whole in split(stacks, [self.blocks[i] for i in members], [self._sizes[i][0] for i in members])
        ]


def join(tensors: Tensors, blocks: list[Blocks]) -> Tensors:
    """Stack the matrices of tensors that have the same shapes of them: (b, m, n) for each shape."""
    stacks = zip(*(each.stacks(tensor[None]) for tensor, each in zip(tensors, blocks, strict=True)), strict=True)
    return [torch.cat(stack) for stack in stacks]


def split(stacks: Tensors, blocks: list[Blocks], shapes: list) -> Tensors:
    """Return the tensors that contiguous stacks (b, m, n) were joined from: views of them where blocks are equal."""
    counts = zip(*(each.shape_counts.values() for each in blocks), strict=True)
    parts = zip(*(stack.split(count) for stack, count in zip(stacks, counts, strict=True)), strict=True)
    return [each.join(mine).view(shape) for mine, each, shape in zip(parts, blocks, shapes, strict=True)]


def rescaled(stack: Tensor, rms: float | None, dtype: torch.dtype, factor: Factor | None = None) -> Tensor:
    """Return (b, m, n), contiguous, in `dtype`: each matrix scaled to a root mean square entry, times the factor."""
    _, m, n = stack.shape
    if rms is None:
        stack = stack.to(dtype, memory_format=torch.contiguous_format).contiguous()
    else:
        stack = scaled(stack, norms_of(stack, factor_dtype(dtype)), rms * (m * n) ** 0.5, dtype)
    wanted = factor(m, n) if factor else 1
    return stack if wanted == 1 else stack.mul_(wanted)


def _limit(sizes: list[int]) -> int:
    """Return the most entries of a stack, for whole tensors of these sizes in this process."""
    return max(_STACK_ENTRIES, sum(sizes) // _STACKS)


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
