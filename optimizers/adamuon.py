"""AdaMuon: the sign of the momentum, orthogonalized, then divided by an elementwise second moment.

Si, Zhang and Shen, "AdaMuon: Adaptive Muon Optimizer", arXiv 2507.11005.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .engine import ProcessGroup, RuleOptimizer
from .polar import check_options, orthogonalize
from .rule import Tensors, UpdateRule, register, sign, signature_defaults, update_ema


def AdaMuon(
    params: ParamsT,
    lr: float = 6e-4,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    eps: float = 1e-8,
    scale: float = 0.2,
    ns_steps: int = 5,
    ns_coefficients: str | Sequence = "jordan",
    ns_dtype: torch.dtype | None = None,
    ns_form: str = "auto",
    state_dtype: torch.dtype | None = None,
    qkv_split: int = 1,
    as_matrices: str | None = None,
    wire_dtype: torch.dtype | None = None,
    process_group: ProcessGroup | None = None,
) -> RuleOptimizer:
    """Build AdaMuon, for matrices.

        M <- momentum M + (1 - momentum) g      V <- momentum V + (1 - momentum) O²
        O = NewtonSchulz(sign(M))               D = O / (sqrt(V) + eps), scaled to RMS `scale`

    V needs no bias correction: the rescaling takes any common factor out.

    Args:
        params: tensors of shape (m, n), named tensors or param groups.
        lr: step size; D has RMS `scale`.
        momentum: decay of M and of V.
        eps: added to sqrt(V).
        state_dtype: dtype of M and V; None is the parameter's.
        wire_dtype: in which directions travel between ranks; None is bfloat16.
        Others: as in `OLion`.

    Raises ValueError, when built, for values out of range and tensors that are not matrices.

    Example:
        >>> optimizer = AdaMuon(model.blocks.parameters(), lr=6e-4)
    """
    return RuleOptimizer(rule="adamuon", **locals())


def prepare(grads: Tensors, state: dict[str, Tensors], group: dict) -> Tensors:
    """Return the sign of the averaged gradient."""
    return sign(update_ema(state["momentum"], grads, group["momentum"]))


def direct(stack: Tensor, group: dict) -> Tensor:
    """Orthogonalize the signs; the group's eps is the second moment's."""
    options = group["ns_steps"], group["ns_coefficients"]
    return orthogonalize(stack, *options, dtype=group["ns_dtype"], form=group["ns_form"])


def refine(directions: Tensors, state: dict[str, Tensors], group: dict, shapes) -> Tensors:
    """Divide by the root of the second moment."""
    squares = list(torch._foreach_mul(directions, directions))
    roots = torch._foreach_sqrt(update_ema(state["second_moment"], squares, group["momentum"]))
    torch._foreach_add_(roots, group["eps"])
    torch._foreach_div_(directions, roots)
    return directions


register(
    UpdateRule(
        name="adamuon",
        defaults=signature_defaults(AdaMuon),
        state=("momentum", "second_moment"),
        prepare=prepare,
        direct=direct,
        refine=refine,
        rms="scale",
        check=check_options,
    )
)
