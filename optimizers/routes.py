"""Routes: computation of a rule's direction, which needs whole matrices, from the shards of this process.

A route serves parameters of one param group with one layout, bucket by bucket, so that the temporaries of a step are
those of a few buckets. It knows layouts, never rules.

    Local            whole matrices in this process, or a rule without a direction: nothing is sent
    Gathered         every rank gathers every matrix: for any DTensor, and the reference of the other routes
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
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from . import wire
from .elementwise import each
from .matrices import Blocks, multiplied, norms_of, products_of, scaled, to_rms
from .rule import Tensors, UpdateRule
from .update import Update

# Entries of a stack: larger ones are no faster, and temporaries are about six times as large. A model of many more
# entries has larger stacks, at most about 40.
_STACK_ENTRIES, _STACKS, _TOGETHER = 2**25, 20, 2


@dataclass
class Entry:
    """One parameter of the plan; the fields after `rule` are of matrices, None for elementwise rules.

    blocks: the matrices that it is treated as. layout: None if this process needs no other. owner: a global rank.
    flops: of its direction. to_owner_dtype: of its shards sent to the owner. codec: of the direction sent back.
    floats: the numbers sent with the direction, one per matrix, if the rule needs them. row_dims: the leading
    dimensions that count rows of matrices.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    blocks: Any = None
    layout: Any = None
    owner: int | None = None
    flops: float = 0.0
    grad_dtype: Any = None
    to_owner_dtype: Any = None
    codec: Any = None
    floats: int = 0
    row_dims: int = 0

    @property
    def route(self) -> str:
        """local, replicated, sharded, hsdp or gathered."""
        return self.layout.kind if self.layout else "local"

    @property
    def outline(self) -> str:
        """The properties that determine the messages between ranks about it."""
        sent = f"{self.to_owner_dtype} to owners, directions in {self.codec}"
        return f"{self.name} {self.shape} as {self.blocks}, {self.rule}, {self.route}, {sent}"

    @property
    def direction_bytes(self) -> int:
        """Bytes of the whole direction in messages, if it has no zero; 0 if nothing is sent."""
        return 0 if self.owner is None else self.codec.nbytes(prod(self.shape), self.floats)


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

    def run(self, update: Update) -> None:
        """Step the parameters."""
        raise NotImplementedError

    def add_traffic(self, traffic: wire.Traffic, rank: int) -> None:
        """Count the bytes that a global rank sends and receives per step if zeros fit into their messages."""


class Local(Route):
    """Steps in this process: equal matrices are stacked and computed in one batch."""

    def run(self, update: Update) -> None:
        if self.rule.whole_step:
            return update.whole_step()
        weights, sizes = update.weights, [weight.numel() for weight in update.weights]
        limit = max(_STACK_ENTRIES, sum(sizes) // _STACKS)
        alike = defaultdict(list)
        for i, blocks in enumerate(self.blocks):
            if update.has_grad[i] and sizes[i]:  # an empty shard of a batch has no direction
                alike[blocks and tuple(blocks.shape_counts), weights[i].dtype, weights[i].device].append(i)
        stacks = [chunk for members in alike.values() for chunk in _chunks(members, sizes, limit)]
        stack_sizes = [sum(sizes[i] for i in members) for members in stacks]
        # Elementwise work takes fewer launches on the members of several stacks.
        for some in _chunks(list(range(len(stacks))), stack_sizes, _TOGETHER * limit):
            chosen = [stacks[j] for j in some]
            members, sizes = [*chain(*chosen)], []
            directions = self._direct(chosen, update, members, sizes)
            update.finish(members, directions, partial(self._rescale, chosen), partial(self._multiply, chosen, sizes))

    def _direct(self, stacks: list[list[int]], update: Update, members: list[int], sizes: Tensors) -> Tensors:
        """Return directions; of a sized rule, append the numbers of each stack to `sizes`."""

        def directed(stack: Tensor) -> Tensor:
            directions = update.directions(stack)
            if self.rule.sized:
                sizes.append(products_of(stack, directions))
            return directions

        prepared = update.prepare(members)
        if self.rule.direct:
            return self._each(stacks, directed, list(prepared))
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


class Gathered(Route):
    """Every rank gathers and computes every matrix: for any DTensor, at the cost of every rank's time.

    DTensor moves the data, so the bytes are computed from the shapes. Matrices are sent in their entry's
    `to_owner_dtype`.
    """

    def __init__(self, rule: UpdateRule, indices: list[int], entries: list[Entry], params: list[DTensor]):
        super().__init__(rule, indices, entries)
        self.layout, self.to_owner_dtype = entries[0].layout, entries[0].to_owner_dtype
        self._itemsize = params[0].element_size()
        self._missing = [param.numel() - param.to_local().numel() for param in params]  # entries of other ranks
        dims = [entry.row_dims for entry in entries]
        self._across_columns = [_cut_beyond(first, param) for first, param in zip(dims, params, strict=True)]
        self._rows = [prod(param.to_local().shape[:first]) for first, param in zip(dims, params, strict=True)]
        alike = defaultdict(list)
        for i, blocks in enumerate(self.blocks):
            alike[tuple(blocks.shape_counts)].append(i)
        sizes = [param.numel() for param in params]
        self._stacks = [chunk for members in alike.values() for chunk in _chunks(members, sizes, _STACK_ENTRIES)]

    def run(self, update: Update) -> None:
        for members in self._stacks:
            params, blocks = [update.params[i] for i in members], [self.blocks[i] for i in members]
            shards = update.prepare(members)
            dtype = shards[0].dtype
            wholes = self._gather(params, members, [shard.to(self.to_owner_dtype) for shard in shards])
            stacks = join(wholes, blocks)
            del wholes
            directed = [update.directions(stack, dtype) for stack in stacks]
            sizes = [products_of(*pair) for pair in zip(stacks, directed, strict=True)] if self.rule.sized else []
            update.finish(
                members,
                _cut(params, blocks, directed),
                partial(self._rescale, params, members),
                partial(_multiply, params, blocks, directed, sizes),
                partial(self._sum_rows, members),
            )

    def add_traffic(self, traffic: wire.Traffic, rank: int) -> None:
        """Count the bytes that this rank, as an example of all, gathers per step."""
        if rank not in self.layout.ranks:
            return
        for members in self._stacks:
            again = self.rule.scales_refined and self._hides_rows(members)
            size = sum(self._missing[i] for i in members) * (self.to_owner_dtype.itemsize + again * self._itemsize)
            traffic.add("gather", size, size)
            for group in self.layout.shard_groups if self.rule.scales_refined and not again else ():
                traffic.add_all_reduce("norms", 8 * len(members), dist.get_world_size(group))
            for i in members if self.rule.rows else ():
                for group in self._across_columns[i]:
                    traffic.add_all_reduce("rows", 8 * self._rows[i], dist.get_world_size(group))

    def _sum_rows(self, members: list[int], sums: Tensors) -> Tensors:
        for i, mine in zip(members, sums, strict=True):
            wire.all_reduce(mine, self._across_columns[i], "rows")
        return sums

    def _hides_rows(self, members: list[int]) -> bool:
        """Return whether a tensor has several matrices: DTensor does not expose which of their rows a rank has."""
        return any(self.blocks[i].count > 1 for i in members)

    def _rescale(self, params: list[DTensor], members: list[int], directions: Tensors, rms: float) -> Tensors:
        blocks, dtype = [self.blocks[i] for i in members], directions[0].dtype
        if self._hides_rows(members):
            stacks = join(self._gather(params, members, directions), blocks)
            return _cut(params, blocks, [to_rms(stack, rms, dtype) for stack in stacks])
        squares = torch.cat([norms_of(each.reshape(1, -1), torch.float64) for each in directions]).square()
        norms = wire.all_reduce(squares, self.layout.shard_groups, "norms").sqrt().split(1)
        wanted = rms * (blocks[0].rows * blocks[0].columns) ** 0.5
        return [scaled(each[None], norm, wanted, dtype)[0] for each, norm in zip(directions, norms, strict=True)]

    def _gather(self, params: list[DTensor], members: list[int], shards: Tensors) -> Tensors:
        size = sum(self._missing[i] for i in members) * shards[0].element_size()
        wire.count("gather", size, size)
        return [
            _dtensor(shard, param, param.placements).full_tensor() for shard, param in zip(shards, params, strict=True)
        ]


def _cut_beyond(dims: int, param: DTensor) -> tuple[dist.ProcessGroup, ...]:
    """Return the groups along which a parameter is cut in dimensions after the first `dims`."""
    axes = [axis for axis, each in enumerate(param.placements) if getattr(each, "dim", -1) >= dims]  # -1: a replica
    return tuple(param.device_mesh.get_group(axis) for axis in axes)


def _multiply(params: list[DTensor], blocks: list[Blocks], stacks: Tensors, sizes: Tensors, shards: Tensors) -> Tensors:
    """Multiply shards by the numbers (b,) of the matrices of stacks, which all ranks have."""
    spread = [size[:, None, None].expand(stack.shape).contiguous() for size, stack in zip(sizes, stacks, strict=True)]
    # In float32 or wider, as `multiplied` does on other layouts.
    precision = torch.promote_types(shards[0].dtype, torch.float32)
    factors = [cut.to(precision) for cut in _cut(params, blocks, spread)]
    return [(shard * factor).to(shard.dtype) for shard, factor in zip(shards, factors, strict=True)]


def _dtensor(local: Tensor, param: DTensor, placements) -> DTensor:
    """Return the DTensor of a parameter's shape of which this rank holds `local`."""
    lie: dict[str, Any] = {"run_check": False, "shape": param.shape, "stride": param.stride()}
    return DTensor.from_local(local, param.device_mesh, placements, **lie)


def _cut(params: list[DTensor], blocks: list[Blocks], stacks: Tensors) -> Tensors:
    """Return this rank's shards of the tensors in stacks (b, m, n) that all ranks have; nothing is sent."""
    wholes = zip(split(stacks, blocks, [param.shape for param in params]), params, strict=True)
    return [
        _dtensor(whole, param, [Replicate()] * param.device_mesh.ndim)
        .redistribute(placements=param.placements)
        .to_local()
        for whole, param in wholes
    ]


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
