"""Routes: how a rule's direction, which needs whole matrices, is reached from the tensors that this process holds.

A route is made for tensors of one param group that lie alike, and knows layouts, never rules. It takes and returns
what this process holds of them.

    Local      whole matrices in this process
    Owned      each matrix has an owner among the ranks, which computes it for all: replicated, sharded and hsdp
    Gathered   every rank gathers every matrix: right for any DTensor, and what the others are tested against
"""

from collections import defaultdict
from collections.abc import Callable
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from . import wire
from .layout import Layout
from .norms import rescale_parts, rescale_whole
from .rule import Tensors

_STACK_LIMIT = 2**27  # entries stacked at once (512 MiB in fp32): past that a larger batch is no faster


def matrix_shape(shape: torch.Size, qkv_split: int = 1, as_matrices: str | None = None) -> tuple[int, int, int]:
    """Return the (batch, m, n) that a tensor of this shape is seen as.

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


def shape_in(group: dict, param: Tensor) -> tuple[int, int, int]:
    """Return the (batch, m, n) that a param group sees one of its parameters as."""
    return matrix_shape(param.shape, group.get("qkv_split", 1), group.get("as_matrices"))


class Local:
    """Whole matrices in this process: same shapes are stacked and done in one batch."""

    collective = False  # every process steps by itself

    def __init__(self, shapes: list[tuple[int, int, int]]):
        self.shapes = shapes

    def direct(self, tensors: Tensors, direction: Callable[[Tensor], Tensor]) -> Tensors:
        """Return direction(matrices) of each tensor, in the tensor's own shape and dtype."""
        results = list(tensors)  # one without entries, an empty shard of a batch, is its own direction
        for members in self._stacks(tensors):
            stack = torch.cat([tensors[i].reshape(self.shapes[i]) for i in members])  # (batch, m, n)
            # Contiguous: a tall matrix comes back transposed, and elementwise kernels are ten times slower on that.
            parts = direction(stack).contiguous().to(stack.dtype).split([self.shapes[i][0] for i in members])
            for i, part in zip(members, parts, strict=True):
                results[i] = part.reshape(tensors[i].shape)
        return results

    def rescale(self, tensors: Tensors, rms: float) -> Tensors:
        """Scale each matrix, in place, to this root mean square entry; a zero matrix stays zero."""
        return rescale_whole(tensors, self.shapes, rms)

    def _stacks(self, tensors: Tensors) -> list[list[int]]:
        """Indices that go together: equal matrices, dtype and device, up to the limit."""
        stacks = defaultdict(list)
        for i, tensor in enumerate(tensors):
            if tensor.numel() == 0:
                continue
            stacks[self.shapes[i][1:], tensor.dtype, tensor.device].append(i)
        chunks = []
        for members in stacks.values():
            size = max(1, _STACK_LIMIT // max(1, tensors[members[0]].numel()))
            chunks += [members[i : i + size] for i in range(0, len(members), size)]
        return chunks


class Gathered:
    """Every rank gathers every matrix and computes it: right for any DTensor, at the price of doing it on all.

    The transport is DTensor's own, so what is counted here is worked out from the shapes. Matrices travel in `inward`.
    """

    collective = True

    def __init__(self, params: list[DTensor], shapes: list[tuple[int, int, int]], layout: Layout, inward: torch.dtype):
        self.shapes, self.layout, self.inward = shapes, layout, inward
        self._whole = Local(shapes)
        self._mesh, self._placements = params[0].device_mesh, params[0].placements
        self._lie = [(param.shape, param.stride()) for param in params]
        self._itemsize = params[0].element_size()
        self._missing = sum(param.numel() - param.to_local().numel() for param in params)  # entries of other ranks

    def direct(self, tensors: Tensors, direction: Callable[[Tensor], Tensor]) -> Tensors:
        """Return this rank's shards of direction(matrices)."""
        directed = self._whole.direct(self._gather([tensor.to(self.inward) for tensor in tensors]), direction)
        return [shard.to(tensor.dtype) for shard, tensor in zip(self._cut(directed), tensors, strict=True)]

    def rescale(self, tensors: Tensors, rms: float) -> Tensors:
        """Scale each matrix to this root mean square entry; a zero matrix stays zero."""
        if self._several():  # which rows a rank has of each is DTensor's secret
            return self._cut(self._whole.rescale(self._gather(tensors), rms))
        parts = [[(slice(0, 1), tensor.view(1, -1))] for tensor in tensors]
        return rescale_parts(tensors, parts, self.shapes, self.layout.cut, rms)

    def add_traffic(self, traffic: wire.Traffic, rank: int, rescales: bool) -> None:
        """Count what this rank, taken for any, gathers a step; twice, where several in one are rescaled."""
        gathered = self._missing * (self.inward.itemsize + (self._itemsize if rescales and self._several() else 0))
        traffic.add("gather", gathered, gathered)
        for group in self.layout.cut if rescales and not self._several() else ():
            norms = wire.ring_bytes(8 * len(self.shapes), dist.get_world_size(group))
            traffic.add("norms", norms, norms)

    def _several(self) -> bool:
        """Whether a tensor here is seen as more than one matrix."""
        return any(batch > 1 for batch, _, _ in self.shapes)

    def _gather(self, tensors: Tensors) -> Tensors:
        size = self._missing * tensors[0].element_size()
        wire.count("gather", size, size)
        return [
            DTensor.from_local(tensor, self._mesh, self._placements, run_check=False, shape=shape, stride=stride)
            .full_tensor()
            .contiguous()
            for tensor, (shape, stride) in zip(tensors, self._lie, strict=True)
        ]

    def _cut(self, wholes: Tensors) -> Tensors:
        everywhere = [Replicate()] * self._mesh.ndim
        return [
            DTensor.from_local(whole, self._mesh, everywhere, run_check=False)
            .redistribute(placements=self._placements)  # from a replica this is a cut, and sends nothing
            .to_local()
            for whole in wholes
        ]
