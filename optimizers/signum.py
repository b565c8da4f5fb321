"""Signum: the sign of a momentum average; without momentum it is signSGD.

Bernstein, Wang, Azizzadenesheli and Anandkumar, "signSGD: Compressed Optimisation for Non-Convex Problems",
arXiv 1802.04434, algorithms 1 and 2.
"""

from torch.optim.optimizer import ParamsT

from .adamuon import prepare  # the sign of the averaged gradient
from .engine import ProcessGroup, RuleOptimizer
from .options import Fraction, NonNegative, declared_by, given
from .quantized import StateDtype
from .rounding import Rounding
from .rule import UpdateRule, register


class Signum(RuleOptimizer):
    """Signum, for tensors of any shape.

        M <- momentum M + (1 - momentum) g          D = scale sign(M)

    Args:
        params: tensors, named tensors or param groups.
        lr: step size; every entry moves by lr x scale per step.
        momentum: decay of M; 0 is signSGD.
        weight_decay: decoupled, multiplied by lr.
        scale: size of D.
        Others: as in `OLion`.

    Raises ValueError, when built, for values out of range.

    Example:
        >>> optimizer = Signum(model.parameters(), lr=1e-4)
    """

    rule = "signum"

    def __init__(
        self,
        params: ParamsT,
        lr: NonNegative = 1e-4,
        momentum: Fraction = 0.9,
        weight_decay: NonNegative = 0.0,
        scale: NonNegative = 1.0,
        state_dtype: StateDtype = None,
        weight_rounding: Rounding = "nearest",
        process_group: ProcessGroup | None = None,
    ):
        super().__init__(**given(locals()))


register(
    UpdateRule(
        name="signum",
        **declared_by(Signum),
        state=("momentum",),
        prepare=prepare,
        factor=lambda group, m, n: group["scale"],
    )
)
