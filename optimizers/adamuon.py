"""AdaMuon: the sign of the momentum, orthogonalized, then divided by an elementwise second moment.

Si, Zhang and Shen, "AdaMuon: Adaptive Muon Optimizer", arXiv 2507.11005.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .elementwise import each
from .engine import ProcessGroup, RuleOptimizer
from .options import Fraction, NonNegative, declared_by, given
from .polar import POLAR, Form, orthogonalize
from .quantized import StateDtype
from .rounding import Rounding
from .rule import Tensors, UpdateRule, register, sign, update_ema


class AdaMuon(RuleOptimizer):
    """AdaMuon, for matrices.

        M <- momentum M + (1 - momentum) g      V <- momentum V + (1 - momentum) O²
        O = NewtonSchulz(sign(M))               D = O / (sqrt(V) + eps), scaled to RMS `scale`

    V needs no bias correction: the rescaling takes any common factor out.

    Args:
        params: tensors of shape (m, n), named tensors or param groups.
        lr: step size; D has RMS `scale`.
        momentum: decay of M and of V.
        eps: added to sqrt(V).
        scale: RMS of D.
        Others: as in `OLion`.

    Raises ValueError, when built, for values out of range and tensors that are not matrices.

    Example:
        >>> optimizer = AdaMuon(model.blocks.parameters(), lr=6e-4)
    """

    rule = "adamuon"

    def __init__(
        self,
        params: ParamsT,
        lr: NonNegative = 6e-4,
        weight_decay: NonNegative = 0.1,
        momentum: Fraction = 0.95,
        eps: NonNegative = 1e-8,
        scale: NonNegative = 0.2,
        ns_steps: int = 5,
        ns_coefficients: str | Sequence = "jordan",
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
    """Return the sign of the averaged gradient."""
    return sign(update_ema(state["momentum"], grads, group["momentum"]))


def direct(stack: Tensor, group: dict) -> Tensor:
    """Orthogonalize the signs; the group's eps is the second moment's."""
    options = group["ns_steps"], group["ns_coefficients"]
    return orthogonalize(stack, *options, dtype=group["ns_dtype"], form=group["ns_form"])


def refine(directions: Tensors, state: dict[str, Tensors], group: dict) -> Tensors:
    """Divide by the root of the second moment."""
    squares = each("mul", directions, directions)
    roots = each("sqrt", update_ema(state["second_moment"], squares, group["momentum"]))
    each("add_", roots, group["eps"])
    return each("div_", directions, roots)


register(
    UpdateRule(
        name="adamuon",
        **declared_by(AdaMuon),
        state=("momentum", "second_moment"),
        squares=("second_moment",),
        prepare=prepare,
        direct=direct,
        refine=refine,
        refined=("second_moment",),
        rms="scale",
        **POLAR,
    )
)
