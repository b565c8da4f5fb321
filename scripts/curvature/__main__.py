"""Measure H(r) on the checkpoints of a run, fit its exponents, draw it and print a table; see the package."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import UserError
from common.config import at_least
from common.guard import main_guard
from common.options import parse_options
from scripts import curvature


@dataclass(frozen=True)
class Options:
    """Measure H(r) on checkpoints of a run of any experiment, and fit its exponents."""

    run: Path
    """Folder of a run, or the JSON of an earlier measurement."""
    steps: tuple[int, ...] = ()
    """Checkpoints to measure; 0 is the initialization. Default: 0 and all that the run kept."""
    directions: int = 4
    """Random directions of each matrix."""
    rows: int = 2
    """Sequences, or images, of the batch."""
    decades: tuple[int, int] = (-5, 2)
    """Powers of ten of the smallest and the largest r."""
    per_decade: int = 2
    """Values of r per decade."""
    seed: int = 0
    out: Path = Path("images/curvature.png")
    """The picture; a JSON with all values of H lies beside it."""


def check(options: Options) -> None:
    """Raise UserError for options out of their ranges."""
    at_least(1, options, "directions", "rows", "per_decade")
    at_least(0, options, "seed")
    if not -15 <= options.decades[0] < options.decades[1] <= 15:
        raise UserError(f"--decades takes two powers of ten from -15 to 15, the smaller first; got {options.decades}")


if __name__ == "__main__":  # --help and errors before the imports below, which take seconds
    main_guard(lambda: check(parse_options(Options, "python -m scripts.curvature", curvature.__doc__)))

import numpy as np

from common.figure import FAINT, INK, markdown, new_figure, pyplot, save
from common.json_files import read_object
from common.whole import write_json
from scripts.curvature.growth import TRUSTED, WHOLE, fit, measure

RECORD = {"run": str, "radii": [float], "directions": int, "steps": dict}


def collect(options: Options) -> dict[str, Any]:
    """Measure every requested step, and write the record after each."""
    from scripts.curvature.subjects import open_run  # here, as a record is drawn again without an experiment

    subject = open_run(options.run, options.rows)
    steps = options.steps or tuple(subject.steps)
    if absent := sorted(set(steps) - set(subject.steps)):
        raise UserError(f"--steps must be among {subject.steps}, which {options.run} has; got {absent}")
    low, high = options.decades
    radii = [10 ** (low + k / options.per_decade) for k in range((high - low) * options.per_decade + 1)]
    record = {"run": str(options.run), "rows": options.rows, "directions": options.directions, "seed": options.seed}
    record |= {"radii": radii, "steps": {}}
    for step in steps:
        subject.load(step)
        loss = float(subject.loss())
        found, rounding = measure(subject.loss, subject.matrices, radii, options.directions, options.seed)
        record["steps"][str(step)] = {"loss": loss, "rounding": rounding, "growth": found}
        write_json(options.out.with_suffix(".json"), record)  # a step takes minutes; an interruption loses none
    return record


def table(record: dict[str, Any]) -> str:
    """Format the fits of each matrix at each step."""

    def number(value: float | None, error: float | None = None, form: str = ".3f") -> str:
        return "–" if value is None else f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")

    rows = []
    for step, at in record["steps"].items():
        for name, found in at["growth"].items():
            of = fit(record["radii"], found, at["rounding"])
            small = [number(of["plateau"], form=".2e"), number(of["leaves"], form=".1e")]
            fitted = [number(of["decades"], form=".1f"), number(of["exponent"], of["error"])]
            steepest = [number(of["steepest"], of["steepest_error"]), number(of["at"], form=".1e")]
            rows.append([step, name, *small, *fitted, *steepest])
    header = [
        "step",
        "matrix",
        "H/r² at small r",
        "10 % off at r",
        "decades",
        "exponent",
        "steepest decade",
        "around r",
    ]
    return markdown(header, rows)


def kind_of(name: str) -> str:
    """Return a matrix' name without the number of its layer: blocks.3.mlp.c_fc.weight is mlp.c_fc."""
    parts = name.removesuffix(".weight").split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :]) or name


def draw(record: dict[str, Any], out: Path) -> None:
    """Draw H(r) at the last step and H(r) / r² at all steps: mean over layers, band from the lowest to the highest."""
    steps, radii = list(record["steps"]), np.array(record["radii"])
    subtitle = f"mean of {record['directions']} directions; bands: from the lowest layer to the highest"
    figure, panels = new_figure("Growth of the loss around the weights", subtitle, rows=1 + len(steps))
    kinds = list(dict.fromkeys(map(kind_of, record["steps"][steps[-1]]["growth"])))
    colors = dict(zip(kinds, pyplot().get_cmap("tab10").colors, strict=False)) | {WHOLE: INK}
    shown = [(steps[-1], 0, "H(r) at step {}, nats"), *((step, 2, "H(r) / r² at step {}") for step in steps)]
    for panel, (step, power, title) in zip(panels, shown, strict=True):
        at = record["steps"][step]
        for kind in kinds:
            values = np.array([np.mean(found, 0) for name, found in at["growth"].items() if kind_of(name) == kind])
            known = (values > TRUSTED * at["rounding"]).all(0)
            color, x, y = colors.get(kind, FAINT), radii[known], values[:, known] / radii[known] ** power
            panel.plot(x, y.mean(0), label=kind, color=color, linewidth=2.4 if kind == WHOLE else 1.6)
            panel.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15, linewidth=0)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(title.format(step), loc="left", fontsize=11, color=FAINT)
    panels[0].legend(frameon=False, fontsize=10)
    panels[-1].set_xlabel("r")
    save(figure, out)


def main() -> None:
    options = parse_options(Options, "python -m scripts.curvature", curvature.__doc__)
    check(options)
    again = options.run.suffix == ".json"
    record = read_object(options.run, RECORD, "name a record of scripts.curvature") if again else collect(options)
    out = (options.run if again else options.out).with_suffix(".png")
    draw(record, out)
    print(f"{table(record)}\n\nH(r) and H(r)/r²: {out}, its values: {out.with_suffix('.json')}")


if __name__ == "__main__":
    main_guard(main)
