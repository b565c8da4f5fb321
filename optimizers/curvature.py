"""Curvature: the averaged gradient with a more even, but not flat, spectrum.

Su, "Isotropic curvature model for understanding deep learning optimization", arXiv 2511.00674; the spectrum is
computed in `homogenize.py`.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import homogenize as model
from .engine import ProcessGroup, RuleOptimizer
from .muon import prepare
from .options import Fraction, NonNegative, declared_by, given
from .quantized import StateDtype
from .rounding import Rounding
from .rule import UpdateRule, register, signed


class Curvature(RuleOptimizer):
    """The isotropic curvature model's step for curvature of a power, H(r) = r^p, for matrices.

        M <- momentum M + (1 - momentum) g
        U diag(sigma) V' = (1 - momentum) g + momentum M, or M without `nesterov`
        D = U diag(s) V', scaled to RMS `scale`;    sigma_i proportional to s_i E[rho^(p-2) zeta_i^2]

    zeta is uniform on the unit sphere and rho = ||diag(s) zeta||. The larger p, the more even s: p = 2 is the gradient
    itself; no p gives Muon's flat spectrum.

    Args:
        params: tensors of shape (m, n), named tensors or param groups.
        lr: step size; D has RMS `scale`.
        momentum: decay of M.
        nesterov: whether to look one step ahead.
        power: p, from 2 to 4; 2.05 to 2.5 were measured on GPT-2's layers.
        iterations: steps of the solver by matrix products, each as expensive as one of Newton-Schulz; 0 takes an SVD.
        eps: floor of the Frobenius norm that each matrix is divided by.
        scale: RMS of D.
        signed: whether D is the sign of U diag(s) V', of RMS `scale`.
        Others: as in `OLion`.

    Raises ValueError, when built, for values out of range and tensors that are not matrices.

    Example:
        >>> optimizer = Curvature(model.blocks.parameters(), lr=1e-3, power=2.4)
    """

    rule = "curvature"

    def __init__(
        self,
        params: ParamsT,
        lr: NonNegative = 1e-3,
        weight_decay: NonNegative = 0.1,
        momentum: Fraction = 0.95,
        nesterov: bool = True,
        power: float = 2.5,
        iterations: int = 5,
        eps: NonNegative = 1e-7,
        scale: NonNegative = 0.2,
        signed: bool = False,
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


def direct(stack: Tensor, group: dict) -> Tensor:
    """Return matrices (batch, m, n) with more even spectra."""
    return model.homogenize(stack, group["power"], group["iterations"], group["eps"])


def check(group: dict) -> None:
    """Raise ValueError for a power outside the model's range."""
    model.check(group["power"], group["iterations"])


RULE = UpdateRule(
    name="curvature",
    **declared_by(Curvature),
    state=("momentum",),
    prepare=prepare,
    direct=direct,
    rms="scale",
    check=check,
)
SIGNED = signed(RULE, rms="scale")
register(replace(RULE, variant=lambda group: SIGNED if group["signed"] else RULE))
