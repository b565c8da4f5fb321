"""Metrics recorded by `[probe]`, for scripts.figures.

    python -m scripts.figures --what norms RUN...       spectral and max-abs norm of the weights over training
    python -m scripts.figures --what isotropy RUN...    diagonal isotropy, with the level of a random matrix
    python -m scripts.figures --what hadamard RUN...    flatness of the polar factor, spectral norm of the signs
    python -m scripts.figures --what spectrum RUN...    entries and singular values at the end, as quantiles

Norms, Hadamard gap and spectra are drawn for two shapes, the squarest and the tallest; any other recorded metric by
name, `--metric probe/384x128/cosine`.
"""

import re
from collections.abc import Iterable
from math import pi, sqrt
from typing import Any, Literal

from common import UserError
from common.figure import FAINT, INK

What = Literal["curves", "norms", "isotropy", "hadamard", "spectrum"]
QUANTITIES = {
    "norms": ("weight_spectral", "weight_max_abs"),
    "isotropy": ("isotropy",),
    "hadamard": ("flatness", "sign_spectral"),
    "spectrum": ("weight_entries", "weight_singular_values"),
}
QUANTILE = "quantile"  # the x of distributions
WORDS = {
    "weight_spectral": "spectral norm of the {} weights",
    "weight_max_abs": "largest entry of the {} weights",
    "isotropy": "deviation from diagonal isotropy, {} matrices",
    "flatness": "flatness of the {} polar factors",
    "sign_spectral": "spectral norm of the {} signs, over its minimum",
    "weight_entries": "entries of the {} weights",
    "weight_singular_values": "singular values of the {} weights",
    "momentum_singular_values": "singular values of the {} momentum",
    "flipped_signs": "fraction of {} signs that differ from the exact ones",
    "cosine": "cosine between update and gradient, {} matrices",
}


def metrics_of(what: str, recorded: Iterable[str]) -> tuple[str, ...]:
    """Return the recorded metrics of a figure, panel by panel; raises UserError if there are none."""
    shapes: dict[str, tuple[int, int]] = {}
    keys = set(recorded)
    for key in sorted(keys):
        if found := re.fullmatch(r"probe/(\d+)x(\d+)/(\w+)", key):
            if found[3] in QUANTITIES[what]:
                shapes[f"{found[1]}x{found[2]}"] = int(found[1]), int(found[2])
    if not shapes:
        raise UserError(
            f"--what {what} needs runs that recorded {' or '.join(QUANTITIES[what])} of a shape; got none; train with "
            "--probe.every 100" + (" --probe.quantities spectrum" if what == "spectrum" else "")
        )
    chosen = list(shapes)
    if what != "isotropy":
        squarest = min(shapes, key=lambda shape: abs(shapes[shape][0] - shapes[shape][1]))
        tallest = max(shapes, key=lambda shape: shapes[shape][0] / shapes[shape][1])
        chosen = list(dict.fromkeys((squarest, tallest)))
    wanted = [f"probe/{shape}/{quantity}" for quantity in QUANTITIES[what] for shape in chosen]
    return tuple(metric for metric in wanted if metric in keys)


def words_of(metric: str) -> str | None:
    """Return a probe metric's name in a panel; None for another metric."""
    _, label, quantity = metric.split("/", 2) if metric.count("/") == 2 else ("", "", "")
    return WORDS[quantity].format(label.replace("x", " x ")) if quantity in WORDS else None


def levels_of(metric: str) -> dict[str, float]:
    """Return reference levels of a metric by name: a random orthogonal matrix (Haar), a Hadamard matrix."""
    quantity = metric.rpartition("/")[2]
    if quantity == "isotropy" and (shape := re.fullmatch(r"probe/(\d+)x(\d+)/isotropy", metric)):
        m, n = int(shape[1]), int(shape[2])
        return {"a random matrix": sqrt((pi / 2 - 1) * min(m, n) / (m * n))}
    if quantity == "flatness":
        return {"a random matrix": sqrt(2 / pi), "a Hadamard matrix": 1.0}
    return {"a Hadamard matrix": 1.0} if quantity == "sign_spectral" else {}


def draw_levels(panel: Any, metric: str) -> list[float]:
    """Draw the reference levels of a metric; returns them, for the panel's limits."""
    for name, level in levels_of(metric).items():
        panel.axhline(level, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
        panel.annotate(name, (0.2, level), xycoords=("axes fraction", "data"), va="bottom", fontsize=9, color=INK)
    return list(levels_of(metric).values())
