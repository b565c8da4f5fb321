"""Compare optimizers on small matrix problems: tables and figures; see the package."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from common.guard import main_guard
from common.options import parse_options
from scripts import problems


@dataclass(frozen=True)
class Options:
    """Compare optimizers on small matrix problems, each at its best rate."""

    problems: tyro.conf.Positional[tuple[str, ...]] = ()
    """quadratic, logistic, completion or isotropy. Default: all."""
    steps: int = 300
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("images")
    """Folder of the pictures, problems_NAME.png, beside each the JSON of what it shows."""


if __name__ == "__main__":  # --help and errors before the imports below, which take seconds
    main_guard(lambda: parse_options(Options, "python -m scripts.problems", problems.__doc__))

import numpy as np
import torch
from torch import Tensor

from common import UserError, progress
from common.config import at_least
from common.figure import markdown
from common.whole import write_json
from scripts.problems import figures, isotropy, theorem
from scripts.problems.objectives import PROBLEMS, Problem
from scripts.problems.running import METHODS, Course, newton, points, tune

EVERY = 5  # steps between recorded points
NAMES = (*PROBLEMS, "isotropy")


def compare(name: str, seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Tune every optimizer on a problem, with fixed and decaying rates, and record its course of each seed."""
    problem, methods = PROBLEMS[name](seeds), {}
    for method in progress(METHODS, desc=name, unit="optimizer"):
        found = {}
        for schedule in ("fixed", "decaying"):
            best = tune(problem, method, schedule == "decaying", steps, every=EVERY)
            found[schedule] = {"rate": best.rate, "bracketed": best.bracketed, **recorded(best.course)}
        methods[method.label] = {"look": method.rule, **found}
    if problem.newton:
        fixed = {"rate": 1.0, "bracketed": True, **recorded(newton(problem, steps, EVERY))}
        methods["Newton"] = {"look": "newton", "fixed": fixed}
    record = {
        "title": problem.title,
        "seeds": list(seeds),
        "steps": steps,
        "points": points(steps, EVERY),
        "methods": methods,
    }
    return record | ({"theorem": checked(problem, steps)} if problem.convexity is not None else {})


def recorded(course: Course) -> dict[str, list]:
    """Give each seed's gaps, gradient norms and condition numbers as lists, to four digits; None for NaN."""

    def rounded(column: Tensor) -> list[list[float | None]]:
        rows = column.T.tolist()
        return [[float(f"{value:.4g}") if np.isfinite(value) else None for value in of_seed] for of_seed in rows]

    return {name: rounded(column) for name, column in course._asdict().items()}


def checked(problem: Problem, steps: int) -> dict[str, Any]:
    """Return the least factor by which a step of PolarGrad exceeds the theorem's bound, for each seed."""
    found = theorem.check(problem, steps)
    conditions = (1 / problem.convexity).tolist()
    return {"kappa": conditions} | {name: column.amin(0).tolist() for name, column in found._asdict().items()}


def table(record: dict[str, Any]) -> str:
    """Format the remaining f - f* at each optimizer's best rate, as geometric mean and range over seeds."""
    rows = []
    for label, method in record["methods"].items():
        cells = []
        for schedule in ("fixed", "decaying"):
            if found := method.get(schedule):
                left = np.array([gap[-1] / gap[0] for gap in found["gap"]]).clip(1e-16)
                words = f"{np.exp(np.log(left).mean()):.1e} ({left.min():.0e} to {left.max():.0e})"
                cells += [power_of_two(found["rate"]) + ("" if found["bracketed"] else ", edge"), words]
            else:
                cells += ["–", "–"]
        rows.append([label, *cells])
    heads = ["fixed: rate", "f - f* left", "decaying: rate", "f - f* left"]
    return markdown([record["title"], *heads], rows)


def power_of_two(rate: float) -> str:
    return f"2^{math.log2(rate):g}"


def theorem_words(found: dict[str, Any]) -> str:
    rank, condition = min(found["by_rank"]), min(found["by_condition"])
    return (
        f"PolarGrad at the theorem's rate: each step shrinks f - f* by at least {rank:.2f} times 1 / (r kappa) and "
        f"{condition:.3g} times 1 / (kappa_G^2 kappa); 1 is promised"
    )


def isotropy_table(record: dict[str, Any]) -> str:
    """Format isotropy and OLion's distance to Muon and to Lion at every dial, mean over the seeds."""
    rows = []
    for structure, of in record["structures"].items():
        to_muon, to_lion = isotropy.behind(of), isotropy.behind(of, "Lion")
        eps, flatness = torch.tensor(of["eps"]), torch.tensor(of["flatness"])
        for i, dial in enumerate(record["dials"]):
            spread = f"{to_muon[i].mean():+.2f} ({to_muon[i].min():+.2f} to {to_muon[i].max():+.2f})"
            best = [power_of_two(of["methods"][label]["rates"][i]) for label in ("OLion", "Muon")]
            edge = [label for label, each in of["methods"].items() if not each["bracketed"][i]]
            measured = [f"{eps[i].mean():.2f}", f"{flatness[i].mean():.3f}"]
            rows.append(
                [structure, f"{dial:g}", *measured, spread, f"{to_lion[i].mean():+.2f}", *best, ", ".join(edge)]
            )
    heads = ["eps / Haar's", "flatness", "decades behind Muon", "behind Lion", "OLion's rate", "Muon's", "at the edge"]
    return markdown(["structure", "dial", *heads], rows)


def correlations(record: dict[str, Any]) -> dict[str, float]:
    """Return the rank correlations of eps and flatness with the decades behind Muon, over all dials and seeds."""
    gaps = torch.stack([isotropy.behind(of) for of in record["structures"].values()])
    return {
        name: isotropy.rank_correlation(torch.tensor([of[name] for of in record["structures"].values()]), gaps)
        for name in ("eps", "flatness")
    }


def main() -> None:
    options = parse_options(Options, "python -m scripts.problems", problems.__doc__)
    at_least(1, options, "steps")
    if unknown := [name for name in options.problems if name not in NAMES]:
        raise UserError(f"a problem is one of {', '.join(NAMES)}; got {unknown[0]}")
    if not options.seeds or min(options.seeds) < 0 or len(set(options.seeds)) < len(options.seeds):
        raise UserError(f"--seeds takes different whole numbers from 0 up; got {options.seeds}")
    torch.set_num_threads(1)  # more threads are slower on matrices this small
    for name in options.problems or NAMES:
        out = options.out / f"problems_{name}.png"
        if name == "isotropy":
            record = isotropy.study(options.seeds, options.steps)
            record["correlation"] = correlations(record)
            figures.draw_isotropy(record, out)
            said = ", ".join(f"of {key} {value:+.2f}" for key, value in record["correlation"].items())
            words = f"{isotropy_table(record)}\n\nrank correlation with the decades behind Muon: {said}"
        else:
            record = compare(name, options.seeds, options.steps)
            figures.draw(record, out)
            words = table(record) + (f"\n\n{theorem_words(record['theorem'])}" if "theorem" in record else "")
        write_json(out.with_suffix(".json"), record)
        print(f"{words}\n\n{out}, its numbers: {out.with_suffix('.json')}\n")


if __name__ == "__main__":
    main_guard(main)
