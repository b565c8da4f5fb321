"""Statistics that tell a difference between optimizers from the noise between seeds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Quantiles of Student's t at 1 to 10 degrees of freedom (Student 1908; any table); beyond 10 the last one, which is
# larger than the exact quantile.
T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Paired:
    """A mean difference over the seeds that two optimizers share, with the half width of its 95 % interval."""

    mean: float
    half_width: float
    seeds: int

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the interval excludes 0."""
        return abs(self.mean) > self.half_width


def quantile(table: Sequence[float], count: int) -> float:
    """Return Student's t for the mean of `count` values, 2 or more."""
    return table[min(count - 1, len(table)) - 1]


def is_below(target: float, losses: Sequence[float]) -> bool:
    """Return whether the mean of n seeds is below a target: (target - mean) sqrt(n) >= t s, at 5 %, one-sided.

    s is the sample standard deviation. One seed has none: its loss must be at the target or below.
    """
    mean, count = statistics.fmean(losses), len(losses)
    if count == 1:
        return mean <= target
    return (target - mean) * math.sqrt(count) >= quantile(T_95, count) * statistics.stdev(losses)


def paired_difference(losses: Mapping[int, float], others: Mapping[int, float]) -> Paired | None:
    """Return losses minus others (seed -> loss) over shared seeds; None with fewer than two finite pairs."""
    shared = sorted(losses.keys() & others.keys())
    differences = [losses[seed] - others[seed] for seed in shared]
    differences = [difference for difference in differences if math.isfinite(difference)]
    if len(differences) < 2:
        return None
    count = len(differences)
    error = statistics.stdev(differences) / math.sqrt(count)
    return Paired(statistics.fmean(differences), quantile(T_975, count) * error, count)


def digits_of(spread: float) -> int:
    """Return the number of decimals to print of a value with this spread, 0 to 4; 3 without a spread.

    A spread whose leading digits are below 3.5 keeps two of them (0.0011, 0.16), any other keeps one (0.006).
    """
    if not spread > 0 or not math.isfinite(spread):
        return 3
    exponent = math.floor(math.log10(spread))
    return max(0, min(4, (spread / 10**exponent < 3.5) - exponent))
