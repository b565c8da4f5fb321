"""The curvature function H(r), measured on a loss, and the exponents fitted to it."""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import progress

ROUNDING_AT = (1e-12, 3e-12, 1e-11)  # r at which H is below the rounding
TRUSTED = 100.0  # times the rounding
SATURATED = 1.0  # local slope below which H is saturated
WHOLE = "all at once"
Growth = list[list[float]]  # (directions, radii)


def draw_direction(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw a D (m, n) of ||D u|| = 1 for unit u, in the mean over u where m < n."""
    m, n = shape
    gaussian = torch.randn(max(m, n), min(m, n), generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal().sign()  # otherwise Q is not uniform: Mezzadri, arXiv math-ph/0609050
    return q if m >= n else q.mT * sqrt(n / m)


@torch.no_grad()
def growth(
    loss: Callable[[], Tensor], weights: Sequence[Tensor], directions: Sequence[Tensor], radii: Sequence[float]
) -> list[float]:
    """Return (f(W + r D) + f(W - r D)) / 2 - f(W) for each r, all of `weights` moved at once and put back exactly."""
    before = [weight.clone() for weight in weights]

    def at(step: float) -> float:
        for weight, start, direction in zip(weights, before, directions, strict=True):
            weight.copy_(start + step * direction)
        return float(loss())

    try:
        here = at(0.0)
        return [((at(radius) - here) + (at(-radius) - here)) / 2 for radius in radii]
    finally:
        at(0.0)


def measure(
    loss: Callable[[], Tensor], matrices: dict[str, Tensor], radii: Sequence[float], directions: int, seed: int
) -> tuple[dict[str, Growth], float]:
    """Return H of each matrix, and of all at once, by direction and radius; and the rounding of the loss."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: [draw_direction(weight.shape, generator) for _ in range(directions)] for name, weight in matrices.items()
    }
    every = list(matrices.values())
    together = [list(each) for each in zip(*drawn.values(), strict=True)]
    rounding = max(map(abs, growth(loss, every, together[0], ROUNDING_AT)))
    found = {
        name: [growth(loss, [weight], [direction], radii) for direction in drawn[name]]
        for name, weight in progress(matrices.items(), desc="matrices", unit="matrix")
    }
    return found | {WHOLE: [growth(loss, every, each, radii) for each in together]}, rounding


def fit(radii: Sequence[float], found: Growth, rounding: float) -> dict[str, Any]:
    """Fit exponents of H with their standard errors, its plateau of H / r^2 and the end of that; None without points.

    plateau: H / r^2, geometric mean over the first decade that can be trusted. leaves: the first r at which H / r^2 is
    10 % off it. exponent: over all `decades` trusted decades. steepest, at: the largest slope over
    one decade, and its middle.
    """
    r, values = np.log10(radii), np.array(found)
    mean = values.mean(0)
    trusted = _window(r, mean, rounding)
    none = dict.fromkeys(("plateau", "leaves", "exponent", "error", "decades", "steepest", "steepest_error", "at"))
    if len(trusted) < 3:
        return none
    log, inside = np.log10(mean[trusted]), r[trusted]
    first = inside <= inside[0] + 1 + 1e-9
    plateau = float(np.mean(log[first] - 2 * inside[first]))
    off = np.abs(10 ** (log - 2 * inside - plateau) - 1) > 0.1
    slope, error = _slope(r, values, trusted)
    result = none | {"plateau": 10**plateau, "exponent": slope, "error": error, "decades": float(np.ptp(inside))}
    result["leaves"] = float(10 ** inside[off][0]) if off.any() else None
    windows = [trusted[(inside >= low - 1e-9) & (inside <= low + 1 + 1e-9)] for low in inside]
    windows = [window for window in windows if np.ptp(r[window]) > 1 - 1e-9]
    if windows:
        best = max(windows, key=lambda window: _slope(r, values, window)[0])
        steepest, steepest_error = _slope(r, values, best)
        at = float(10 ** ((r[best[0]] + r[best[-1]]) / 2))
        result |= {"steepest": steepest, "steepest_error": steepest_error, "at": at}
    return result


def _window(r: np.ndarray, mean: np.ndarray, rounding: float) -> np.ndarray:
    """Return the indices of neighbouring radii at which H is above the rounding and not saturated."""
    above = mean > TRUSTED * max(rounding, np.finfo(float).tiny)
    if not above.any():
        return np.array([], dtype=int)
    start = int(np.argmax(above))
    kept = [start]
    for i in range(start + 1, len(r)):
        if not above[i] or (np.log10(mean[i]) - np.log10(mean[i - 1])) / (r[i] - r[i - 1]) < SATURATED:
            break
        kept.append(i)
    return np.array(kept)


def _slope(r: np.ndarray, values: np.ndarray, window: np.ndarray) -> tuple[float, float | None]:
    """Return the slope of the log of the mean H, with its jackknife standard error; None for one direction."""

    def of(rows: np.ndarray) -> float:
        return float(np.polyfit(r[window], np.log10(np.abs(rows.mean(0)[window])), 1)[0])

    count = len(values)
    if count < 2:
        return of(values), None
    without = np.array([of(np.delete(values, i, axis=0)) for i in range(count)])
    return of(values), float(sqrt((count - 1) / count * np.square(without - without.mean()).sum()))
