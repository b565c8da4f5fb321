"""Lion: the sign of a gradient mixed with its average.

Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, program 1.
"""

from torch.optim.optimizer import ParamsT

from .engine import ProcessGroup, RuleOptimizer
from .options import Fraction, NonNegative, declared_by, given
from .quantized import StateDtype
from .rounding import Rounding
from .rule import Tensors, UpdateRule, mix, register, sign, update_ema


class Lion(RuleOptimizer):
    """Lion, for tensors of any shape.

        D = scale sign(b1 M + (1 - b1) g)       with the old M
        M <- b2 M + (1 - b2) g

    OLion's paper writes its Lion baseline with the new M, betas (0.95, 0.98) and D of size 0.2: the same updates as
    betas=(0.931, 0.98), scale=0.2 here.

    Args:
        params: tensors, named tensors or param groups.
        lr: step size; every entry moves by lr x scale per step.
        betas: (b1, b2), the weight of M in the mix and its decay.
        weight_decay: decoupled, multiplied by lr.
        scale: size of D.
        Others: as in `OLion`.

    Raises ValueError, when built, for values out of range.

    Example:
        >>> optimizer = Lion(model.parameters(), lr=1e-4, weight_decay=0.1)
    """

    rule = "lion"

    def __init__(
        self,
        params: ParamsT,
        lr: NonNegative = 1e-4,
        betas: tuple[Fraction, Fraction] = (0.9, 0.99),
        weight_decay: NonNegative = 0.0,
        scale: NonNegative = 1.0,
        state_dtype: StateDtype = None,
        weight_rounding: Rounding = "nearest",
        process_group: ProcessGroup | None = None,
    ):
        super().__init__(**given(locals()))


def mix_old(grads: Tensors, state: dict[str, Tensors], group: dict) -> Tensors:
    """Return the mix with the old average, then move the average."""
    mix_weight, decay = group["betas"]
    averages = [average.to(grad.dtype) for average, grad in zip(state["momentum"], grads, strict=True)]
    mixed = mix(grads, averages, mix_weight)
    update_ema(state["momentum"], grads, decay)
    return mixed


def prepare(grads: Tensors, state: dict[str, Tensors], group: dict) -> Tensors:
    """Return the sign of the mix."""
    return sign(mix_old(grads, state, group))


register(
    UpdateRule(
        name="lion",
        **declared_by(Lion),
        state=("momentum",),
        prepare=prepare,
        factor=lambda group, m, n: group["scale"],
    )
)
