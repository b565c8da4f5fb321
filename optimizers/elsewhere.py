"""The gradient of a matrix on a rank that does not own it: its shape, its norm, and no entries."""

import math
from typing import Any

import torch
from torch import Tensor

from .checks import BadValue

_aten = torch.ops.aten
_NO_OPS = (_aten.detach.default, _aten.alias.default)
_SCALINGS = (_aten.mul_.Tensor, _aten.mul_.Scalar)  # in place


class Elsewhere(Tensor):
    """A gradient that its matrix's owner holds; it takes no memory.

    `torch.nn.utils.clip_grad_norm_` finds the owner's norm in it, once per backward pass, and GradScaler whether the
    owner's entries are finite, so that all ranks decide alike. Everything else raises ValueError: no entry is read.

    Attributes:
        owner: global rank.
        norm: the Frobenius norm of the owner's gradient, (), in its dtype; None once it was scaled.
        is_finite: whether the owner's entries are finite, as 0-dimensional bool.
    """

    owner: int
    norm: Tensor | None
    is_finite: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore

    @staticmethod
    def __new__(cls, grad: Tensor, owner: int, norm: Tensor, is_finite: Tensor) -> "Elsewhere":
        """Make one of the shape, strides and dtype of `grad`."""
        kept: Any = torch.Tensor._make_wrapper_subclass(
            cls, grad.shape, strides=grad.stride(), dtype=grad.dtype, device=grad.device
        )
        kept.owner, kept.norm, kept.is_finite = owner, norm, is_finite
        return kept

    def __repr__(self) -> str:
        return f"Elsewhere({tuple(self.shape)}, dtype={self.dtype}, on rank {self.owner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is _aten._amp_foreach_non_finite_check_and_unscale_.default:
            return _unscale(*args)
        self = args[0] if args and isinstance(args[0], Elsewhere) else None
        if self is None:
            raise BadValue(_refusal(None, func.overloadpacket.__name__))
        if func in _NO_OPS:
            return self
        if func in _SCALINGS:
            self.norm = None  # the product of norm and factor is rounded otherwise than the norm of the products
            return self
        if func is _aten.linalg_vector_norm.default and _is_frobenius(*args, **(kwargs or {})):
            if self.norm is not None:
                return self.norm.clone()
        raise BadValue(_refusal(self, func.overloadpacket.__name__))


def _is_frobenius(tensor: Tensor, order: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> bool:
    return order == 2 and dim is None and not keepdim and dtype in (None, tensor.dtype)


def _unscale(grads: list[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """Divide gradients by GradScaler's scale, and mark in `found_inf` whether one is not finite, on any rank."""
    present = [grad for grad in grads if not isinstance(grad, Elsewhere)]
    if present:
        torch._amp_foreach_non_finite_check_and_unscale_(present, found_inf, inverse_scale)
    factor = inverse_scale.item()
    if factor and math.frexp(factor)[0] != 0.5:
        raise BadValue(
            f"GradScaler's scale must be a power of two where gradients go to owners, got {1 / factor:g}: norms are "
            "scaled without rounding then; set init_scale, growth_factor and backoff_factor to powers of two"
        )
    for grad in grads:
        if isinstance(grad, Elsewhere):
            found_inf.copy_(torch.maximum(found_inf, (~grad.is_finite).to(found_inf)))
            grad.norm = None if grad.norm is None else grad.norm * factor


def _refusal(grad: Tensor | None, operation: str) -> str:
    owner = f"rank {grad.owner}" if isinstance(grad, Elsewhere) else "its owner"
    return (
        f"the gradient of a matrix is on {owner} alone (gradients='to_owners'), got {operation} of it on another rank; "
        "call zero_grad() before each backward pass, clip by torch.nn.utils.clip_grad_norm_, or leave "
        "gradients='all_reduced'"
    )
