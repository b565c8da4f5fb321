"""Learning-rate schedule: step -> multiplier of the peak rate; and the [schedule] section of a config."""

import math
from dataclasses import dataclass
from typing import Literal

from common import BadValue
from common.config import at_least

DECAYS = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, as a multiple of the peak."""

    warmup: int = 2000
    """Steps of linear warm-up."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    floor: float = 0.1
    """Fraction of the peak at the end; a fraction, so that a swept rate scales its whole schedule."""

    def __post_init__(self):
        at_least(0, self, "warmup")
        multiplier(0, steps=1, **vars(self))  # refuses the rest


def multiplier(step: int, *, steps: int, warmup: int, decay: str = "cosine", floor: float = 0.1) -> float:
    """Return the fraction of the peak learning rate to use at `step`, which counts from 0.

    Warm-up is linear over `warmup` steps, from 1 / warmup at step 0 (a rate of zero would waste the step) to 1.
    Then the rate decays from 1 to `floor`, a fraction of the peak, at `steps`, and stays there. "constant" stays
    at 1. It returns a fraction of the peak, not a rate, so that a swept learning rate scales its whole schedule.

    Raises ValueError for an unknown decay, a floor outside [0, 1], a negative warm-up, and no steps.

    Example: `group["lr"] = peak * multiplier(step, steps=20_000, warmup=2_000)`
    """
    if decay not in DECAYS:
        raise BadValue(f"decay must be one of {', '.join(DECAYS)}; got {decay!r}")
    if not 0 <= floor <= 1:
        raise BadValue(f"floor must be a fraction of the peak rate, between 0 and 1; got {floor}")
    if warmup < 0 or steps < 1:
        raise BadValue(f"warmup must be 0 or more and steps 1 or more; got {warmup} and {steps}")
    if step < min(warmup, steps):
        return (step + 1) / warmup
    if decay == "constant":
        return 1.0
    if step >= steps:
        return floor
    progress = (step - warmup) / (steps - warmup)  # 0 at the end of the warm-up, 1 at `steps`
    remaining = (1 + math.cos(math.pi * progress)) / 2 if decay == "cosine" else 1 - progress
    return floor + (1 - floor) * remaining
