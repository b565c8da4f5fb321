"""Recorded runs, read for tables and figures; a malformed file is a one-line error."""

import glob
import json
import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

import numpy as np

from common import UserError, json_files
from common.figure import rate, style_of
from common.runlog import METRICS_FILE, read_metrics

DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))  # for several lines of one optimizer
COLUMNS = {  # metric -> heading in the table, digits after the point
    "val/loss": ("val loss", 3),
    "val/bits_per_byte": ("bits per byte", 3),
    "val/exact_match": ("exact match", 3),
    "val/pretrain_loss": ("pretraining loss", 3),
    "val/denoising_loss": ("denoising loss", 3),
    "val/projection_loss": ("projection loss", 3),
    "step_ms": ("ms per step", 1),
    "optimizer_ms": ("ms in the optimizer", 2),
    "optimizer_state_mb": ("optimizer state MB", 2),
}
# Runs that differ only in these settings are repetitions of one method.
BOOKKEEPING = {"seed", "resume", "wandb", "checkpoint", "device", "out", "probe"}


@dataclass(frozen=True)
class Run:
    """The record of one run: points to draw, numbers for the table, and their origin."""

    name: str
    experiment: str
    group: str
    torch: str
    machine: Any
    config: dict
    summary: dict  # column of the table -> number
    points: dict[str, dict[str, list[float]]]  # metric -> {"x": [...], "y": [...]}, without missing metrics

    @property
    def optimizer(self) -> str:
        return str(self.config.get("optimizer", {}).get("name", self.name.split("-")[0]))

    @property
    def length(self) -> float:
        """The largest x of any metric."""
        return max(max(points["x"]) for points in self.points.values())


@dataclass(frozen=True)
class Line:
    """Runs that differ only in their seed, drawn as one line."""

    optimizer: str
    label: str
    dash: Any
    runs: list[Run]

    @property
    def length(self) -> float:
        """The largest x of any run."""
        return max(run.length for run in self.runs)

    def having(self, metric: str) -> "Line":
        return replace(self, runs=[run for run in self.runs if metric in run.points])

    def points(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Return x (points,), at which every run has a value, and y (runs, points)."""
        drawn = [run.points[metric] for run in self.runs]
        curves = [dict(zip(points["x"], points["y"], strict=True)) for points in drawn]
        shared = sorted(set.intersection(*map(set, curves)))
        if not shared:
            names = ", ".join(run.name for run in self.runs)
            raise UserError(f"a mean needs points that all seeds share; {names} share no {metric}: draw them singly")
        return np.array(shared), np.array([[curve[x] for x in shared] for curve in curves])


def read_object(path: Path) -> dict:
    """Return the object in a JSON file; raises UserError for anything else."""
    return json_files.read_object(path, {}, "restore the file or remove it")


def require(holds: bool, where: Path | str, wanted: str, got: Any) -> None:
    if not holds:
        raise UserError(f"{where} must hold {wanted}, got {str(got)[:60]!r}; restore the file or remove it")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def method(config: dict, prefix: str = "") -> dict[str, Any]:
    """Return the settings that define a method: {"optimizer": {"lr": 1}, "seed": 2} -> {"optimizer.lr": 1}"""
    flat = {}
    for key, value in config.items():
        if prefix or key not in BOOKKEEPING:
            flat |= method(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def read_config(folder: Path) -> dict:
    """Return a run's config.json with the learning rate used as `optimizer.lr`; {} without a file."""
    path = folder / "config.json"
    record = read_object(path) if path.exists() else {}
    config = record.get("config", {})
    require(isinstance(config, dict), path, "an object as config", config)
    if isinstance(optimizer := config.get("optimizer", {}), dict):
        tuned = optimizer.pop("tuned_lr", {})  # replaces an lr that was not set
        require(isinstance(tuned, dict), path, "an object as optimizer.tuned_lr", tuned)
        if optimizer.get("lr") is None:
            optimizer["lr"] = tuned.get(optimizer.get("name"))
        for key in ("lr", "adamw_lr"):
            value = optimizer.get(key)
            require(value is None or is_number(value), path, f"a number as optimizer.{key}", value)
    else:
        require(False, path, "an object as config.optimizer", optimizer)
    return record


def values_of(lines: Iterable[dict], key: str) -> list[float | None]:
    """Return a metric's value on each line; None where it is missing or not finite."""
    values = [line.get(key) for line in lines]
    for value in values:
        require(value is None or is_number(value), f"each {key} in {METRICS_FILE}", "a number", value)
    return [value if value is not None and math.isfinite(value) else None for value in values]


def find_runs(patterns: tuple[str, ...]) -> list[Path]:
    """Return the run folders of paths, parents or globs; raises FileNotFoundError if there are none."""
    found: dict[Path, None] = {}  # a dict keeps the order and drops repetitions
    empty = []
    for pattern in patterns:
        paths = [Path(pattern)] if Path(pattern).exists() else sorted(map(Path, glob.glob(pattern)))
        runs = [metrics.parent for path in paths for metrics in sorted(path.rglob("metrics.jsonl"))]
        runs = [run for run in runs if not run.parent.name.endswith(".old")]  # moved aside by a later run
        if not runs:
            there = sorted(entry.name for path in paths if path.is_dir() for entry in path.iterdir())
            held = ", ".join(there[:8] + ["..."] * (len(there) > 8)) or "nothing"
            empty.append(f"a run is a folder with metrics.jsonl; no run in {pattern}, found there: {held}")
            if not paths:
                raise FileNotFoundError(empty[-1])
        found |= dict.fromkeys(runs)
    if not found:
        raise FileNotFoundError(empty[0] if empty else "name the runs to draw, such as runs/nanogpt/default")
    for line in empty:  # a shell's * also matches folders of logs
        print(f"left out: {line}", file=sys.stderr)
    return list(found)


def summarize(lines: list[dict]) -> dict[str, float]:
    """Return the table's numbers: the last value of each result, the median of each time."""

    def values(key: str) -> list[float]:
        return [value for value in values_of(lines, key) if value is not None]

    times = ("step_ms", "optimizer_ms")
    return {k: statistics.median(values(k)) if k in times else values(k)[-1] for k in COLUMNS if values(k)}


def distribution(lines: list[dict], metric: str) -> dict[str, list[float]] | None:
    """Return a metric's last distribution as quantiles (y) against their levels (x); None if it has none."""
    values = next((line[metric] for line in reversed(lines) if isinstance(line.get(metric), list)), None)
    if not values:
        return None
    return {"x": [i / (len(values) - 1) for i in range(len(values))], "y": values}


def read_run(folder: Path, metrics: tuple[str, ...], x: str) -> Run | None:
    """Read one run; None if it has no point to draw. Missing metrics are reported on stderr."""
    lines, points = read_metrics(folder), {}
    for metric in metrics:
        if quantiles := distribution(lines, metric):
            points[metric] = quantiles
            continue
        pairs = zip(values_of(lines, x), values_of(lines, metric), strict=True)
        if drawn := [pair for pair in pairs if None not in pair]:
            points[metric] = dict(zip("xy", map(list, zip(*drawn, strict=True)), strict=True))
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


def read_record(path: Path) -> dict:
    """Read the record of a figure, as scripts.figures writes it; raises UserError for another shape."""
    record = read_object(path)
    texts = [record.get("title"), record.get("x"), *(metric := record.get("metric") or [None])]
    require(
        isinstance(metric, list) and all(isinstance(text, str) for text in texts), path, "title, metric and x", texts
    )
    runs = record.get("runs") or []
    require(isinstance(runs, list) and bool(runs), path, "a list of runs", runs)
    for run in runs:
        known = isinstance(run, dict) and run.keys() == {field.name for field in fields(Run)}
        require(known, path, "runs as scripts.figures records them", run)
        require(isinstance(run["config"], dict) and isinstance(run["summary"], dict), path, "a run's config", run)
        require(isinstance(run["points"], dict) and bool(run["points"]), path, "points of each run", run["points"])
        for points in run["points"].values():
            lists = [points.get("x"), points.get("y")] if isinstance(points, dict) else [None]
            whole = all(isinstance(each, list) and each and all(map(is_number, each)) for each in lists)
            require(
                whole and len({len(each or ()) for each in lists}) == 1, path, "equally many numbers x and y", points
            )
    return record


def group_lines(runs: list[Run]) -> list[Line]:
    """Group runs that differ only in their seed; a label names the settings that distinguish an optimizer's lines."""
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


def seeds_of(lines: list[Line]) -> str:
    """Return the seeds of the runs in words, as `seeds_in_words`."""
    return seeds_in_words(run.config.get("seed", "unknown") for line in lines for run in line.runs)


def seeds_in_words(seeds: Iterable[Any]) -> str:
    """Return 'seed 1337', 'seeds 1, 3' or, for consecutive ones, 'seeds 1337 to 1339'."""
    distinct = sorted(set(seeds), key=lambda seed: (isinstance(seed, str), seed))
    if len(distinct) > 2 and distinct == list(range(distinct[0], distinct[0] + len(distinct))):
        return f"seeds {distinct[0]} to {distinct[-1]}"
    return f"seed{'s' * (len(distinct) > 1)} {', '.join(map(str, distinct[:5]))}{', ...' * (len(distinct) > 5)}"
