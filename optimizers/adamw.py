"""AdamW: torch's own functional AdamW, as a rule.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101.
"""

from typing import Literal

import torch
from torch.optim.adamw import adamw as torch_adamw
from torch.optim.optimizer import ParamsT

from .engine import ProcessGroup, RuleOptimizer
from .options import Fraction, NonNegative, declared_by, given
from .rounding import Rounding
from .rule import Tensors, UpdateRule, register

# Devices whose AdamW has one fused kernel; on a CPU it was measured 8 times faster than foreach.
_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}


class AdamW(RuleOptimizer):
    """AdamW, for tensors of any shape; arguments and mathematics are torch.optim.AdamW's.

    Args:
        params: tensors, named tensors or param groups.
        lr: step size.
        betas: (b1, b2), the decays of the gradient's average and of its square's.
        eps: added to the root of the second average.
        weight_decay: decoupled, multiplied by lr.
        state_dtype: "int8" or "int8_stochastic" keeps the gradient's average as in `OLion`, its square's in float32.
        weight_rounding: as in `OLion`.

    Raises ValueError, when built, for values out of range.

    Example:
        >>> optimizer = AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    """

    rule = "adamw"

    def __init__(
        self,
        params: ParamsT,
        lr: NonNegative = 1e-3,
        betas: tuple[Fraction, Fraction] = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 1e-2,
        state_dtype: Literal["int8", "int8_stochastic"] | None = None,
        weight_rounding: Rounding = "nearest",
        process_group: ProcessGroup | None = None,
    ):
        super().__init__(**given(locals()))


def whole_step(params: Tensors, grads: Tensors, state: dict[str, Tensors], group: dict) -> None:
    """Decay, average and step, in torch's fused kernel if the device has one."""
    beta1, beta2 = group["betas"]
    torch_adamw(
        params,
        grads,
        state["exp_avg"],
        state["exp_avg_sq"],
        max_exp_avg_sqs=[],
        state_steps=state["step"],
        # torch.compile generates its own kernel.
        fused=not torch.compiler.is_compiling()
        and all(
            # The fused kernel reads in memory order, so a gradient needs its parameter's strides.
            param.device.type in _FUSED_DEVICES
            and (param.stride() == grad.stride() or (param.is_contiguous() and grad.is_contiguous()))
            for param, grad in zip(params, grads, strict=True)
        ),
        amsgrad=False,
        maximize=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
    )


register(
    UpdateRule(
        name="adamw",
        **declared_by(AdamW),
        state=("exp_avg", "exp_avg_sq"),
        squares=("exp_avg_sq",),
        scalars=("step",),
        whole_step=whole_step,
    )
)
