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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.ticker import EngFormatter, MaxNLocator

from common import UserError, one_line, warn
from common.figure import FAINT, label_ends, markdown, mean_and_spread, new_figure, rate, save, style_of
from common.launch import main_guard
from common.runlog import METRICS_FILE, read_metrics
from scripts.probe_figures import QUANTILE, What, distribution, draw_levels, metrics_of, words_of

DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))  # several lines of one optimizer
NAMES = {
    "val/loss": "validation loss",
    "val/bits_per_byte": "validation loss, bits per byte",
    "val/exact_match": "responses repeated exactly, share",
    "val/pretrain_loss": "loss on the pretraining text, nats per token",
    "val/denoising_loss": "denoising loss on validation images",
    "val/projection_loss": "projection loss on validation images",
    "train/loss": "training loss",
    "step_ms": "time per step, ms",
    "optimizer_ms": "time in the optimizer, ms",
}
TOKEN_LOSSES, TEXT = ("val/loss", "train/loss"), {"nanogpt", "llama"}  # nats per token in experiments with text
LOSSES = ("loss", "bits_per_byte")  # how their names end
COLUMNS = {  # of the table -> heading, digits after the point
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
# Settings that make no other method: runs that differ in these alone are repetitions of one.
TITLES = {  # of pictures, by experiment and group; any other group gives its own name
    ("nanogpt", "stdlib"): "A small GPT on Python's standard library",
    ("llama", "stdlib"): "A small Llama on Python's standard library",
    ("llama", "sft_arithmetic"): "Fine-tuning on word problems",
    ("sit", "digits"): "A small SiT on handwritten digits",
}
EXPERIMENTS = {"nanogpt": "GPT", "llama": "Llama", "sit": "SiT"}
BOOKKEEPING = {"seed", "resume", "wandb", "checkpoint", "device", "out", "probe"}


@dataclass(frozen=True)
class Options:
    """Draws curves of runs and prints their table."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, folders that hold runs at any depth, globs of those, or the one JSON beside a figure."""
    out: Path | None = None
    """The picture; its JSON lies beside it. Default: curves.png beside the first run, or the picture of the JSON."""
    metric: tuple[str, ...] = ("val/loss",)
    """Recorded quantities to draw against --x, one panel each."""
    x: str = "step"
    """step, tokens, or any other recorded quantity."""
    what: What = "curves"
    """Instead of --metric: norms, isotropy, hadamard or spectrum, what the runs' [probe] recorded."""
    title: str | None = None
    """Default: the experiment and its data."""
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

    @property
    def length(self) -> float:
        """The last x at which anything was drawn."""
        return max(max(points["x"]) for points in self.points.values())


@dataclass(frozen=True)
class Line:
    """Runs that differ in their seed alone, drawn as one line."""

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
        """x (points,) at which every run has a value, and y (runs, points)."""
        drawn = [run.points[metric] for run in self.runs]
        curves = [dict(zip(points["x"], points["y"], strict=True)) for points in drawn]
        shared = sorted(set.intersection(*map(set, curves)))
        if not shared:
            names = ", ".join(run.name for run in self.runs)
            raise UserError(f"a mean needs points that all seeds share; {names} share no {metric}: draw them apart")
        return np.array(shared), np.array([[curve[x] for x in shared] for curve in curves])


def method(config: dict, prefix: str = "") -> dict[str, Any]:
    """The settings that make a method, flat: {"optimizer": {"lr": 1}, "seed": 2} -> {"optimizer.lr": 1}"""
    flat = {}
    for key, value in config.items():
        if prefix or key not in BOOKKEEPING:
            flat |= method(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def read_object(path: Path) -> dict:
    """The object in a JSON file; UserError where the file holds anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} must hold JSON, got {one_line(error)}; restore the file or remove it") from None
    require(isinstance(found, dict), path, "a JSON object", found)
    return found


def require(holds: bool, where: Path | str, wanted: str, got: Any) -> None:
    if not holds:
        raise UserError(f"{where} must hold {wanted}, got {str(got)[:60]!r}; restore the file or remove it")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_config(folder: Path) -> dict:
    """A run's config.json, the learning rate that was used standing in `optimizer.lr`; {} where there is none."""
    path = folder / "config.json"
    record = read_object(path) if path.exists() else {}
    config = record.get("config", {})
    require(isinstance(config, dict), path, "an object as config", config)
    if isinstance(optimizer := config.get("optimizer", {}), dict):
        tuned = optimizer.pop("tuned_lr", {})  # the rates that stand in for one that was not asked for
        require(isinstance(tuned, dict), path, "an object as optimizer.tuned_lr", tuned)
        if optimizer.get("lr") is None:
            optimizer["lr"] = tuned.get(optimizer.get("name"))
        for key in ("lr", "adamw_lr"):
            value = optimizer.get(key)
            require(value is None or is_number(value), path, f"a number as optimizer.{key}", value)
    else:
        require(False, path, "an object as config.optimizer", optimizer)
    return record


def read_lines(folder: Path) -> list[dict]:
    """A run's metrics, one object per logged step; UserError for a damaged file."""
    path = folder / METRICS_FILE
    try:
        lines = read_metrics(folder)
    except (ValueError, RecursionError) as error:
        text = one_line(error)
        raise UserError(text if str(path) in text else f"{path} must hold JSON lines in UTF-8, got {text}") from None
    for number, line in enumerate(lines, start=1):
        whole = isinstance(line, dict) and is_number(line.get("step"))
        require(whole, f"{path}: line {number}", "an object with a step", line)
    return lines


def values_of(lines: Iterable[dict], key: str) -> list[float | None]:
    """A quantity at each line; None where it was not measured, or is not finite."""
    values = [line.get(key) for line in lines]
    for value in values:
        require(value is None or is_number(value), f"each {key} in {METRICS_FILE}", "a number", value)
    return [value if value is not None and math.isfinite(value) else None for value in values]


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
        return [value for value in values_of(lines, key) if value is not None]

    times = ("step_ms", "optimizer_ms")
    return {k: statistics.median(values(k)) if k in times else values(k)[-1] for k in COLUMNS if values(k)}


def read_run(folder: Path, metrics: tuple[str, ...], x: str) -> Run | None:
    """One run, or None when it has no point to draw; what it lacks is said on stderr."""
    lines, points = read_lines(folder), {}
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


def seeds_of(lines: list[Line]) -> str:
    """The seeds of the runs, as "seed 1337" or "seeds 1337, 1338"."""
    seeds = sorted({str(run.config.get("seed", "unknown")) for line in lines for run in line.runs})
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds[:5])}{', ...' * (len(seeds) > 5)}"


def name_of(metric: str, lines: list[Line]) -> str:
    """What a panel calls a metric."""
    of_text = {run.experiment for line in lines for run in line.runs} <= TEXT
    unit = ", nats per token" if of_text and metric in TOKEN_LOSSES else ""
    return (NAMES.get(metric) or words_of(metric) or metric) + unit


def draw(lines: list[Line], record: dict, out: Path, ylim: tuple[float, float] | None) -> None:
    """A panel for each metric, one under the other, over the same x."""
    metrics = record["metric"]
    panel_lines = [[line for line in (line.having(metric) for line in lines) if line.runs] for metric in metrics]
    counts = {len(line.runs) for lines in panel_lines for line in lines}
    many = "seeds" if len(counts) > 1 else f"{max(counts)} seeds"
    seeds = f"mean of {many}, band from lowest to highest; {seeds_of(lines)}"
    if counts == {1}:
        seeds = (
            seeds_of(lines)
            if len({str(run.config.get("seed")) for line in lines for run in line.runs}) == 1
            else "one seed per line"
        )
    names = [name_of(metric, lines) for metric, lines in zip(metrics, panel_lines, strict=True)]
    alone = f"{names[0]}; {seeds}"
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
        every = {"marker": style.marker, "markevery": max(1, len(at) // 8), "markersize": 3 + style.width}  # grey print
        panel.plot(at, mean, color=style.color, linewidth=style.width, linestyle=line.dash, **every)
        panel.plot(at[-1], mean[-1], style.marker, color=style.color, markersize=5 + style.width, clip_on=False)
        if len(line.runs) > 1:
            panel.fill_between(at, values.min(0), values.max(0), color=style.color, alpha=0.18, linewidth=0)
        ends.append((at[-1], mean[-1], f"{mean[-1]:#.4g}  {line.label}", line.optimizer))
        late = at >= (0.4 * longest if metric.endswith(LOSSES) else 0)  # a loss's steep start is not the news
        low.append(values.min())  # early ones too: a pretraining loss rises from where it was
        high += [values[:, late].max(initial=-math.inf), values[:, -1].max()]
    levels = draw_levels(panel, metric)
    low, high = low + levels, high + levels
    margin = (max(high) - min(low)) * 0.1 or 0.05
    panel.set_ylim(*(ylim or (min(low) - margin, max(high) + margin)))
    label_ends(panel, ends)


def table(lines: list[Line], x: str = "step") -> str:
    """The runs in one table, lowest loss first, without columns that none has; times are medians over log lines.

    Runs of different lengths get a column of their last x.
    """
    uneven = lengths_differ(lines)

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
        [line.label, learning_rate(line)]
        + ([f"{line.length:,.6g}"] if uneven else [])
        + [cell(line, key, digits) for key, (_, digits) in columns.items()]
        for line in sorted(lines, key=lambda line: statistics.fmean(values(line, "val/loss") or [math.inf]))
    ]
    last = [f"last {x}"] if uneven else []
    return markdown(["optimizer", "learning rate", *last, *(heading for heading, _ in columns.values())], rows)


def lengths_differ(lines: list[Line]) -> bool:
    return len({run.length for line in lines for run in line.runs}) > 1


def tell_lengths(lines: list[Line], x: str) -> None:
    """Warn of runs of different lengths: their last losses are not of one budget."""
    if lengths_differ(lines):
        runs = sorted((run for line in lines for run in line.runs), key=lambda run: run.length)
        ends = ", ".join(f"{run.name} at {x} {run.length:,.6g}" for run in (runs[0], runs[-1]))
        warn(f"runs of different lengths stand beside one another ({ends}); compare runs of one length, or say so")


def collect(options: Options) -> dict:
    """The record of a figure, which lies beside it: every run with the points to draw."""
    folders = find_runs(options.runs)
    if options.what != "curves":
        recorded = {key for folder in folders for line in read_lines(folder) for key in line}
        x = QUANTILE if options.what == "spectrum" else options.x
        options = replace(options, metric=metrics_of(options.what, recorded), x=x)
    runs = [run for folder in folders if (run := read_run(folder, options.metric, options.x))]
    absent = [metric for metric in options.metric if not any(metric in run.points for run in runs)]
    if absent or not runs:
        keys = ", ".join(sorted({key for folder in folders for line in read_lines(folder) for key in line}))
        wanted = " or ".join(absent) or "an empty --metric"
        raise UserError(f"no run has {wanted} against {options.x}; recorded are {keys or 'no quantities'}")
    return {
        "title": title_of(runs[0].experiment, runs[0].group),
        "metric": options.metric,
        "x": options.x,
        "runs": [asdict(run) for run in runs],
    }


def title_of(experiment: str, group: str) -> str:
    """A picture's title in plain words."""
    plain = f"{EXPERIMENTS.get(experiment, experiment)}: {group.replace('_', ' ')}".strip(": ")
    return TITLES.get((experiment, group), plain)


def read_record(path: Path) -> dict:
    """The record of a figure, as `collect` makes it; UserError for another shape."""
    record = read_object(path)
    texts = [record.get("title"), record.get("x"), *(metric := record.get("metric") or [None])]
    require(
        isinstance(metric, list) and all(isinstance(text, str) for text in texts), path, "title, metric and x", texts
    )
    runs = record.get("runs")
    require(isinstance(runs, list) and bool(runs), path, "a list of runs", runs)
    for run in runs:
        known = isinstance(run, dict) and run.keys() == {field.name for field in fields(Run)}
        require(known, path, "runs as scripts.figures records them", run)
        require(isinstance(run["config"], dict) and isinstance(run["summary"], dict), path, "a run's config", run)
        require(isinstance(run["points"], dict) and bool(run["points"]), path, "points of each run", run["points"])
        for points in run["points"].values():
            lists = isinstance(points, dict) and [points.get("x"), points.get("y")]
            whole = lists and all(isinstance(each, list) and each and all(map(is_number, each)) for each in lists)
            require(bool(whole) and len(lists[0]) == len(lists[1]), path, "equally many numbers x and y", points)
    return record


def check_limits(ylim: tuple[float, float] | None, metrics: Sequence[str]) -> None:
    if ylim and len(metrics) > 1:
        raise UserError(f"--ylim takes a single metric, got {', '.join(metrics)}; draw them apart")
    if ylim and not (all(map(math.isfinite, ylim)) and ylim[0] < ylim[1]):
        raise UserError(f"--ylim must be two finite numbers, the lower first; got {ylim[0]:g} {ylim[1]:g}")


def main() -> None:
    options = tyro.cli(Options)
    check_limits(options.ylim, options.metric)
    again = Path(options.runs[0]) if len(options.runs) == 1 and options.runs[0].endswith(".json") else None
    record = read_record(again) if again else collect(options)
    check_limits(options.ylim, record["metric"])
    record["title"] = options.title or record["title"]
    runs = [Run(**run) for run in record["runs"]]
    out = options.out or again or find_runs(options.runs)[0].parent / "curves.png"
    out = out.with_suffix(".png")
    lines = group_lines(runs)
    tell_lengths(lines, record["x"])
    draw(lines, record, out, options.ylim)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    drawn = f"{', '.join(record['metric'])} against {record['x']}"
    print(f"{table(lines, record['x'])}\n\n{drawn}: {out}, its points: {out.with_suffix('.json')}")


if __name__ == "__main__":
    main_guard(main)
