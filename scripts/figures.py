"""Draws the curves of any runs, of any experiment, and prints their table.

    python -m scripts.figures runs/nanogpt/default --out images/nanogpt.png
    python -m scripts.figures 'runs/nanogpt/*/olion-*' runs/nanogpt/default/muon-lr1e-3-s1337 --x tokens
    python -m scripts.figures runs/llama/sft --metric val/loss val/exact_match    # a panel each, in one picture
    python -m scripts.figures images/nanogpt.json        # the same picture again, from its record alone

Beside the PNG lies a JSON with the points that were drawn and each run's config and machine.
"""

import glob
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.ticker import EngFormatter, MaxNLocator

from common.figure import FAINT, label_ends, markdown, mean_and_spread, new_figure, rate, save, style_of
from common.launch import main_guard
from common.runlog import read_metrics

DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))  # several lines of one optimizer
NAMES = {
    "val/loss": "validation loss",
    "val/bits_per_byte": "validation loss, bits a byte",
    "val/exact_match": "responses repeated exactly, share",
    "val/pretrain_loss": "loss on the pretraining text, nats a token",
    "val/denoising_loss": "denoising loss on validation images",
    "val/projection_loss": "projection loss on validation images",
    "train/loss": "training loss",
    "step_ms": "time a step, ms",
    "optimizer_ms": "time in the optimizer, ms",
}
TOKEN_LOSSES, TEXT = ("val/loss", "train/loss"), {"nanogpt", "llama"}  # nats a token in experiments with text
LOSSES = ("loss", "bits_per_byte")  # how their names end
COLUMNS = {  # of the table -> heading, digits after the point
    "val/loss": ("val loss", 3),
    "val/bits_per_byte": ("bits per byte", 3),
    "val/exact_match": ("exact match", 3),
    "val/pretrain_loss": ("pretraining loss", 3),
    "val/denoising_loss": ("denoising loss", 3),
    "val/projection_loss": ("projection loss", 3),
    "step_ms": ("ms a step", 1),
    "optimizer_ms": ("ms in the optimizer", 2),
    "optimizer_state_mb": ("optimizer state MB", 2),
}
# Settings that make no other method: runs that differ in these alone are repetitions of one.
BOOKKEEPING = {"seed", "resume", "wandb", "checkpoint", "device", "out"}


@dataclass(frozen=True)
class Options:
    """Draws curves of runs and prints their table."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, folders that hold runs at any depth, globs of those, or the one JSON beside a figure."""
    out: Path | None = None
    """The picture; its JSON lies beside it. Default: images/EXPERIMENT_GROUP.png, or the picture of the JSON."""
    metric: tuple[str, ...] = ("val/loss",)
    """Which recorded quantities are drawn against --x, a panel each."""
    x: str = "step"
    """step, tokens, or any other recorded quantity."""
    title: str | None = None
    """Default: the experiment and its group."""
    ylim: tuple[float, float] | None = None
    """Lowest and highest value shown, of a single metric. Default: all, a loss cut above what its last 3/5 reach."""


@dataclass(frozen=True)
class Run:
    """What one run recorded: points to draw, figures for the table, and where they come from."""

    name: str
    experiment: str
    group: str
    torch: str
    machine: Any
    config: dict
    summary: dict  # column of the table -> number
    points: dict[str, dict[str, list[float]]]  # metric -> {"x": [...], "y": [...]}, of the metrics that it has

    @property
    def optimizer(self) -> str:
        return str(self.config.get("optimizer", {}).get("name", self.name.split("-")[0]))


@dataclass(frozen=True)
class Line:
    """Runs that differ in their seed alone, drawn as one line."""

    optimizer: str
    label: str
    dash: Any
    runs: list[Run]

    def having(self, metric: str) -> "Line":
        return replace(self, runs=[run for run in self.runs if metric in run.points])

    def points(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """x (points,) at which every run has a value, and y (runs, points)."""
        drawn = [run.points[metric] for run in self.runs]
        curves = [dict(zip(points["x"], points["y"], strict=True)) for points in drawn]
        shared = sorted(set.intersection(*map(set, curves)))
        if not shared:
            names = ", ".join(run.name for run in self.runs)
            raise ValueError(f"a mean needs points that all seeds share; {names} share no {metric}: draw them apart")
        return np.array(shared), np.array([[curve[x] for x in shared] for curve in curves])


def method(config: dict, prefix: str = "") -> dict[str, Any]:
    """The settings that make a method, flat: {"optimizer": {"lr": 1}, "seed": 2} -> {"optimizer.lr": 1}"""
    flat = {}
    for key, value in config.items():
        if prefix or key not in BOOKKEEPING:
            flat |= method(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def read_config(folder: Path) -> dict:
    """A run's config.json, the learning rate that was used standing in `optimizer.lr`; {} where there is none."""
    path = folder / "config.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    if isinstance(optimizer := record.get("config", {}).get("optimizer"), dict):
        tuned = optimizer.pop("tuned_lr", {})  # the rates that stand in for one that was not asked for
        if optimizer.get("lr") is None:
            optimizer["lr"] = tuned.get(optimizer.get("name"))
    return record


def find_runs(patterns: tuple[str, ...]) -> list[Path]:
    """Run folders named by paths, parents or globs; refuses to go on with none, naming what is there instead."""
    found: dict[Path, None] = {}  # a dict keeps the order and drops repetitions
    empty = []
    for pattern in patterns:
        paths = [Path(pattern)] if Path(pattern).exists() else sorted(map(Path, glob.glob(pattern)))
        runs = [metrics.parent for path in paths for metrics in sorted(path.rglob("metrics.jsonl"))]
        runs = [run for run in runs if not run.parent.name.endswith(".old")]  # what a later run moved aside
        if not runs:
            there = sorted(entry.name for path in paths if path.is_dir() for entry in path.iterdir())
            held = ", ".join(there[:8] + ["..."] * (len(there) > 8)) or "nothing"
            empty.append(f"a run is a folder with metrics.jsonl; no run in {pattern}, found there: {held}")
            if not paths:
                raise FileNotFoundError(empty[-1])
        found |= dict.fromkeys(runs)
    if not found:
        raise FileNotFoundError(empty[0] if empty else "name the runs to draw, such as runs/nanogpt/default")
    for line in empty:  # a shell's * also names folders of logs
        print(f"left out: {line}", file=sys.stderr)
    return list(found)


def summarize(lines: list[dict]) -> dict[str, float]:
    """The table's numbers: the last of what is a result, the median of what is a time."""

    def values(key: str) -> list[float]:
        return [line[key] for line in lines if line.get(key) is not None]

    times = ("step_ms", "optimizer_ms")
    return {k: statistics.median(values(k)) if k in times else values(k)[-1] for k in COLUMNS if values(k)}


def read_run(folder: Path, metrics: tuple[str, ...], x: str) -> Run | None:
    """One run, or None when it has no point to draw; what it lacks is said on stderr."""
    lines, points = read_metrics(folder), {}
    for metric in metrics:
        if drawn := [line for line in lines if all(line.get(key) is not None for key in (x, metric))]:
            points[metric] = {"x": [line[x] for line in drawn], "y": [line[metric] for line in drawn]}
    if lacking := [metric for metric in metrics if metric not in points]:
        print(f"left out: {folder} has no {' or '.join(lacking)} against {x} (yet)", file=sys.stderr)
    if not points:
        return None
    if not (record := read_config(folder)):
        raise FileNotFoundError(f"a run has config.json beside metrics.jsonl; {folder} does not: leave it out")
    return Run(
        **{key: record.get(key) or "" for key in ("name", "experiment", "group", "torch", "machine")},
        config=record.get("config", {}),
        summary=summarize(lines),
        points=points,
    )


def group_lines(runs: list[Run]) -> list[Line]:
    """One line for the runs that differ in their seed alone; its label says what sets it apart from its likes."""
    lines = []
    in_order = sorted(runs, key=lambda run: run.optimizer)  # sorted() is stable
    for optimizer, its_runs in groupby(in_order, key=lambda run: run.optimizer):
        repetitions: dict[str, list[Run]] = {}
        for run in its_runs:
            settings = method(run.config) | {"experiment": run.experiment, "group": run.group}
            repetitions.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
        methods = [json.loads(text) for text in repetitions]
        keys = dict.fromkeys(key for settings in methods for key in settings)
        apart = [key for key in keys if len({str(settings.get(key)) for settings in methods}) > 1]
        for settings, dash, members in zip(methods, cycle(DASHES), repetitions.values(), strict=False):
            label = style_of(optimizer).label
            for key in apart[:3]:  # more would not fit
                value = settings.get(key)
                label += f" {key.split('.')[-1]} {rate(value) if key.endswith('lr') else value}"
            lines.append(Line(optimizer, label, dash, members))
    return lines


def name_of(metric: str, lines: list[Line]) -> str:
    """What a panel calls a metric."""
    of_text = {run.experiment for line in lines for run in line.runs} <= TEXT
    return NAMES.get(metric, metric) + (", nats a token" if of_text and metric in TOKEN_LOSSES else "")


def draw(lines: list[Line], record: dict, out: Path, ylim: tuple[float, float] | None) -> None:
    """A panel for each metric, one under the other, over the same x."""
    metrics = record["metric"]
    panel_lines = [[line for line in (line.having(metric) for line in lines) if line.runs] for metric in metrics]
    counts = {len(line.runs) for lines in panel_lines for line in lines}
    many = "seeds" if len(counts) > 1 else f"{max(counts)} seeds"
    seeds = "one seed a line" if counts == {1} else f"mean of {many}, band from lowest to highest"
    names = [name_of(metric, lines) for metric, lines in zip(metrics, panel_lines, strict=True)]
    alone = names[0] if counts == {1} else f"{names[0]}; {seeds}"
    figure, panels = new_figure(record["title"], alone if len(names) == 1 else seeds, rows=len(names))
    longest = max(max(points["x"]) for line in lines for run in line.runs for points in run.points.values())
    for panel, metric, name, its_lines in zip(panels, metrics, names, panel_lines, strict=True):
        if len(names) > 1:
            panel.set_title(name, loc="left", fontsize=11, color=FAINT)
        draw_panel(panel, its_lines, metric, longest, ylim)
        panel.set_xlim(0, longest or 1)
        panel.xaxis.set_major_formatter(EngFormatter(sep="") if longest >= 1e5 else "{x:,.6g}")
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=longest > 6))
    panels[-1].set_xlabel(record["x"].replace("_", " "))
    save(figure, out)


def draw_panel(panel, lines: list[Line], metric: str, longest: float, ylim: tuple[float, float] | None) -> None:
    """The curves, losses cut so that the end of training fills the picture, the final values written at their ends."""
    ends, low, high = [], [], []
    for line in sorted(lines, key=lambda line: style_of(line.optimizer).width):  # the thickest on top
        style = style_of(line.optimizer)
        at, values = line.points(metric)
        mean = values.mean(0)  # (points,)
        panel.plot(at, mean, color=style.color, linewidth=style.width, linestyle=line.dash)
        panel.plot(at[-1], mean[-1], style.marker, color=style.color, markersize=5 + style.width, clip_on=False)
        if len(line.runs) > 1:
            panel.fill_between(at, values.min(0), values.max(0), color=style.color, alpha=0.18, linewidth=0)
        ends.append((at[-1], mean[-1], f"{mean[-1]:#.4g}  {line.label}", line.optimizer))
        late = at >= (0.4 * longest if metric.endswith(LOSSES) else 0)  # a loss's steep start is not the news
        low.append(values.min())  # early ones too: a pretraining loss rises from where it was
        high += [values[:, late].max(initial=-math.inf), values[:, -1].max()]
    margin = (max(high) - min(low)) * 0.1 or 0.05
    panel.set_ylim(*(ylim or (min(low) - margin, max(high) + margin)))
    label_ends(panel, ends)


def table(lines: list[Line]) -> str:
    """The runs in one table, lowest loss first, without columns that none has; times are medians over log lines."""

    def values(line: Line, key: str) -> list[float]:
        return [run.summary[key] for run in line.runs if key in run.summary]

    def cell(line: Line, key: str, digits: int) -> str:
        if not values(line, key):
            return "–"
        if key.startswith("val/"):
            return mean_and_spread(values(line, key))
        return f"{statistics.fmean(values(line, key)):.{digits}f}"

    def learning_rate(line: Line) -> str:
        settings = line.runs[0].config.get("optimizer", {})
        lr, adamw_lr = settings.get("lr"), settings.get("adamw_lr")
        return rate(lr) + (f", AdamW part {rate(adamw_lr)}" if adamw_lr not in (None, lr) else "")

    columns = {key: of for key, of in COLUMNS.items() if any(values(line, key) for line in lines)}
    rows = [
        [line.label, learning_rate(line)] + [cell(line, key, digits) for key, (_, digits) in columns.items()]
        for line in sorted(lines, key=lambda line: statistics.fmean(values(line, "val/loss") or [math.inf]))
    ]
    return markdown(["optimizer", "learning rate", *(heading for heading, _ in columns.values())], rows)


def collect(options: Options) -> dict:
    """The record of a figure, which lies beside it: every run with the points to draw."""
    folders = find_runs(options.runs)
    runs = [run for folder in folders if (run := read_run(folder, options.metric, options.x))]
    absent = [metric for metric in options.metric if not any(metric in run.points for run in runs)]
    if absent or not runs:
        keys = ", ".join(sorted({key for folder in folders for line in read_metrics(folder) for key in line}))
        wanted = " or ".join(absent) or "an empty --metric"
        raise ValueError(f"no run has {wanted} against {options.x}; recorded are {keys or 'no quantities'}")
    return {
        "title": origin(runs[0], ", "),
        "metric": options.metric,
        "x": options.x,
        "runs": [asdict(run) for run in runs],
    }


def origin(run: Run, separator: str) -> str:
    return separator.join(word for word in (run.experiment, run.group) if word)


def main() -> None:
    options = tyro.cli(Options)
    again = Path(options.runs[0]) if len(options.runs) == 1 and options.runs[0].endswith(".json") else None
    record = json.loads(again.read_text()) if again else collect(options)
    if options.ylim and len(record["metric"]) > 1:
        raise ValueError(f"--ylim takes a single metric, but {', '.join(record['metric'])} came: draw them apart")
    record["title"] = options.title or record["title"]
    runs = [Run(**run) for run in record["runs"]]
    out = options.out or again or Path("images", origin(runs[0], "_").replace(".", "-"))
    out = out.with_suffix(".png")
    lines = group_lines(runs)
    draw(lines, record, out, options.ylim)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    drawn = f"{', '.join(record['metric'])} against {record['x']}"
    print(f"{table(lines)}\n\n{drawn}: {out}, its points: {out.with_suffix('.json')}")


if __name__ == "__main__":
    main_guard(main)
