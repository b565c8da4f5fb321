"""The matrices of a tensor: its division into matrices, and their scaling to a root mean square entry."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor

from .checks import BadValue

_ZERO = 1e-30  # no norm of a matrix that is not zero; its inverse is finite

MatrixShape = tuple[int, int]  # (m, n)


@dataclass(frozen=True)
class Blocks:
    """The matrices of a tensor: a batch of (rows, columns), each cut into blocks.

    Attributes:
        batch, rows, columns: the shape that the tensor is reshaped to.
        dim: the dimension that is cut: 0, the rows, or 1, the columns.
        sizes: rows, or columns, of each block; they add up to the whole.

    The methods take k such tensors at once, (k, *shape). Matrices are in the order of their blocks, and within a block
    in that of the batch.
    """

    batch: int
    rows: int
    columns: int
    dim: int
    sizes: tuple[int, ...]

    @property
    def shapes(self) -> tuple[MatrixShape, ...]:
        """The (m, n) of each block."""
        return tuple((self.rows, size) if self.dim else (size, self.columns) for size in self.sizes)

    @property
    def shape_counts(self) -> dict[MatrixShape, int]:
        """{(m, n): number of matrices}, in order of first appearance; one entry if all blocks are equal."""
        return {shape: self.batch * self.shapes.count(shape) for shape in self.shapes}

    @property
    def count(self) -> int:
        """The number of matrices."""
        return self.batch * len(self.sizes)

    @property
    def _stacked(self) -> bool:
        """Whether the matrices are adjacent in memory, so that a reshape stacks them."""
        return len(set(self.sizes)) == 1 and (len(self.sizes) == 1 or self.dim == 0)

    def split(self, tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the blocks, each (k, batch, m, n): views, if the tensors are contiguous."""
        return tensors.reshape(len(tensors), self.batch, self.rows, self.columns).split(self.sizes, dim=2 + self.dim)

    def stacks(self, tensors: Tensor) -> list[Tensor]:
        """Return the matrices, stacked by shape in the order of `shape_counts`: (b, m, n) each."""
        if self._stacked:
            return [tensors.reshape(len(tensors) * self.count, *self.shapes[0])]
        blocks = list(zip(self.split(tensors), self.shapes, strict=True))
        return [torch.cat([block for block, of in blocks if of == shape]).flatten(0, 1) for shape in self.shape_counts]

    def join(self, stacks: Sequence[Tensor]) -> Tensor:
        """Return the tensors, (k, batch, rows, columns), of their stacks."""
        if self._stacked:
            return stacks[0].reshape(len(stacks[0]) // self.count, self.batch, self.rows, self.columns)
        of_shape = {
            shape: iter(stack.unflatten(0, (self.shapes.count(shape), -1, self.batch)))
            for shape, stack in zip(self.shape_counts, stacks, strict=True)
        }
        return torch.cat([next(of_shape[shape]) for shape in self.shapes], dim=2 + self.dim)

    def norms(self, tensors: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the Frobenius norm of each matrix: (k, count) in `dtype`."""
        if self._stacked:
            return norms_of(self.stacks(tensors)[0], dtype).view(len(tensors), self.count)
        return torch.cat([torch.linalg.vector_norm(block, dim=(2, 3), dtype=dtype) for block in self.split(tensors)], 1)

    def products(self, tensors: Tensor, others: Tensor) -> Tensor:
        """Return the inner product of each matrix with that of other tensors: (k, count) in float64."""
        if self._stacked:
            return products_of(self.stacks(tensors)[0], self.stacks(others)[0]).view(len(tensors), self.count)
        pairs = zip(self.split(tensors), self.split(others), strict=True)
        products = [products_of(one.flatten(0, 1), other.flatten(0, 1)) for one, other in pairs]
        return torch.cat([each.view(len(tensors), self.batch) for each in products], 1)

    def multiplied(self, tensors: Tensor, factors: Tensor) -> Tensor:
        """Return the tensors, each matrix times its factor: (k, count), of the matrices that these are shards of."""
        if self._stacked:
            return multiplied(self.stacks(tensors)[0], factors.flatten(), tensors.dtype).view(tensors.shape)
        parts = [
            multiplied(block.flatten(0, 1), factor.flatten(), tensors.dtype).view(block.shape)
            for block, factor in zip(self.split(tensors), factors.split(self.batch, dim=1), strict=True)
        ]
        return torch.cat(parts, dim=2 + self.dim).view(tensors.shape)

    def scaled(self, tensors: Tensor, norms: Tensor, rms: float, whole: "Blocks") -> Tensor:
        """Return the tensors, each matrix scaled to a root mean square entry.

        norms: (k, count), of the matrices that these are shards of. whole: the blocks of these.
        """
        wanted = [rms * (m * n) ** 0.5 for m, n in whole.shapes for _ in range(whole.batch)]
        factors = [factors_of(norm, each, tensors.dtype) for norm, each in zip(norms.unbind(1), wanted, strict=True)]
        return self.multiplied(tensors, torch.stack(factors, 1))

    def multiply_(self, tensors: Tensor, factors: Sequence[float]) -> None:
        """Multiply each block of contiguous tensors by its factor, in place."""
        alone = len(set(factors)) == 1
        for block, factor in [(tensors, factors[0])] if alone else zip(self.split(tensors), factors, strict=True):
            if factor != 1:
                block.mul_(factor)

    def shard(self, shape: tuple[int, ...], indices: Sequence[int]) -> "Blocks":
        """Return the parts of the matrices in a shard of this shape.

        indices: of the whole's rows (columns, if `dim` is 1) that the shard holds, in order. A block of which it holds
        none has size 0.
        """
        if len(self.sizes) == 1:  # a batch has no blocks, and its matrices are cut equally
            entries = prod(shape) // max(1, self.batch)
            return Blocks(self.batch, 1, entries, 0, (1,))
        bounds = [bisect_left(indices, end) for end in accumulate(self.sizes, initial=0)]
        sizes = tuple(end - begin for begin, end in pairwise(bounds))
        return Blocks(1, shape[0], shape[1], self.dim, sizes)

    def __str__(self) -> str:
        of_batch = f"{self.batch} of " if self.batch != 1 else ""
        cut = f" in {('rows', 'columns')[self.dim]} {', '.join(map(str, self.sizes))}" if len(self.sizes) > 1 else ""
        return f"{of_batch}{self.rows}x{self.columns}{cut}"


Split = int | tuple[int, ...]  # a number of equal blocks, or their sizes in proportion


def blocks_of(shape: torch.Size, qkv_split: Split = 1, qkv_dim: int = 0, as_matrices: str | None = None) -> Blocks:
    """Return the matrices that a tensor of this shape is treated as; ValueError where that is not known.

    qkv_split: k equal blocks, or blocks in proportion: a (48 r, c) weight split by (32, 8, 8) is matrices of 32 r,
        8 r and 8 r rows, one below the other. Numbers of heads are such proportions.
    qkv_dim: the dimension to split: 0, the rows, or 1, the columns (Hugging Face's Conv1D stores (in, out)).
    as_matrices: for more than two dimensions: "batch" (leading dimensions count matrices) or "flatten" (the trailing
        dimensions are one, as for a convolution's (out, in, height, width)).
    """
    shown = f"shape {tuple(shape)}"
    if as_matrices not in (None, "batch", "flatten"):
        raise BadValue(f"as_matrices must be None, 'batch' or 'flatten'; got {as_matrices!r}")
    if len(shape) < 2:
        raise BadValue(f"a matrix rule needs 2 or more dimensions, got {shown}; give it to AdamW")
    if qkv_dim not in (0, 1):
        raise BadValue(f"qkv_dim must be 0 (rows) or 1 (columns); got {qkv_dim!r}")
    if len(shape) == 2:
        sizes = _divided(shape[qkv_dim], qkv_split, f"{('rows', 'columns')[qkv_dim]} of {shown}")
        return Blocks(1, shape[0], shape[1], qkv_dim, sizes)
    if qkv_split != 1:
        raise BadValue(f"qkv_split={qkv_split} needs a 2-D weight, got {shown}; put it in a group of its own")
    if as_matrices == "batch":
        return Blocks(prod(shape[:-2]), shape[-2], shape[-1], 0, (shape[-2],))
    if as_matrices == "flatten":
        return Blocks(1, shape[0], prod(shape[1:]), 0, (shape[0],))
    raise BadValue(
        f"a matrix rule needs as_matrices for {shown}; pass as_matrices='batch' (leading dimensions count matrices) "
        "or as_matrices='flatten' (one matrix, d0 x the rest)"
    )


def _divided(length: int, split: Split, shown: str) -> tuple[int, ...]:
    """Return the sizes of the blocks that a length is split into; or raise ValueError."""
    if isinstance(split, int):
        if split < 1 or length % split:
            raise BadValue(f"qkv_split={split} must divide the {shown}; use the number of fused blocks")
        return (length // split,) * split
    if len(split) < 2 or min(split) < 1:
        raise BadValue(f"qkv_split={split} must be two or more positive numbers, or one number of equal blocks")
    if length % sum(split):
        raise BadValue(
            f"qkv_split={split} must divide the {shown} into {sum(split)} equal parts; use the number of heads, or of "
            "rows, of each block"
        )
    return tuple(length // sum(split) * each for each in split)


def blocks_in(group: dict, shape: torch.Size) -> Blocks:
    """Return the matrices of a tensor of this shape in a param group."""
    options = {name: group[name] for name in ("qkv_split", "qkv_dim", "as_matrices") if name in group}
    return blocks_of(shape, **options)


def row_dims(shape: tuple[int, ...], group: dict) -> int:
    """Return the number of leading dimensions that count the rows of matrices; the others are columns."""
    return 1 if group.get("as_matrices") == "flatten" else len(shape) - 1


def norms_of(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the Frobenius norm of each matrix of a stack: (b, ...) -> (b,) in `dtype`."""
    return torch.linalg.vector_norm(stack, dim=tuple(range(1, stack.ndim)), dtype=dtype)


def scaled(stack: Tensor, norms: Tensor, wanted: float, dtype: torch.dtype) -> Tensor:
    """Return a stack (b, ...), whose matrices have `norms` (b,), scaled to the wanted norm; zero stays zero."""
    return multiplied(stack, factors_of(norms, wanted, dtype), dtype)


def factors_of(norms: Tensor, wanted: float, dtype: torch.dtype) -> Tensor:
    """Return the factors that scale norms to the wanted one, in float32 or a wider `dtype`, on every layout."""
    return wanted / norms.to(torch.promote_types(dtype, torch.float32)).clamp(min=_ZERO)


def multiplied(stack: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a stack (b, ...) times its factors (b,), in `dtype`.

    Contiguous, also of a transposed stack; elementwise kernels are ten times slower on that.
    """
    factors = factors.to(torch.promote_types(dtype, torch.float32)).view(-1, *[1] * (stack.ndim - 1))
    return torch.mul(stack, factors, out=torch.empty(stack.shape, dtype=dtype, device=stack.device))


def products_of(stack: Tensor, other: Tensor) -> Tensor:
    """Return the inner product of each matrix of a stack with another's: (b, ...) -> (b,) in float64."""
    precision = torch.promote_types(torch.promote_types(stack.dtype, other.dtype), torch.float32)
    return (stack.to(precision) * other).sum(tuple(range(1, stack.ndim)), dtype=torch.float64)


def to_rms(stack: Tensor, rms: float | None, dtype: torch.dtype) -> Tensor:
    """Return (b, m, n), contiguous, in `dtype`, each matrix scaled to a root mean square entry (None: as it is)."""
    if rms is None:
        return stack.to(dtype, memory_format=torch.contiguous_format).contiguous()
    _, m, n = stack.shape
    return scaled(stack, norms_of(stack, torch.promote_types(dtype, torch.float32)), rms * (m * n) ** 0.5, dtype)
