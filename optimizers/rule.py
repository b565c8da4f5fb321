"""Update rules: the functions that turn a gradient into an update, as a value that the engine runs on any layout.

    p <- (1 - lr weight_decay) p - lr size(refine(direct(prepare(g))))

A new rule is a value of `UpdateRule` and a call of `register`:

    register(UpdateRule(
        name="my_signum",                                  # Bernstein et al. 2018: the sign of an averaged gradient
        defaults=dict(lr=1e-3, weight_decay=0.0, momentum=0.9),
        state=("momentum",),
        prepare=lambda grads, state, group: sign(ema(state["momentum"], grads, group["momentum"])),
    ))
    optimizer = RuleOptimizer(model.parameters(), "my_signum", lr=3e-4)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .checks import BadValue, closest
from .elementwise import each
from .options import NonNegative, kind_of_default

Tensors = list[Tensor]


@dataclass(frozen=True)
class UpdateRule:
    """One optimizer, as pure functions over the tensors of one param group.

    Attributes:
        name: the value of `group["rule"]`.
        defaults: every option of the rule and its default; `lr` and `weight_decay` must be among them.
        kinds: {option: annotation}; an option without one takes values of its default's type. Both come from a
            constructor by `**declared_by(OLion)`; see `options.py`.
        state: names of the buffers, each of its parameter's shape, layout and (unless `state_dtype`) dtype.
        squares: those of `state` that average squares; int8, whose steps are linear, would make the small ones zero.
        scalars: names of 0-dimensional float32 buffers.
        rows: names of buffers of one number per row of each matrix; with some, `refine` also gets
            state["row_squares"], the mean square entry of each row of the directions.
        prepare: (grads, state, group) -> directions. Elementwise, on this rank's shards; state[name] is a list beside
            grads and may be written to, grads may not, and the results must be new tensors. Gradients are in the
            wider of their own dtype and the state's.
        direct: (stack (batch, m, n), group) -> (batch, m, n), on whole matrices, stateless. None: elementwise rule.
        sized: whether each matrix of refined directions is multiplied by the product <stack, direct(stack)>, which
            is sent with the direction.
        signs: whether `direct` returns only -1, 0, 1 and NaN, which are then sent at one bit per entry.
        refine: (directions, state, group) -> directions. Elementwise, on this rank's shards; may write to directions.
        refined: names of the buffers that `refine` keeps, and `prepare` does not; in int8 each gets its own only.
        rms: the size of an update: the root mean square entry to which each whole matrix of refined directions is
            scaled, or the name of the option that holds it.
        factor: or as a number, (group, m, n) -> factor of the direction of an (m, n) matrix, before `refine`; m and n
            are 0 without a `direct`. With neither, directions are not scaled.
        flops: (m, n, group, param) -> floating-point operations of the direction of one matrix, which balance owners.
        rounds_to: (group, param) -> the dtype to which `direct` rounds its stack, and in which shards are therefore
            sent to their owners; None is the gradient's.
        whole_step: (params, grads, state, group) -> None. Instead of the three, for an elementwise rule with a kernel
            that does the whole update at once, decay included.
        check: (group) -> None; raises ValueError for option values that the rule cannot take.
        variant: (group) -> the rule for these options, with the same name, options and state.
        period: name of the option that holds P: `direct` is taken at the first step and every P-th after it.
        between: the elementwise rule of the other steps, over the same state; nothing is sent then.
    """

    name: str
    defaults: Mapping[str, Any]
    state: tuple[str, ...] = ()
    squares: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    prepare: Callable[[Tensors, dict[str, Tensors], dict], Tensors] | None = None
    direct: Callable[[Tensor, dict], Tensor] | None = None
    sized: bool = False
    signs: bool = False
    refine: Callable[[Tensors, dict[str, Tensors], dict], Tensors] | None = None
    refined: tuple[str, ...] = ()
    rms: str | float | None = None
    factor: Callable[[dict, int, int], float] | None = None
    flops: Callable[[int, int, dict, Tensor], float] = lambda m, n, group, param: 2 * m * n * min(m, n)
    rounds_to: Callable[[dict, Tensor], torch.dtype | None] = lambda group, param: None
    whole_step: Callable[[Tensors, Tensors, dict[str, Tensors], dict], None] | None = None
    check: Callable[[dict], None] | None = None
    variant: Callable[[dict], "UpdateRule"] | None = None
    period: str | None = None
    between: "UpdateRule | None" = None
    kinds: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scales_directions(self) -> bool:
        """Whether `rms` is of the directions of `direct`."""
        return self.rms is not None and self.refine is None

    @property
    def sends_floats(self) -> bool:
        """Whether a number per matrix is sent with its direction: the direction's norm, or the product of the two."""
        return self.scales_directions or self.sized

    @property
    def scales_refined(self) -> bool:
        """Whether `rms` is of refined directions."""
        return self.rms is not None and self.refine is not None

    def kind(self, option: str) -> Any:
        """Return the annotation of an option's values."""
        usual = {"lr": NonNegative, "weight_decay": NonNegative}
        return self.kinds.get(option) or usual.get(option) or kind_of_default(self.defaults[option])


RULES: dict[str, UpdateRule] = {}


def register(rule: UpdateRule) -> UpdateRule:
    """Register a rule under its name; raise ValueError if another rule has it."""
    if RULES.get(rule.name, rule) is not rule:
        raise BadValue(f"a rule named {rule.name!r} exists already; give yours another name")
    if missing := {"lr", "weight_decay"} - rule.defaults.keys():
        raise BadValue(f"rule {rule.name!r} needs defaults for lr and weight_decay; {sorted(missing)} missing")
    if (rule.prepare is None) == (rule.whole_step is None):
        raise BadValue(f"rule {rule.name!r} needs either prepare or whole_step; give exactly one of them")
    if isinstance(rule.rms, str) and (rule.direct is None or rule.rms not in rule.defaults):
        raise BadValue(
            f"rule {rule.name!r} scales matrices to {rule.rms!r}; give it a direct, and that option a default"
        )
    if rule.rows and (rule.direct is None or rule.refine is None):
        raise BadValue(f"rule {rule.name!r} has rows, read by refine from directions; give it a direct and a refine")
    if rule.sized and (rule.direct is None or rule.rms or rule.signs):
        raise BadValue(f"rule {rule.name!r} is sized; give it a direct, and neither rms nor signs")
    if (rule.rms or rule.whole_step) and rule.factor:
        raise BadValue(f"rule {rule.name!r} needs one size of updates; give factor without rms and whole_step")
    RULES[rule.name] = rule
    return rule


def rule_named(name: str) -> UpdateRule:
    """Return the registered rule; raise ValueError, naming the nearest, if there is none."""
    if name not in RULES:
        raise BadValue(f"the optimizer must be one of {', '.join(sorted(RULES))}; got {name!r}{closest(name, RULES)}")
    return RULES[name]


def rule_of(group: dict) -> UpdateRule:
    """Return the rule of a param group, in the variant for its options."""
    rule = rule_named(group["rule"])
    return rule.variant(group) if rule.variant else rule


def rule_now(group: dict) -> UpdateRule:
    """Return the rule of a param group's coming step."""
    rule = rule_of(group)
    return rule.between if rule.period and rule.between and group.get("steps", 0) % group[rule.period] else rule


# The elementwise pieces that rules are made of.


def ema(averages: Tensors, values: Tensors, decay: float) -> Tensors:
    """Move each average towards its value, average <- decay average + (1 - decay) value, and return copies.

    values come in the wider dtype of gradient and state: a narrower average is rounded once, when it is stored.
    """
    fresh = [average.to(value.dtype, copy=True) for average, value in zip(averages, values, strict=True)]
    each("lerp_", fresh, values, 1 - decay)
    torch._foreach_copy_(averages, fresh)
    return fresh


def update_ema(averages: Tensors, values: Tensors, decay: float) -> Tensors:
    """Like `ema`, but return the averages themselves if dtypes agree: they must not be written to or returned."""
    if any(average.dtype != value.dtype for average, value in zip(averages, values, strict=True)):
        return ema(averages, values, decay)
    return each("lerp_", averages, values, 1 - decay)


def mix(values: Tensors, averages: Tensors, weight: float) -> Tensors:
    """Return (1 - weight) value + weight average."""
    return each("lerp", values, averages, weight)


def sign(tensors: Tensors) -> Tensors:
    """Return the entrywise sign; sign(0) = 0, and entries that are not finite become NaN.

    torch.sign makes NaN 0, which would hide a divergence.
    """
    return each("add_", each("sign", tensors), tensors, alpha=0)


def sign_of(tensor: Tensor) -> Tensor:
    """Return the sign, as above, of one tensor."""
    return tensor.sign().add_(tensor, alpha=0)


def signed(rule: UpdateRule, rms: str | float) -> UpdateRule:
    """Return a rule with the sign of another's direction, scaled to a root mean square entry as OLion's."""
    direct = rule.direct
    assert direct is not None
    return replace(
        rule, direct=lambda stack, group: sign_of(direct(stack, group)), refine=None, signs=True, rms=rms, factor=None
    )
