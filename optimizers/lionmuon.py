"""LionMuon: Lion's average, orthogonalized at every P-th step and signed at the others.

"LionMuon: Alternating Spectral and Sign Descent for Efficient Training", arXiv 2605.19811; that the first step is an
orthogonalized one, and the two sizes, follow the authors' public code.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Literal

import torch
from torch.optim.optimizer import ParamsT

from .checks import BadValue
from .engine import ProcessGroup, RuleOptimizer
from .lion import mix_old, prepare
from .options import Fraction, NonNegative, declared_by, given
from .polar import POLAR, Form, orthogonalize_group
from .quantized import StateDtype
from .rounding import Rounding
from .rule import UpdateRule, register


class LionMuon(RuleOptimizer):
    """LionMuon, for matrices. Between ranks, steps of signs send nothing.

        C = b1 M + (1 - b1) g                       with the old M
        M <- b2 M + (1 - b2) g
        D = scale sqrt(max(m, n)) NewtonSchulz(C)   at steps 1, P + 1, 2 P + 1, ...
        D = sign_scale sign(C)                      at the others

    Args:
        params: tensors of shape (m, n), named tensors or param groups.
        lr: step size.
        betas: (b1, b2), the weight of M in the mix and its decay.
        period: P, the steps from one orthogonalization to the next; 1 orthogonalizes at every step.
        sign_scale: size of the entries of D at steps of signs.
        scale: RMS of D at orthogonalized steps, for matrices of full rank.
        Others: as in `OLion`.

    Raises ValueError, when built, for values out of range and tensors that are not matrices.

    Example:
        >>> optimizer = LionMuon(model.blocks.parameters(), lr=1e-3, period=2)
    """

    rule = "lionmuon"

    def __init__(
        self,
        params: ParamsT,
        lr: NonNegative = 1e-3,
        betas: tuple[Fraction, Fraction] = (0.9, 0.99),
        weight_decay: NonNegative = 0.1,
        period: int = 2,
        sign_scale: NonNegative = 0.05,
        scale: NonNegative = 0.2,
        ns_steps: int = 5,
        ns_coefficients: str | Sequence = "jordan",
        eps: NonNegative = 1e-7,
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


def factor(group: dict, m: int, n: int) -> float:
    """Return the factor of an orthogonalized (m, n) matrix."""
    return group["scale"] * sqrt(max(m, n))


def check(group: dict) -> None:
    """Raise ValueError for a period below 1, and for options that no orthogonalization takes."""
    if group["period"] < 1:
        raise BadValue(f"period must be a whole number of steps, 1 or more; got {group['period']}")
    POLAR["check"](group)


BETWEEN = UpdateRule("lionmuon", {}, ("momentum",), prepare=prepare, factor=lambda group, m, n: group["sign_scale"])
register(
    UpdateRule(
        name="lionmuon",
        **declared_by(LionMuon),
        state=("momentum",),
        prepare=mix_old,
        direct=orthogonalize_group,
        factor=factor,
        period="period",
        between=BETWEEN,
        **{**POLAR, "check": check},
    )
)
