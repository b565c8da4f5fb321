"""The matrices of a tensor: its shape as a batch of them, and each scaled to a root mean square entry."""

from math import prod

import torch
from torch import Tensor

_ZERO = 1e-30  # no norm of a matrix that is not zero; its inverse is finite

MatrixShape = tuple[int, int, int]  # (batch, m, n) that a tensor is treated as


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


def norms_of(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the Frobenius norm of each matrix of a stack: (b, ...) -> (b,) in `dtype`."""
    return torch.linalg.vector_norm(stack, dim=tuple(range(1, stack.ndim)), dtype=dtype)


def scaled(stack: Tensor, norms: Tensor, wanted: float, dtype: torch.dtype) -> Tensor:
    """Return a stack (b, ...), whose matrices have `norms` (b,), scaled to the wanted norm; a zero matrix stays zero.

    Contiguous, also of a transposed stack; elementwise kernels are ten times slower on that.
    """
    precision = factor_dtype(dtype)
    norms = norms.to(precision)
    factors = (wanted / norms.clamp(min=_ZERO)).view(-1, *[1] * (stack.ndim - 1))
    return torch.mul(stack, factors, out=torch.empty(stack.shape, dtype=dtype, device=stack.device))


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision in which factors of entries of this dtype are computed, the same on every layout."""
    return torch.promote_types(dtype, torch.float32)
