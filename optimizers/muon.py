"""Muon: Nesterov momentum, orthogonalized.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale by Liu et al., "Muon is
scalable for LLM training", arXiv 2502.16982. Options are torch.optim.Muon's.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from typing import Literal

import torch
from torch.optim.optimizer import ParamsT

from .checks import BadValue
from .engine import ProcessGroup, RuleOptimizer
from .options import Fraction, NonNegative, declared_by, given
from .polar import JORDAN, POLAR, Form, orthogonalize_group
from .quantized import StateDtype
from .rounding import Rounding
from .rule import Tensors, UpdateRule, ema, mix, register, signed, update_ema

SCALES = {
    "original": lambda m, n: sqrt(max(1, m / n)),  # Jordan et al.
    "match_rms_adamw": lambda m, n: 0.2 * sqrt(max(m, n)),  # Liu et al.: an update of RMS 0.2, as AdamW's
}


class Muon(RuleOptimizer):
    """Muon, for matrices: torch.optim.Muon's arguments, order and meaning, batched over equal shapes.

        M <- momentum M + (1 - momentum) g
        D = NewtonSchulz((1 - momentum) g + momentum M), or NewtonSchulz(M) without `nesterov`
        X <- (1 - lr weight_decay) X - lr factor(m, n) D

    Args:
        params: tensors of shape (m, n), named tensors or param groups.
        lr: step size, before `adjust_lr_fn`.
        momentum: decay of M.
        nesterov: whether to look one step ahead.
        eps: floor of the Frobenius norm that each matrix is divided by before the orthogonalization.
        adjust_lr_fn: factor(m, n): "original" (also None), sqrt(max(1, m / n)), or "match_rms_adamw",
            0.2 sqrt(max(m, n)), under which AdamW's learning rate and weight decay carry over.
        signed: whether D is the sign of what Newton-Schulz returns, of RMS 0.2 for every shape: OLion with
            betas=(momentum, momentum), if with `nesterov`.
        line_search: "armijo" makes lr the largest step a of a search for f(X - a D) <= f(X) - armijo_c a <g, D>, whose
            slope <g, D> is, without momentum, the nuclear norm of g times the factor. `step` then needs a closure, as
            torch.optim.LBFGS does; weights decay after the search; `optimizer.line_search` holds the result.
        armijo_c: c, the fraction of the decrease predicted by the slope that a step must reach.
        shrink: ratio of each step tried to the one before; above 0.
        Others: as in `OLion`.

    Raises ValueError, when built, for values out of range and tensors that are not matrices.

    Example:
        >>> optimizer = Muon(model.blocks.parameters(), lr=6e-4, adjust_lr_fn="match_rms_adamw")
    """

    rule = "muon"

    def __init__(
        self,
        params: ParamsT,
        lr: NonNegative = 1e-3,
        weight_decay: NonNegative = 0.1,
        momentum: Fraction = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Sequence = JORDAN,
        eps: NonNegative = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
        signed: bool = False,
        line_search: Literal["armijo"] | None = None,
        armijo_c: Fraction = 0.1,
        shrink: Fraction = 0.5,
        ns_dtype: torch.dtype | None = None,
        ns_form: Form = "auto",
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


def prepare(grads: Tensors, state: dict[str, Tensors], group: dict) -> Tensors:
    """Return the averaged gradient, one step ahead with `nesterov`."""
    if group["nesterov"]:
        return mix(grads, update_ema(state["momentum"], grads, group["momentum"]), group["momentum"])
    return ema(state["momentum"], grads, group["momentum"])


def factor(group: dict, m: int, n: int) -> float:
    """Return the factor of an (m, n) matrix."""
    return SCALES[group["adjust_lr_fn"] or "original"](m, n)


def check(group: dict) -> None:
    """Raise ValueError for a search that would not end, and for options that no orthogonalization takes."""
    if group["shrink"] == 0:
        raise BadValue("shrink must be above 0 and below 1, got 0; 0.5 is usual")
    if group["line_search"] and group["weight_rounding"] != "nearest":
        raise BadValue(
            f"line_search needs weight_rounding='nearest', got {group['weight_rounding']!r}; leave one of them out"
        )
    POLAR["check"](group)


RULE = UpdateRule(
    name="muon",
    **declared_by(Muon),
    state=("momentum",),
    prepare=prepare,
    direct=orthogonalize_group,
    factor=factor,
    **{**POLAR, "check": check},
)
SIGNED = signed(RULE, rms=0.2)
register(replace(RULE, variant=lambda group: SIGNED if group["signed"] else RULE))
