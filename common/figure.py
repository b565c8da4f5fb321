"""Style of figures and tables: one colour and marker per optimizer, labels at line ends."""

import statistics
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.evidence import digits_of
from common.runlog import shortest


class Style(NamedTuple):
    label: str
    color: str
    marker: str
    width: float = 1.8  # points
    weight: str = "normal"


# One style per optimizer in all figures. OLion has Okabe and Ito's vermilion. The others, near that palette's hues,
# differ by 27 or more in CIELAB under the simulations of the three kinds of colour blindness by Machado, Oliveira and
# Fernandes (2009), and are legible on white. Markers are for greyscale print.
STYLES = {
    "olion": Style("OLion", "#D55E00", "o", 3.2, "bold"),
    "muon": Style("Muon", "#0A48C8", "s"),
    "adamuon": Style("AdaMuon", "#06A07E", "^"),
    "lion": Style("Lion", "#B04FAE", "D"),
    "adamw": Style("AdamW", "#2B2B2B", "v"),
}
PAPERS = tuple(STYLES)  # the five that the OLion paper compares
# Related rules, in Tol's and Okabe and Ito's colours: eleven cannot all differ by 27, so markers distinguish them too.
STYLES |= {
    "normuon": Style("NorMuon", "#56B4E9", "<"),
    "lionmuon": Style("LionMuon", "#7A9A01", "p"),
    "signum": Style("Signum", "#A6761D", ">"),
    "polargrad": Style("PolarGrad", "#332288", "X"),
    "polarsgdm": Style("PolarSGDM", "#CC6677", "h"),
    "curvature": Style("Curvature", "#882255", "*"),
}
OTHERS = ("#44AA99", "#999933", "#661100", "#E69F00")  # of rules without a line above
INK, FAINT = "#222222", "#6E6E6E"


def style_of(optimizer: str) -> Style:
    """Return an optimizer's style; a rule without one gets a colour by its name."""
    fallback = Style(optimizer, OTHERS[zlib.crc32(optimizer.encode()) % len(OTHERS)], "P")
    return STYLES.get(optimizer.lower(), fallback)


def rate(lr: float | None) -> str:
    """Format a learning rate: 6e-4, 1.6e-2."""
    return "–" if lr is None else shortest(lr)


def push_apart(positions: list[float], gap: float) -> np.ndarray:
    """Move labels apart along one axis until neighbours are `gap` apart, keeping their order."""
    order = np.argsort(positions, kind="stable")
    placed = np.array(positions, dtype=float)[order]
    for _ in range(300):  # each pass halves an overlap; a dozen labels converge much sooner
        overlap = np.maximum(gap - np.diff(placed), 0) / 2
        placed[:-1] -= overlap
        placed[1:] += overlap
    return placed[np.argsort(order)]


def pyplot():
    """Import matplotlib.pyplot without a display; only when a figure is drawn, since it takes a second."""
    import matplotlib

    matplotlib.use("Agg")  # before pyplot: no display on a training machine
    import matplotlib.pyplot

    return matplotlib.pyplot


def new_figure(title: str, subtitle: str, rows: int = 1, sharey: bool = False):
    """Return (figure, [panel, ...]) in the project's style, legible at 800 pixels, half the saved width."""
    plt = pyplot()
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 12, "axes.edgecolor": FAINT})
    height = 1.0 + 3.8 * rows  # inches
    figure, axes = plt.subplots(rows, 1, figsize=(8, height), sharey=sharey, squeeze=False)
    figure.subplots_adjust(left=0.09, top=1 - 1.0 / height, bottom=0.62 / height, hspace=0.3)
    figure.text(0.02, 1 - 0.17 / height, title, fontsize=15, fontweight="bold", color=INK, va="top")
    figure.text(0.02, 1 - 0.5 / height, subtitle, fontsize=11, color=FAINT, va="top")
    for panel in axes[:, 0]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(colors=INK, length=3)
    return figure, list(axes[:, 0])


def label_ends(panel, ends: list[tuple[float, float, str, str]]) -> None:
    """Write labels (x, y, text, optimizer) right of the panel without overlap, each connected to its line's end."""
    longest = max(len(text) for _, _, text, _ in ends)
    room = max(0.5, 0.945 - 0.0108 * longest)  # a letter is about 1 % of the width
    panel.figure.subplots_adjust(right=min(room, panel.figure.subplotpars.right))  # another panel's may be longer
    bottom, top = panel.get_ylim()
    heights = [min(max(y, bottom), top) for _, y, _, _ in ends]
    to_axes = panel.transData + panel.transAxes.inverted()  # of any scale
    fractions = [float(to_axes.transform((x, y))[1]) for (x, *_), y in zip(ends, heights, strict=True)]
    places = push_apart(fractions, gap=0.072)  # a line of text
    # relpos: connect to the text's left edge; a line to its middle would cross other labels
    tie = {"arrowstyle": "-", "linewidth": 0.7, "alpha": 0.6, "shrinkA": 1, "relpos": (0, 0.5)}
    for (x, _, text, optimizer), height, place in zip(ends, heights, places, strict=True):
        style = style_of(optimizer)
        panel.annotate(
            text,
            xy=(x, height),
            xytext=(1.035, place),
            textcoords="axes fraction",
            color=style.color,
            fontweight=style.weight,
            va="center",
            annotation_clip=False,
            arrowprops=tie | {"color": style.color},
        )


def save(figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=200)
    pyplot().close(figure)


def mean_and_spread(values: list[float]) -> str:
    """Format mean and sample standard deviation with the decimals that the latter leaves: '1.678 ± 0.004 (3 seeds)'."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    deviation = statistics.stdev(values)
    digits = digits_of(deviation)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f} ({len(values)} seeds)"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table that is also aligned as plain text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    body = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in body
    )
