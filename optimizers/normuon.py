"""NorMuon: the averaged gradient, orthogonalized, then each row divided by the root of its second moment.

Li, Liu, Liang, Chen and Zhao, "NorMuon: Making Muon more efficient and scalable", arXiv 2510.05491, algorithm 1.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch.optim.optimizer import ParamsT

from .adamuon import direct
from .elementwise import each
from .engine import ProcessGroup, RuleOptimizer
from .options import Fraction, NonNegative, declared_by, given
from .polar import POLAR, Form
from .quantized import StateDtype
from .rounding import Rounding
from .rule import Tensors, UpdateRule, ema, register, update_ema


class NorMuon(RuleOptimizer):
    """NorMuon, for matrices.

        M <- b1 M + (1 - b1) g              v <- b2 v + (1 - b2) mean of each row of O²
        O = NewtonSchulz(M)                 D = O / (sqrt(v) + eps), row by row, scaled to RMS `scale`

    v is one number per row, a neuron's, and needs no bias correction: the rescaling takes any common factor out.

    Args:
        params: tensors of shape (m, n), named tensors or param groups.
        lr: step size; D has RMS `scale`.
        betas: (b1, b2), the decays of M and of v.
        eps: added to sqrt(v).
        scale: RMS of D.
        Others: as in `OLion`.

    Raises ValueError, when built, for values out of range and tensors that are not matrices.

    Example:
        >>> optimizer = NorMuon(model.blocks.parameters(), lr=6e-4)
    """

    rule = "normuon"

    def __init__(
        self,
        params: ParamsT,
        lr: NonNegative = 6e-4,
        weight_decay: NonNegative = 0.1,
        betas: tuple[Fraction, Fraction] = (0.95, 0.95),
        eps: NonNegative = 1e-10,
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
    """Return the averaged gradient."""
    return ema(state["momentum"], grads, group["betas"][0])


def refine(directions: Tensors, state: dict[str, Tensors], group: dict) -> Tensors:
    """Divide each row by the root of its second moment."""
    roots = each("sqrt", update_ema(state["row_second_moment"], state["row_squares"], group["betas"][1]))
    each("add_", roots, group["eps"])
    return [direction / root for direction, root in zip(directions, roots, strict=True)]


register(
    UpdateRule(
        name="normuon",
        **declared_by(NorMuon),
        state=("momentum",),
        rows=("row_second_moment",),
        prepare=prepare,
        direct=direct,
        refine=refine,
        refined=("row_second_moment",),
        rms="scale",
        **POLAR,
    )
)
