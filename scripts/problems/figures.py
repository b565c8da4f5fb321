"""The figures of the problems: courses of every optimizer, and isotropy against the distance to Muon."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.figure import FAINT, INK, label_ends, new_figure, pyplot, save, style_of
from scripts.problems.isotropy import behind

PANELS = (  # quantity, schedule, title
    ("gap", "fixed", "f - f*, best fixed rate"),
    ("gap", "decaying", "f - f*, best decaying rate"),
    ("norm", "decaying", "norm of the gradient, best decaying rate"),
    ("condition", "decaying", "condition number of the gradient, best decaying rate"),
)
VARIANTS = ("PolarGrad, no momentum",)  # in another optimizer's colour
LOWEST = 1e-16  # of the drawn range: smaller values are rounding


def draw(record: dict[str, Any], out: Path) -> None:
    """Draw geometric means over the seeds, bands from the lowest to the highest."""
    subtitle = f"geometric mean of {len(record['seeds'])} seeds, each optimizer at its own best rate"
    figure, panels = new_figure(record["title"], subtitle, rows=len(PANELS))
    for panel, (quantity, schedule, words) in zip(panels, PANELS, strict=True):
        ends = []
        panel.set_yscale("log")
        for label, method in record["methods"].items():
            if label == "Newton" and quantity == "condition":
                continue  # rounding after a few steps
            found, style = method.get(schedule, method["fixed"]), style_of(method["look"])
            values = np.array(found[quantity], dtype=float).clip(LOWEST)  # (S, points)
            known = np.isfinite(values).all(0)
            x, y = np.array(record["points"])[known], values[:, known]
            middle, looks = np.exp(np.log(y).mean(0)), {"color": style.color, "linewidth": style.width}
            dashed = "--" if label in VARIANTS else "-"
            panel.plot(x, middle, linestyle=dashed, marker=style.marker, markevery=max(1, len(x) // 5), **looks)
            panel.fill_between(x, y.min(0), y.max(0), color=style.color, alpha=0.12, linewidth=0)
            ends.append((x[-1], middle[-1], label, method["look"]))
        panel.set_xlim(0, record["steps"])
        panel.set_title(words, loc="left", fontsize=11, color=FAINT)
        label_ends(panel, ends)
    panels[-1].set_xlabel("step")
    save(figure, out)


def draw_isotropy(record: dict[str, Any], out: Path) -> None:
    """Draw OLion's distance to Muon against eps over Haar's, a line along each dial; the dial's end is a ring."""
    title = "Where OLion falls behind Muon"
    subtitle = f"quadratics after {record['steps']} steps, best rates; mean and range of {len(record['seeds'])} seeds"
    figure, (panel,) = new_figure(title, subtitle)
    colors = pyplot().get_cmap("tab10").colors
    for color, (structure, of) in zip(colors, record["structures"].items(), strict=False):
        eps, gap = torch.tensor(of["eps"]), behind(of)
        x, y = eps.mean(1).numpy(), gap.mean(1).numpy()
        panel.plot(x, y, "o-", color=color, label=structure)
        panel.vlines(x, gap.amin(1).numpy(), gap.amax(1).numpy(), color=color, linewidth=4, alpha=0.3)
        panel.plot(x[-1], y[-1], "o", markersize=13, markerfacecolor="none", color=color)
    panel.axhline(0, color=INK, linewidth=0.8)
    panel.set_xlabel("deviation from isotropy, eps, over that of a Haar matrix")
    panel.set_title("decades by which OLion's f - f* lies above Muon's", loc="left", fontsize=11, color=FAINT)
    panel.plot([], [], "o", markersize=13, markerfacecolor="none", color=INK, label="dial at 1")
    panel.legend(frameon=False, fontsize=10)
    save(figure, out)
