"""OLion: Lion's double momentum average, orthogonalized as in Muon, then signed.

Wang, Shen and Zhang, "OLion: Approaching the Hadamard Ideal by Intersecting Spectral and l-infinity Implicit Biases",
arXiv 2602.01105, algorithm 1.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .engine import ProcessGroup, RuleOptimizer
from .options import Fraction, NonNegative, declared_by, given
from .polar import POLAR, Form, orthogonalize_group
from .quantized import StateDtype
from .rounding import Rounding
from .rule import Tensors, UpdateRule, mix, register, sign_of, update_ema


class OLion(RuleOptimizer):
    """OLion, for matrices: hidden weights of two dimensions (`build_optimizer` selects them in a model).

        M <- b2 M + (1 - b2) g          X <- (1 - lr weight_decay) X - lr D
        G~ = (1 - b1) g + b1 M          with the new M
        S = sign(NewtonSchulz(G~))      D = scale sqrt(m n) / ||S||_F S

    Because M moves before it is mixed, this is Lion's average with b1 b2 (0.931) in front of the old M.

    Args:
        params: tensors of shape (m, n), named tensors or param groups.
        lr: step size; D has RMS `scale`, so an entry moves by lr x scale per step.
        betas: (b1, b2), the weight of M in the mix and its decay.
        weight_decay: decoupled, multiplied by lr.
        ns_steps: Newton-Schulz steps, 1 to 99.
        ns_coefficients: "jordan", "convergent" or "polar_express", a triple (a, b, c), or one triple per step.
        eps: floor of the Frobenius norm that each matrix is divided by before the orthogonalization.
        scale: RMS of D; 0.2 is AdamW's usual update size (Liu et al., arXiv 2502.16982).
        ns_dtype: precision of the orthogonalization; None is bfloat16 on GPUs and float32 or float64 on CPUs.
        ns_form: "plain", "gram", "auto" (the cheaper of the two), "qdwh" or "svd"; see `polar.orthogonalize`.
        state_dtype: dtype of the averages; None is the parameter's. "int8" keeps averages of gradients at one byte per
            entry and one scale per row, rounded to the nearest, "int8_stochastic" at random (`quantized.py`).
        weight_rounding: of bfloat16 weights, which "nearest" keeps from any change below 2^-9 of their size, as a
            usual weight decay is: "stochastic" rounds at random, right on average; "compensated" keeps the 16 bits
            that float32 has beyond bfloat16 as state, so that weights step as in float32 (`rounding.py`).
        qkv_split: row blocks of each weight that are orthogonalized apart: a number of equal ones (3 for a fused QKV),
            or their sizes in proportion, as numbers of heads ((32, 8, 8) for grouped queries).
        qkv_dim: 1 to split columns instead, of weights that are stored (in, out).
        as_matrices: tensors of more than two dimensions as a "batch" of matrices or "flatten"ed; None refuses them.
        wire_dtype: dtype of directions in messages between ranks; None is one bit per entry for signs, exact with
            their zeros, and bfloat16 for others.
        to_owner_dtype: "int8" sends the shards of FSDP2 and tensor parallelism to their owners at one byte per entry
            and one scale per 256, rounded to the nearest; None in the precision that the owner computes in.
        process_group: the ranks that hold the same plain tensors and gradients (DDP) and share the work; DTensors
            carry their layout.

    Raises ValueError, when built, for values out of range and tensors that are not matrices.

    Example:
        >>> optimizer = OLion(model.blocks.parameters(), lr=1e-3)
    """

    rule = "olion"

    def __init__(
        self,
        params: ParamsT,
        lr: NonNegative = 6e-4,
        betas: tuple[Fraction, Fraction] = (0.95, 0.98),
        weight_decay: NonNegative = 0.1,
        ns_steps: int = 5,
        ns_coefficients: str | Sequence = "jordan",
        eps: NonNegative = 1e-7,
        scale: NonNegative = 0.2,
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
    """Return G~: the gradient mixed with its average."""
    mix_weight, decay = group["betas"]
    return mix(grads, update_ema(state["momentum"], grads, decay), mix_weight)


def direct(stack: Tensor, group: dict) -> Tensor:
    """Return sign(NewtonSchulz(stack)): entries -1, 0 and 1; a row that is zero in G~ stays zero."""
    return sign_of(orthogonalize_group(stack, group))


register(
    UpdateRule(
        name="olion",
        **declared_by(OLion),
        state=("momentum",),
        prepare=prepare,
        direct=direct,
        signs=True,
        rms="scale",
        **POLAR,
    )
)
