"""Measures of runs of digits, their table and their figure: `python -m SIT.evaluate`."""

import math
import re
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from common import UserError, progress, warn
from common.config import at_least
from common.figure import FAINT, INK, markdown, mean_and_spread, new_figure, save, style_of
from common.json_files import read_object
from common.runlog import METRICS_FILE, read_metrics
from common.whole import write_json
from SIT.data import Pixels, digits, to_images
from SIT.digits import FOLDER, JUDGE_FILE, DigitsCNN, load_digits_cnn
from SIT.files import check_memory
from SIT.sample import Sampler
from SIT.sampling import draw, labels_of, load_run, picture

if TYPE_CHECKING:
    from SIT.evaluate import Options

COLUMNS, LINES = 20, 2  # of a method's digits in the figure; classes cycle, twice per line
CLASSES = 10
MEASURES = {
    "denoising": "denoising loss",
    "projection": "projection loss",
    "recognised": "recognised",
    "frechet": "Frechet distance",
}
EDGE = 1  # pixels around a digit
DRAWN_AT_ONCE = 250


@dataclass(frozen=True)
class Run:
    """Images drawn from a run, and their measures."""

    folder: str
    optimizer: str
    images: Tensor  # (n, 1, 8, 8) uint8
    recognised: float
    frechet: float
    denoising: float = math.nan  # its last losses on the validation digits
    projection: float = math.nan

    @property
    def method(self) -> str:
        """The run's name without its seed: group, optimizer and learning rates."""
        return re.sub(r"-s\d+$", "", self.folder)


def frechet(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance between Gaussians fitted to features (n, D) and (m, D), in float64.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), Heusel et al., arXiv 1706.08500.
    """
    first, second = first.double(), second.double()
    covariances = first.T.cov(), second.T.cov()
    # The eigenvalues of C1 C2 are not negative, except by rounding.
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt()
    traces = covariances[0].trace() + covariances[1].trace() - 2 * roots.sum()
    return ((first.mean(0) - second.mean(0)).square().sum() + traces).item()


@torch.no_grad()
def measure(images: Tensor, labels: Tensor, judge: DigitsCNN, reference: Pixels) -> dict[str, float]:
    """Return the fraction of images (n, 1, 8, 8) recognised as their labels (n,), and the Frechet distance."""
    recognised = (judge(images).argmax(1) == labels).double().mean().item()
    return {"recognised": recognised, "frechet": frechet(judge.features(images), judge.features(reference.images))}


def find_runs(folders: tuple[Path, ...], skip_latents: bool = False) -> list[Path]:
    """Return the runs with a checkpoint, except diverged ones and those moved aside by a later run.

    skip_latents: skip runs that are not of digits; otherwise they are included, and finding no run is a UserError.
    """
    found = []
    for run in sorted({path.parent for folder in folders for path in folder.rglob("config.json")}):
        end = run / "finished.json"
        if skip_latents and not is_of_digits(run):
            continue
        if end.is_file() and read_object(end, {"diverged": bool}, "remove it, or leave the run out")["diverged"]:
            warn(f"{run} diverged; skipped")
        elif any(run.glob("checkpoints/step-*")) and not run.parent.name.endswith(".old"):
            found.append(run)
    if not found and not skip_latents:
        raise UserError(f"need folders of runs with checkpoints; {', '.join(map(str, folders))} has none")
    return found


def is_of_digits(run: Path) -> bool:
    """Return whether a run was trained on digits."""
    record = read_object(run / "config.json", {"config": {"data": {"kind": str}}}, "leave the run out")
    return record["config"]["data"]["kind"] == "digits"


def last_losses(run: Path) -> dict[str, float]:
    """Return the denoising and the projection loss of a run's last validation."""
    names = {name: f"val/{name}_loss" for name in ("denoising", "projection")}
    validated = [line for line in read_metrics(run) if all(key in line for key in names.values())]
    if not validated:
        raise UserError(f"{run / METRICS_FILE} must hold a validation, holds none: leave the run out")
    return {name: validated[-1][key] for name, key in names.items()}


def draw_digits(run: Path, options: "Options") -> tuple[Tensor, Tensor, str]:
    """Draw a run's digits; returns images (n, 1, 8, 8), requested labels (n,) and the optimizer's name."""
    device = torch.device("cpu")  # fast enough for these models
    model, settings = load_run(run, device)
    if settings["data"]["kind"] != "digits":
        raise UserError(f"{run} must be a run of digits; of others draw images with SIT.sample --npz, and give them")
    parts = []
    for start in range(0, options.count, DRAWN_AT_ONCE):
        numbers = list(range(start, min(start + DRAWN_AT_ONCE, options.count)))
        parts.append(to_images(draw(model, numbers, Sampler(options.steps), settings["objective"], 0, device)))
    labels = labels_of(list(range(options.count)), model.config.n_class)
    return torch.cat(parts), labels, settings["optimizer"]["name"]


def evaluate_digits(options: "Options") -> str:
    """Measure all runs; writes the figure and its JSON, and returns the table."""
    at_least(COLUMNS * LINES, options, "count")
    at_least(1, options, "steps")
    check_memory(options.count * digits()["val"].images[0].numel(), "--count")
    out = options.out or options.samples[0] / "samples.png"
    folders = find_runs(options.samples, options.skip_latents)
    if not folders:
        return f"no run of digits to measure in {', '.join(map(str, options.samples))}"
    splits, judge = digits(), load_digits_cnn(FOLDER / JUDGE_FILE)
    methods: dict[str, list[Run]] = defaultdict(list)
    for folder in progress(folders, desc="evaluating", unit="run"):
        images, labels, optimizer = draw_digits(folder, options)
        measures = measure(images, labels, judge, splits["train"])
        measures |= last_losses(folder)
        run = Run(f"{folder.absolute().parent.name}/{folder.name}", optimizer, images, **measures)
        if run.folder in [other.folder for other in methods[run.method]]:
            raise UserError(f"runs must differ in group, method or seed; two are {run.folder}: evaluate them singly")
        methods[run.method].append(run)
    best_first = sorted(methods.values(), key=lambda runs: statistics.fmean(run.frechet for run in runs))
    real = measure(splits["val"].images, splits["val"].labels, judge, splits["train"])
    draw_picture(best_first, Run("", "real", examples(splits["val"]), **real), options.count, out)
    names = ("folder", "optimizer", *MEASURES)
    runs = [{name: vars(run)[name] for name in names} for runs in best_first for run in runs]
    record = {"count": options.count, "steps": options.steps, "validation": real, "runs": runs}
    write_json(out.with_suffix(".json"), record, indent=1)
    return f"{table(best_first, real)}\n\ndigits of each: {out}"


def table(methods: list[list[Run]], real: dict[str, float]) -> str:
    """Return a table: the validation digits, then each method with mean and spread over its seeds."""
    rows = [["validation digits", "", *(f"{real[name]:.3f}" if name in real else "" for name in MEASURES)]]
    for runs in methods:
        measures = [mean_and_spread([vars(run)[name] for run in runs]) for name in MEASURES]
        rows.append([style_of(runs[0].optimizer).label, runs[0].method, *measures])
    return markdown(["optimizer", "runs", *MEASURES.values()], rows)


def draw_picture(methods: list[list[Run]], real: Run, count: int, out: Path) -> None:
    """Draw the first digits of each method's first run below real ones, names on the left, measures on the right."""
    runs = [real, *(of_method[0] for of_method in methods)]
    optimizers = [run.optimizer for run in runs]
    several = len(set(optimizers)) < len(runs)  # methods of one optimizer
    names = [style_of(run.optimizer).label if run is real or not several else run.method for run in runs]
    cell = real.images.shape[-1] + 2 * EDGE  # pixels
    height, gap = LINES * cell, cell // 3
    shown = [pad(run.images[: COLUMNS * LINES], [EDGE] * 4) for run in runs]
    canvas = np.concatenate([np.pad(picture(each, COLUMNS, least_side=cell), ((0, gap), (0, 0))) for each in shown])
    groups = ", ".join(sorted({run.folder.split("/")[0] for run in runs[1:]}))
    subtitle = f"recognised: the fraction of {count:,} that a judge assigns to the requested class"
    figure, (panel,) = new_figure(f"sit, {groups}: samples", subtitle)
    letter = 0.0125  # of the figure's width
    figure.subplots_adjust(left=0.035 + letter * max(map(len, names)), right=0.79, bottom=0.02)
    panel.imshow(canvas, cmap="gray_r", interpolation="nearest")
    panel.set_anchor("NW")
    panel.grid(False)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0, labeltop=True, labelbottom=False)
    classes = [number % CLASSES for number in range(COLUMNS)]
    panel.set_xticks(cell * (np.arange(COLUMNS) + 0.5) - 0.5, labels=classes, color=FAINT)
    middles = (height + gap) * np.arange(len(runs)) + height / 2 - 0.5
    panel.set_yticks(middles, labels=names)
    for label, run, middle in zip(panel.get_yticklabels(), runs, middles, strict=True):
        style = style_of(run.optimizer)
        label.set(color=INK if run is real else style.color, fontweight=style.weight)
        measures = f"{run.recognised:.1%} recognised\nFrechet {run.frechet:.2f}"
        panel.text(canvas.shape[1] + EDGE, middle, measures, color=FAINT, fontsize=11, va="center")
    save(figure, out)


def examples(items: Pixels) -> Tensor:
    """Return as many of these as the figure shows per method, (n, 1, 8, 8), in cyclic order of classes."""
    of_class = [items.images[items.labels == label][: COLUMNS * LINES // CLASSES] for label in range(CLASSES)]
    return torch.stack(of_class, dim=1).flatten(0, 1)
