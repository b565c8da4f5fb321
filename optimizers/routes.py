"""Routes: how a rule's direction, which needs whole matrices, is computed from the shards that this process holds.

A route serves parameters of one param group with one layout, and knows layouts, never rules.

    Elementwise      no direction to compute: any layout, nothing is sent
    Local            whole matrices in this process
    OwnerExchange    each matrix has an owner among the ranks, which computes it for all: replicated, sharded and hsdp
    Gathered         every rank gathers every matrix: right for any DTensor, and the oracle of the others
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import compress
from math import prod
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from . import wire
from .layout import Layout
from .rule import Tensors

_STACK_LIMIT = 2**27  # entries stacked at once (512 MiB in fp32): past that a larger batch is no faster

Direction = Callable[[Tensor], Tensor]  # (batch, m, n) -> (batch, m, n)
MatrixShape = tuple[int, int, int]  # (batch, m, n) that a tensor is treated as
MatrixSlice = tuple[slice, Tensor]  # a range of the matrices of a batch, and their entries here (b, entries)


class Route(Protocol):
    """Computes the directions of some parameters from this process's shards of them.

    collective: whether other ranks take part, so that every rank must step all parameters, with a gradient or not.
    matrix_shapes: one per parameter; None for elementwise rules.
    """

    collective: bool = False
    matrix_shapes: list[MatrixShape] | None = None

    def subset(self, keep: list[bool]) -> "Route":
        """Return the route of some of the parameters; for routes that are not collective."""
        ...

    def direct(self, tensors: Tensors, direction: Direction) -> Tensors:
        """Return this process's shards of direction(matrices), in each tensor's shape and dtype."""
        ...

    def rescale(self, tensors: Tensors, rms: float) -> Tensors:
        """Scale each matrix to this root mean square entry, possibly in place; a zero matrix stays zero."""
        ...

    def add_traffic(self, traffic: wire.Traffic, rank: int, rescales: bool) -> None:
        """Count the bytes that a global rank sends and receives per step, when no direction has a zero."""
        ...


class Elementwise(Route):
    """The route of rules without a direction."""

    def subset(self, keep: list[bool]) -> "Elementwise":
        return self

    def direct(self, tensors: Tensors, direction: Direction) -> Tensors:
        return tensors


class Local(Route):
    """Whole matrices in this process: equal shapes are stacked and computed in one batch."""

    def __init__(self, matrix_shapes: list[MatrixShape]):
        self.matrix_shapes = matrix_shapes

    def subset(self, keep: list[bool]) -> "Local":
        return Local(list(compress(self.matrix_shapes, keep)))

    def direct(self, tensors: Tensors, direction: Direction) -> Tensors:
        results = list(tensors)  # a tensor without entries, an empty shard of a batch, is its own direction
        for members in self._stacks(tensors):
            stack = torch.cat([tensors[i].reshape(self.matrix_shapes[i]) for i in members])  # (batch, m, n)
            # Contiguous: a tall matrix comes back transposed, and elementwise kernels are ten times slower on that.
            directed = direction(stack).contiguous().to(stack.dtype)
            batches = directed.split([self.matrix_shapes[i][0] for i in members])
            for i, batch in zip(members, batches, strict=True):
                results[i] = batch.reshape(tensors[i].shape)
        return results

    def rescale(self, tensors: Tensors, rms: float) -> Tensors:
        return rescale_whole(tensors, self.matrix_shapes, rms)

    def _stacks(self, tensors: Tensors) -> list[list[int]]:
        """Indices of tensors to stack: equal matrices, dtype and device, up to the limit."""
        alike = defaultdict(list)
        for i, tensor in enumerate(tensors):
            if tensor.numel():
                alike[self.matrix_shapes[i][1:], tensor.dtype, tensor.device].append(i)
        stacks = []
        for members in alike.values():
            size = max(1, _STACK_LIMIT // tensors[members[0]].numel())
            stacks += [members[i : i + size] for i in range(0, len(members), size)]
        return stacks


class Gathered(Route):
    """Every rank gathers every matrix and computes it: right for any DTensor, at the price of all ranks' time.

    The transport is DTensor's own, so its bytes are worked out from the shapes. Matrices travel in `to_owner_dtype`.
    """

    collective = True

    def __init__(
        self, params: list[DTensor], matrix_shapes: list[MatrixShape], layout: Layout, to_owner_dtype: torch.dtype
    ):
        self.matrix_shapes, self.layout, self.to_owner_dtype = matrix_shapes, layout, to_owner_dtype
        self._whole = Local(matrix_shapes)
        self._mesh, self._placements = params[0].device_mesh, params[0].placements
        self._sizes = [(param.shape, param.stride()) for param in params]
        self._itemsize = params[0].element_size()
        self._missing = sum(param.numel() - param.to_local().numel() for param in params)  # entries of other ranks
        # DTensor does not expose which rows of each matrix a rank has.
        self._gathers_twice = any(batch > 1 for batch, _, _ in matrix_shapes)

    def direct(self, tensors: Tensors, direction: Direction) -> Tensors:
        wholes = self._gather([tensor.to(self.to_owner_dtype) for tensor in tensors])
        shards = self._shards_of(self._whole.direct(wholes, direction))
        return [shard.to(tensor.dtype) for shard, tensor in zip(shards, tensors, strict=True)]

    def rescale(self, tensors: Tensors, rms: float) -> Tensors:
        if self._gathers_twice:
            return self._shards_of(self._whole.rescale(self._gather(tensors), rms))
        slices = [[(slice(0, 1), tensor.view(1, -1))] for tensor in tensors]
        return rescale_slices(tensors, slices, self.matrix_shapes, self.layout.shard_groups, rms)

    def add_traffic(self, traffic: wire.Traffic, rank: int, rescales: bool) -> None:
        """Count what this rank, taken for any, gathers per step."""
        if rank not in self.layout.ranks:
            return
        again = self._itemsize if rescales and self._gathers_twice else 0
        size = self._missing * (self.to_owner_dtype.itemsize + again)
        traffic.add("gather", size, size)
        for group in self.layout.shard_groups if rescales and not self._gathers_twice else ():
            traffic.add_all_reduce("norms", 8 * len(self.matrix_shapes), dist.get_world_size(group))

    def _gather(self, tensors: Tensors) -> Tensors:
        size = self._missing * tensors[0].element_size()
        wire.count("gather", size, size)
        return [
            DTensor.from_local(tensor, self._mesh, self._placements, run_check=False, shape=shape, stride=stride)
            .full_tensor()
            .contiguous()
            for tensor, (shape, stride) in zip(tensors, self._sizes, strict=True)
        ]

    def _shards_of(self, wholes: Tensors) -> Tensors:
        everywhere = [Replicate()] * self._mesh.ndim
        return [
            DTensor.from_local(whole, self._mesh, everywhere, run_check=False)
            .redistribute(placements=self._placements)  # from a replica this is a cut, and sends nothing
            .to_local()
            for whole in wholes
        ]


def rescale_whole(tensors: Tensors, matrix_shapes: list[MatrixShape], rms: float) -> Tensors:
    """Scale each matrix, in place, to this root mean square entry; a zero matrix stays zero."""
    for tensor, (batch, m, n) in zip(tensors, matrix_shapes, strict=True):
        matrices = tensor.view(batch, m * n)
        _scale(matrices, torch.linalg.vector_norm(matrices, dim=1), rms * (m * n) ** 0.5)
    return tensors


def rescale_slices(
    tensors: Tensors,
    slices: list[list[MatrixSlice]],
    matrix_shapes: list[MatrixShape],
    groups: Sequence[dist.ProcessGroup],
    rms: float,
) -> Tensors:
    """Sharded version, given the slices of each tensor: norms are all-reduced over `groups`.

    One all-reduce per group, of one float64 per matrix. Sums of signs are whole numbers, so their norm is, bit for bit,
    that of the whole matrix.
    """
    counts = [batch for batch, _, _ in matrix_shapes]
    squares = tensors[0].new_zeros(sum(counts), dtype=torch.float64)
    for of_tensor, sums in zip(slices, squares.split(counts), strict=True):
        for which, entries in of_tensor:
            sums[which] += torch.linalg.vector_norm(entries, dim=1, dtype=torch.float64).square()
    for group in groups:
        wire.all_reduce(squares, group, "norms")
    for of_tensor, sums, (_, m, n) in zip(slices, squares.split(counts), matrix_shapes, strict=True):
        for which, entries in of_tensor:
            _scale(entries, sums[which].sqrt().to(entries.dtype), rms * (m * n) ** 0.5)
    return tensors


def slices_of(shard: Tensor, matrix_shape: MatrixShape, dim: int, start: int) -> list[MatrixSlice]:
    """Return the slices of its tensor's matrices that a shard holds; it starts at `start` along the cut dimension."""
    batch, m, _ = matrix_shape
    if shard.ndim > 2 or dim != 0:
        return [(slice(0, batch), shard.view(batch, shard.numel() // batch))]
    # Rows of one or more blocks below each other: the block of a row depends on where the shard starts.
    end = start + len(shard)
    return [
        (slice(j, j + 1), shard[max(start, j * m) - start : min(end, (j + 1) * m) - start].view(1, -1))
        for j in range(start // m, -(-end // m))
    ]


def _scale(matrices: Tensor, norms: Tensor, wanted: float) -> None:
    """Scale matrices (b, entries), in place, from their norms (b,) to the wanted one."""
    matrices.mul_(torch.where(norms == 0, norms, wanted / norms).unsqueeze(1))


def matrix_shape_of(shape: torch.Size, qkv_split: int = 1, as_matrices: str | None = None) -> MatrixShape:
    """Return the (batch, m, n) that a tensor of this shape is treated as; ValueError where that is not known.

    qkv_split: a (k r, c) weight is k matrices (r, c), one below the other.
    as_matrices: for more than two dimensions: "batch" (leading dimensions count matrices) or "flatten" (the trailing
        dimensions are one, as for a convolution's (out, in, height, width)).
    """
    said = f"shape {tuple(shape)}"
    if as_matrices not in (None, "batch", "flatten"):
        raise ValueError(f"as_matrices must be None, 'batch' or 'flatten'; got {as_matrices!r}")
    if len(shape) < 2:
        raise ValueError(f"a matrix rule needs 2 or more dimensions, got {said}; give it to AdamW")
    if len(shape) == 2:
        if qkv_split < 1 or shape[0] % qkv_split:
            raise ValueError(f"qkv_split={qkv_split} must divide the rows of {said}; use the number of fused blocks")
        return qkv_split, shape[0] // qkv_split, shape[1]
    if qkv_split != 1:
        raise ValueError(f"qkv_split={qkv_split} needs a 2-D weight, got {said}; put it in a group of its own")
    if as_matrices == "batch":
        return prod(shape[:-2]), shape[-2], shape[-1]
    if as_matrices == "flatten":
        return 1, shape[0], prod(shape[1:])
    raise ValueError(
        f"a matrix rule needs to know how to see {said}; pass as_matrices='batch' (leading dimensions count matrices) "
        "or as_matrices='flatten' (one matrix, d0 x the rest)"
    )


def shape_in(group: dict, param: Tensor) -> MatrixShape:
    """Return the (batch, m, n) that a param group treats one of its parameters as."""
    return matrix_shape_of(param.shape, group.get("qkv_split", 1), group.get("as_matrices"))
