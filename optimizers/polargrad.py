"""PolarGrad and PolarSGDM: the polar factor times the nuclear norm, so that the update vanishes with the gradient.

Lau, Long and Su, "PolarGrad: A Class of Matrix-Gradient Optimizers from a Unifying Preconditioning Perspective",
arXiv 2505.21799; defaults are those of the authors' public code.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .checks import BadValue
from .elementwise import each
from .engine import ProcessGroup, RuleOptimizer
from .options import Fraction, NonNegative, declared_by, given
from .polar import POLAR, Form, orthogonalize_group
from .qdwh import qdwh
from .quantized import StateDtype
from .rounding import Rounding
from .rule import Tensors, UpdateRule, ema, register, sign, signed

Order = Literal["momentum_first", "polar_first"]


class PolarGrad(RuleOptimizer):
    """PolarGrad, for matrices.

        momentum_first      M <- momentum M + (1 - momentum) g      D = <M, U> U,   U = polar(M)
        polar_first         M <- momentum M + (1 - momentum) U      D = <g, U> M,   U = polar(g)

    <M, U> is the nuclear norm of M, the sum of its singular values: one number, sent with U between ranks.

    Args:
        params: tensors of shape (m, n), named tensors or param groups.
        lr: step size, before the nuclear norm.
        momentum: decay of M; may be 0.
        order: whether gradients or their polar factors are averaged.
        inner_steps: steps of QDWH, of `ns_form` "qdwh" alone; 0 for the number of full precision.
        signed: whether D is the sign of U, or of M where polar_first, of RMS `scale`, in place of the nuclear norm.
        scale: RMS of D with `signed`.
        Others: as in `OLion`.

    Raises ValueError, when built, for values out of range and tensors that are not matrices.

    Example:
        >>> optimizer = PolarGrad(model.blocks.parameters(), lr=2e-2)
    """

    rule = "polargrad"

    def __init__(
        self,
        params: ParamsT,
        lr: NonNegative = 2e-2,
        weight_decay: NonNegative = 0.0,
        momentum: Fraction = 0.95,
        order: Order = "momentum_first",
        inner_steps: int = 2,
        signed: bool = False,
        scale: NonNegative = 0.2,
        ns_form: Form = "qdwh",
        ns_steps: int = 5,
        ns_coefficients: str | Sequence = "jordan",
        eps: NonNegative = 1e-7,
        ns_dtype: torch.dtype | None = None,
        state_dtype: StateDtype = None,
        weight_rounding: Rounding = "nearest",
        qkv_split: int | tuple[int, ...] = 1,
        qkv_dim: int = 0,
        as_matrices: Literal["batch", "flatten"] | None = None,
        wire_dtype: torch.dtype | None = None,
        to_owner_dtype: Literal["int8"] | None = None,
        process_group: ProcessGroup | None = None,
    ):
        super().__init__(**given(locals()))


class PolarSGDM(RuleOptimizer):
    """PolarGrad as its authors use it on stochastic gradients, here for tables: embeddings and heads.

    The same updates under other defaults: less momentum, and Newton-Schulz, which takes a tall table in the Gram form
    of its small side. `build_optimizer(model, "muon", rest="polarsgdm", rest_lr=...)` gives it a model's tables.

    Args:
        params: tensors of shape (m, n), named tensors or param groups.
        momentum: decay of M; the authors take 0.95 with polar_first.
        Others: as in `PolarGrad`.

    Raises ValueError, when built, for values out of range and tensors that are not matrices.

    Example:
        >>> optimizer = PolarSGDM([model.wte.weight], lr=2e-2)
    """

    rule = "polarsgdm"

    def __init__(
        self,
        params: ParamsT,
        lr: NonNegative = 2e-2,
        weight_decay: NonNegative = 0.0,
        momentum: Fraction = 0.9,
        order: Order = "momentum_first",
        inner_steps: int = 2,
        signed: bool = False,
        scale: NonNegative = 0.2,
        ns_form: Form = "auto",
        ns_steps: int = 5,
        ns_coefficients: str | Sequence = "jordan",
        eps: NonNegative = 1e-7,
        ns_dtype: torch.dtype | None = None,
        state_dtype: StateDtype = None,
        weight_rounding: Rounding = "nearest",
        qkv_split: int | tuple[int, ...] = 1,
        qkv_dim: int = 0,
        as_matrices: Literal["batch", "flatten"] | None = None,
        wire_dtype: torch.dtype | None = None,
        to_owner_dtype: Literal["int8"] | None = None,
        process_group: ProcessGroup | None = None,
    ):
        super().__init__(**given(locals()))


def average(grads: Tensors, state: dict[str, Tensors], group: dict) -> Tensors:
    """Return the averaged gradient."""
    return ema(state["momentum"], grads, group["momentum"])


def copies(grads: Tensors, state: dict[str, Tensors], group: dict) -> Tensors:
    """Return the gradient, untouched."""
    return [grad.clone() for grad in grads]


def polar(stack: Tensor, group: dict) -> Tensor:
    """Return the polar factor of each (m, n) of a stack (batch, m, n)."""
    if group["ns_form"] == "qdwh":
        return qdwh(stack, group["eps"], group["inner_steps"] or None)
    return orthogonalize_group(stack, group)


def average_factors(directions: Tensors, state: dict[str, Tensors], group: dict) -> Tensors:
    """Return the averaged polar factors."""
    return ema(state["momentum"], directions, group["momentum"])


def signs_of_average(directions: Tensors, state: dict[str, Tensors], group: dict) -> Tensors:
    """Return the scaled signs of the averaged polar factors."""
    return each("mul_", sign(average_factors(directions, state, group)), group["scale"])


def check(group: dict) -> None:
    """Raise ValueError for a negative number of steps, and for options that no orthogonalization takes."""
    if not 0 <= group["inner_steps"] < 100:
        raise BadValue(f"inner_steps must be a whole number from 0 to 99, got {group['inner_steps']}; 2 is usual")
    POLAR["check"](group)


def _register(constructor: type[RuleOptimizer]) -> None:
    """Register a constructor's rule with its variants: two orders, signed or not."""
    shared: dict[str, Any] = {**declared_by(constructor), **POLAR, "state": ("momentum",), "check": check}
    named = UpdateRule(str(constructor.rule), prepare=average, direct=polar, sized=True, **shared)
    last = replace(named, prepare=copies, refine=average_factors, refined=("momentum",))
    variants = {
        ("momentum_first", False): named,
        ("polar_first", False): last,
        ("momentum_first", True): signed(replace(named, sized=False), rms="scale"),
        ("polar_first", True): replace(last, sized=False, refine=signs_of_average),
    }
    register(replace(named, variant=lambda group: variants[group["order"], group["signed"]]))


_register(PolarGrad)
_register(PolarSGDM)
