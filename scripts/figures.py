"""Draws the curves of any runs, of any experiment, and prints their table.

    python -m scripts.figures runs/nanogpt/default --out images/nanogpt.png
    python -m scripts.figures 'runs/nanogpt/*/olion-*' runs/nanogpt/default/muon-lr1e-3-s1337 --x tokens
    python -m scripts.figures images/nanogpt.json        # the same picture again, from its record alone

Beside the PNG lies a JSON with the points that were drawn and each run's config and machine.
"""

import glob
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.ticker import EngFormatter, MaxNLocator

from common.figure import label_ends, markdown, mean_and_spread, new_figure, rate, save, style_of
from common.launch import main_guard
from common.runlog import read_metrics

DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))  # several lines of one optimizer
NAMES = {
    "val/loss": "validation loss, nats a token",
    "val/bits_per_byte": "validation loss, bits a byte",
    "train/loss": "training loss, nats a token",
    "step_ms": "time a step, ms",
    "optimizer_ms": "time in the optimizer, ms",
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
    metric: str = "val/loss"
    """Which recorded quantity is drawn against --x."""
    x: str = "step"
    """step, tokens, or any other recorded quantity."""
    title: str | None = None
    """Default: the experiment and its group."""
    ylim: tuple[float, float] | None = None
    """Lowest and highest value shown. Default: what the last three fifths of the longest run span."""


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
    x: list[float]
    y: list[float]

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

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """x (points,) at which every run has a value, and y (runs, points)."""
        curves = [dict(zip(run.x, run.y, strict=True)) for run in self.runs]
        shared = sorted(set.intersection(*map(set, curves)))
        if not shared:
            names = ", ".join(run.name for run in self.runs)
            raise ValueError(f"a mean needs points that all seeds share; {names} share none: draw them apart")
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

    last = ("val/loss", "val/bits_per_byte", "optimizer_state_mb")
    summary = {key: values(key)[-1] for key in last if values(key)}
    return summary | {key: statistics.median(values(key)) for key in ("step_ms", "optimizer_ms") if values(key)}


def read_run(folder: Path, metric: str, x: str) -> Run | None:
    """One run, or None, said on stderr, when it has no point to draw."""
    lines = read_metrics(folder)
    drawn = [line for line in lines if all(line.get(key) is not None for key in (x, metric))]
    if not drawn:
        print(f"left out: {folder} has no {metric} against {x} (yet)", file=sys.stderr)
        return None
    if not (record := read_config(folder)):
        raise FileNotFoundError(f"a run has config.json beside metrics.jsonl; {folder} does not: leave it out")
    return Run(
        **{key: record.get(key) or "" for key in ("name", "experiment", "group", "torch", "machine")},
        config=record.get("config", {}),
        summary=summarize(lines),
        x=[line[x] for line in drawn],
        y=[line[metric] for line in drawn],
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


def draw(lines: list[Line], out: Path, title: str, metric: str, x: str, ylim: tuple[float, float] | None) -> None:
    """The curves, cut so that the end of training fills the picture, the final values written at their ends."""
    counts = {len(line.runs) for line in lines}
    many = "seeds" if len(counts) > 1 else f"{max(counts)} seeds"
    seeds = f"; mean of {many}, band from lowest to highest" if counts != {1} else ""
    figure, (panel,) = new_figure(title, NAMES.get(metric, metric) + seeds)
    ends, late = [], []
    longest = max(max(run.x) for line in lines for run in line.runs)
    for line in sorted(lines, key=lambda line: style_of(line.optimizer).width):  # the thickest on top
        style = style_of(line.optimizer)
        at, values = line.points()
        mean = values.mean(0)  # (points,)
        panel.plot(at, mean, color=style.color, linewidth=style.width, linestyle=line.dash)
        panel.plot(at[-1], mean[-1], style.marker, color=style.color, markersize=5 + style.width, clip_on=False)
        if len(line.runs) > 1:
            panel.fill_between(at, values.min(0), values.max(0), color=style.color, alpha=0.18, linewidth=0)
        ends.append((at[-1], mean[-1], f"{mean[-1]:#.4g}  {line.label}", line.optimizer))
        late += [*values[:, at >= 0.4 * longest].ravel(), *values[:, -1]]  # the steep start is not the news
    margin = (max(late) - min(late)) * 0.1 or 0.05
    panel.set_ylim(*(ylim or (min(late) - margin, max(late) + margin)))
    panel.set_xlim(0, longest or 1)
    panel.set_xlabel(x.replace("_", " "))
    panel.xaxis.set_major_formatter(EngFormatter(sep="") if longest >= 1e5 else "{x:,.6g}")
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=longest > 6))
    label_ends(panel, ends)
    save(figure, out)


def table(lines: list[Line]) -> str:
    """The runs in one table, lowest loss first; times are medians over each run's log lines."""

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

    columns = {"val/loss": 3, "val/bits_per_byte": 3, "step_ms": 1, "optimizer_ms": 2, "optimizer_state_mb": 2}
    rows = [
        [line.label, learning_rate(line)] + [cell(line, key, digits) for key, digits in columns.items()]
        for line in sorted(lines, key=lambda line: statistics.fmean(values(line, "val/loss") or [math.inf]))
    ]
    names = ["val loss", "bits per byte", "ms a step", "ms in the optimizer", "optimizer state MB"]
    return markdown(["optimizer", "learning rate", *names], rows)


def collect(options: Options) -> dict:
    """The record of a figure, which lies beside it: every run with the points to draw."""
    folders = find_runs(options.runs)
    runs = [run for folder in folders if (run := read_run(folder, options.metric, options.x))]
    if not runs:
        keys = ", ".join(sorted({key for folder in folders for line in read_metrics(folder) for key in line}))
        raise ValueError(f"no run has {options.metric} against {options.x}; recorded are {keys or 'no quantities'}")
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
    record["title"] = options.title or record["title"]
    runs = [Run(**run) for run in record["runs"]]
    out = options.out or again or Path("images", origin(runs[0], "_").replace(".", "-"))
    out = out.with_suffix(".png")
    lines = group_lines(runs)
    draw(lines, out, record["title"], record["metric"], record["x"], options.ylim)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{table(lines)}\n\n{record['metric']} against {record['x']}: {out}, its points: {out.with_suffix('.json')}")


if __name__ == "__main__":
    main_guard(main)
