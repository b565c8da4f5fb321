"""Draws OLion's geometry: the intersection of the unit balls of the spectral and the max norm.

    python -m scripts.geometry --out images/geometry.png

For m x n matrices, m >= n, A = {X'X = I} lies on the spectral unit sphere, B = {entries +-1/sqrt(m)} are the corners of
the scaled max-norm ball, and A and B intersect in the Hadamard matrices over sqrt(m). Each panel is a plane of matrices
x P + y Q. Both norms are homogeneous: the boundary in the direction (cos t, sin t) is 1 / norm(cos t P + sin t Q).
"""

from dataclasses import dataclass
from math import pi, sqrt
from pathlib import Path

from common.guard import main_guard
from common.options import parse_options


@dataclass(frozen=True)
class Options:
    """Draws the intersection of the unit balls of the spectral and the max norm."""

    out: Path = Path("images/geometry.png")
    """The figure; a JSON with its points is written beside it."""


if __name__ == "__main__":  # --help and errors before the imports below, which take seconds
    main_guard(lambda: parse_options(Options, "python -m scripts.geometry", __doc__))

import numpy as np
import torch
from torch import Tensor

from common.figure import FAINT, INK, STYLES, new_figure, save
from common.whole import write_json

ANGLES = 721  # every half degree
SPECTRAL, LARGEST = STYLES["muon"].color, STYLES["olion"].color


def sylvester(order: int) -> Tensor:
    """Return a Hadamard matrix whose order is a power of two: entries +-1, orthogonal rows."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def planes() -> dict[str, tuple[Tensor, Tensor]]:
    """Return the two matrices that span each plane, by title."""
    one = torch.eye(2, dtype=torch.float64)
    swap, mirror = one.flip(0), torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    eight = sylvester(8) / sqrt(8)
    generator = torch.Generator().manual_seed(0)
    random = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    return {
        "[[x, y], [y, -x]]: every matrix is a multiple of an orthogonal one": (mirror, swap),
        "[[x, y], [y, x]]: corners of the max-norm ball that have rank one": (one, swap),
        "x H + y Q: a Hadamard matrix of order 8, over its root, and a random orthogonal one": (eight, random),
    }


def edges(first: Tensor, second: Tensor) -> dict[str, list]:
    """Return the boundaries of both balls and the Hadamard points, as points (x, y) of the plane."""
    angles = torch.linspace(0, 2 * pi, ANGLES, dtype=torch.float64)
    around = torch.stack([angles.cos(), angles.sin()], 1)  # (angles, 2)
    matrices = torch.einsum("ap,pmn->amn", around, torch.stack([first, second]))
    spectral = torch.linalg.matrix_norm(matrices, 2)
    largest = matrices.abs().amax((1, 2)) * sqrt(max(first.shape))
    return {
        "spectral": (around / spectral[:, None]).tolist(),
        "max": (around / largest[:, None]).tolist(),
        "hadamard": (around / spectral[:, None])[is_hadamard(matrices / spectral[:, None, None])].tolist(),
    }


def is_hadamard(stack: Tensor, tolerance: float = 1e-9) -> Tensor:
    """Return whether each (m, n), m >= n, has orthonormal columns and entries of one size: (b, m, n) -> (b,)."""
    m, n = stack.shape[1:]
    off = (stack.mT @ stack - torch.eye(n, dtype=stack.dtype)).abs().amax((1, 2))
    return (off < tolerance) & ((stack.abs() * sqrt(m) - 1).abs().amax((1, 2)) < tolerance)


def draw(record: dict[str, dict], out: Path) -> None:
    figure, panels = new_figure(
        "Where the spectral and the max norm agree", "unit balls, their intersection, Hadamard points", rows=len(record)
    )
    for panel, (name, found) in zip(panels, record.items(), strict=True):
        spectral, largest = np.array(found["spectral"]), np.array(found["max"])
        inner = np.where((np.hypot(*spectral.T) < np.hypot(*largest.T))[:, None], spectral, largest)
        panel.fill(*inner.T, color="#E9E3D5", label="intersection")
        panel.plot(*spectral.T, color=SPECTRAL, linewidth=2, label="spectral norm 1")
        panel.plot(*largest.T, color=LARGEST, linewidth=2, linestyle=(0, (5, 2)), label="entries at most 1 / sqrt(m)")
        if found["hadamard"]:
            panel.plot(*np.array(found["hadamard"]).T, "o", color=INK, markersize=9, label="Hadamard matrix")
        panel.set_title(name, loc="left", fontsize=11, color=FAINT)
        panel.set_aspect("equal", adjustable="box", anchor="W")
        panel.set(xlabel="x", ylabel="y", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    panels[0].legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1.05, 0.5), frameon=False)
    save(figure, out)


def rounded(record: dict[str, dict]) -> dict[str, dict]:
    """Round the points to six digits."""
    return {
        name: {kind: [[round(x, 6), round(y, 6)] for x, y in points] for kind, points in found.items()}
        for name, found in record.items()
    }


def main() -> None:
    out = parse_options(Options, "python -m scripts.geometry", __doc__).out.with_suffix(".png")
    record = {name: edges(*spanned) for name, spanned in planes().items()}
    draw(record, out)
    write_json(out.with_suffix(".json"), rounded(record))
    print(f"the geometry: {out}, its points: {out.with_suffix('.json')}")


if __name__ == "__main__":
    main_guard(main)
