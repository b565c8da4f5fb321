"""Measures whether more projections than OLion's one come closer to the Hadamard matrices, on random matrices.

    python -m scripts.intersection --out images/intersection.png
    python -m scripts.intersection --shapes 768x768 --rounds 1 2 4 8 --seeds 0

A = {X'X = I}, B = {entries +-1/sqrt(m)}, m >= n; projections are the exact polar factor P_A (by SVD) and the sign P_B.

    alternating         X <- P_B(P_A(X)); one round is OLion's direction
    averaged            X <- (P_A(X) + P_B(X)) / 2
    dykstra             alternating, each projection corrected by its last change
    douglas-rachford    X <- X + P_B(2 P_A(X) - X) - P_A(X)

After each number of rounds the sign matrix S = P_B(X) (for Douglas-Rachford P_B(P_A(X))) is measured: its distance to
A, ||S - P_A(S)|| / sqrt(n), 0 for a Hadamard matrix; and the share of the gradient Z that it keeps, <Z, S> /
||Z||_nuclear, 1 for the polar factor, and larger only if S stretches a direction. Neither set is convex, so no method
need converge.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import sqrt
from pathlib import Path
from typing import Literal

from common.guard import main_guard
from common.options import parse_options


@dataclass(frozen=True)
class Options:
    """Measures whether more than one projection comes closer to the Hadamard matrices."""

    shapes: tuple[str, ...] = ("128x128", "512x128")
    """Shapes of the matrices, rows x columns."""
    rounds: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of rounds to measure."""
    seeds: tuple[int, ...] = (0, 1, 2)
    spectrum: Literal["gaussian", "decaying"] = "gaussian"
    """gaussian: independent entries; decaying: random singular vectors, singular values from 1 down to 1e-4."""
    out: Path = Path("images/intersection.png")
    """The figure; a JSON with its numbers is written beside it."""


if __name__ == "__main__":  # --help and errors before the imports below, which take seconds
    main_guard(lambda: parse_options(Options, "python -m scripts.intersection", __doc__))

import numpy as np
import torch
from torch import Tensor

from common import UserError
from common.figure import FAINT, label_ends, markdown, new_figure, save, style_of
from common.whole import write_json
from optimizers.polar import orthogonalize

LOOKS = {"alternating": "olion", "averaged": "muon", "dykstra": "adamuon", "douglas-rachford": "adamw"}  # colours
SPECTRA = {"gaussian": 0.0, "decaying": 4.0}  # decades spanned by the singular values


def draw_matrix(shape: tuple[int, int], spectrum: str, seed: int) -> Tensor:
    """Draw a matrix (m, n), m >= n, in float64."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if not SPECTRA[spectrum]:
        return z
    u, _, vh = torch.linalg.svd(z, full_matrices=False)
    return u * torch.logspace(0, -SPECTRA[spectrum], len(vh), dtype=torch.float64) @ vh


def to_orthogonal(x: Tensor) -> Tensor:
    """Return P_A(x), the nearest matrix with orthonormal columns."""
    return orthogonalize(x, form="svd", dtype=x.dtype)


def to_signs(x: Tensor) -> Tensor:
    """Return P_B(x), the nearest matrix with entries +-1/sqrt(m)."""
    return x.sign() / sqrt(len(x))


def alternating(x: Tensor) -> Iterator[Tensor]:
    while True:
        x = to_signs(to_orthogonal(x))
        yield x


def averaged(x: Tensor) -> Iterator[Tensor]:
    while True:
        orthogonal = to_orthogonal(x)
        x = (orthogonal + to_signs(x)) / 2
        yield to_signs(x)


def dykstra(x: Tensor) -> Iterator[Tensor]:
    taken_by_a, taken_by_b = torch.zeros_like(x), torch.zeros_like(x)
    while True:
        orthogonal = to_orthogonal(x + taken_by_a)
        taken_by_a = x + taken_by_a - orthogonal
        x = to_signs(orthogonal + taken_by_b)
        taken_by_b = orthogonal + taken_by_b - x
        yield x


def douglas_rachford(x: Tensor) -> Iterator[Tensor]:
    while True:
        orthogonal = to_orthogonal(x)
        yield to_signs(orthogonal)  # the first is OLion's, like alternating's
        x = x + to_signs(2 * orthogonal - x) - orthogonal


METHODS: dict[str, Callable[[Tensor], Iterator[Tensor]]] = {
    "alternating": alternating,
    "averaged": averaged,
    "dykstra": dykstra,
    "douglas-rachford": douglas_rachford,
}


def measure(method: str, z: Tensor, rounds: tuple[int, ...]) -> dict[str, list[float]]:
    """Return the distance to A and the share of the gradient kept, after each number of rounds."""
    start = z * (sqrt(z.shape[1]) / z.norm())  # the norm of members of A and of B
    nuclear = torch.linalg.svdvals(z).sum()
    found: dict[str, list[float]] = {"distance": [], "kept": []}
    for number, signs in enumerate(islice(METHODS[method](start), max(rounds)), start=1):
        if number in rounds:
            found["distance"].append(float((signs - to_orthogonal(signs)).norm() / sqrt(z.shape[1])))
            found["kept"].append(float((z * signs).sum() / nuclear))
    return found


def collect(options: Options) -> dict:
    """Measure all methods, shapes and seeds: {"512x128": {"dykstra": {"distance": (seeds, rounds), "kept": ...}}}."""
    record: dict = {"rounds": sorted(options.rounds), "seeds": list(options.seeds), "spectrum": options.spectrum}
    record["shapes"] = {}
    for text in options.shapes:
        shape = shape_of(text)
        matrices = [draw_matrix(shape, options.spectrum, seed) for seed in options.seeds]
        found = {name: [measure(name, z, tuple(record["rounds"])) for z in matrices] for name in METHODS}
        record["shapes"][text] = {
            name: {key: [of_seed[key] for of_seed in its] for key in ("distance", "kept")}
            for name, its in found.items()
        }
    return record


def shape_of(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit() and int(rows) >= int(columns) > 0):
        raise UserError(f"a shape must be ROWSxCOLUMNS, with at least as many rows as columns; got {text!r}")
    return int(rows), int(columns)


def draw(record: dict, out: Path) -> None:
    wanted = [(shape, key) for shape in record["shapes"] for key in ("distance", "kept")]
    title = {"distance": "distance of the {} signs to the orthogonal matrices", "kept": "share of the {} gradient kept"}
    subtitle = f"{record['spectrum']} matrices, mean of {len(record['seeds'])} seeds, band from lowest to highest"
    figure, panels = new_figure("Several projections instead of OLion's one", subtitle, rows=len(wanted))
    for panel, (shape, key) in zip(panels, wanted, strict=True):
        ends = []
        for name, found in record["shapes"][shape].items():
            values, style = np.array(found[key]), style_of(LOOKS[name])
            panel.plot(record["rounds"], values.mean(0), color=style.color, marker=style.marker)
            panel.fill_between(
                record["rounds"], values.min(0), values.max(0), color=style.color, alpha=0.18, linewidth=0
            )
            ends.append((record["rounds"][-1], values.mean(0)[-1], f"{values.mean(0)[-1]:.3f}  {name}", LOOKS[name]))
        panel.set_title(title[key].format(shape.replace("x", " x ")), loc="left", fontsize=11, color=FAINT)
        panel.set_xscale("log", base=2)
        panel.set_xticks(record["rounds"], record["rounds"])
        label_ends(panel, ends)
    panels[-1].set_xlabel("rounds")
    save(figure, out)


def table(record: dict) -> str:
    """Return a table of distance and share kept after the first round (OLion's direction) and the last."""
    first, last = record["rounds"][0], record["rounds"][-1]
    header = [
        "shape",
        "method",
        *(f"{key}, {n} rounds" for key in ("distance to A", "gradient kept") for n in (first, last)),
    ]
    rows = [
        [shape, name, *(f"{np.array(found[key])[:, i].mean():.3f}" for key in ("distance", "kept") for i in (0, -1))]
        for shape, methods in record["shapes"].items()
        for name, found in methods.items()
    ]
    return markdown(header, rows)


def main() -> None:
    options = parse_options(Options, "python -m scripts.intersection", __doc__)
    if not options.rounds or min(options.rounds) < 1 or not options.seeds:
        raise UserError(
            f"--rounds and --seeds need one number or more, rounds from 1; got {options.rounds}, {options.seeds}"
        )
    record, out = collect(options), options.out.with_suffix(".png")
    draw(record, out)
    write_json(out.with_suffix(".json"), record, indent=1)
    print(f"{table(record)}\n\nresiduals against rounds: {out}, its numbers: {out.with_suffix('.json')}")


if __name__ == "__main__":
    main_guard(main)
