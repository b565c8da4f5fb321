"""Draws the curves of runs of any experiment, and prints their table.

    python -m scripts.figures runs/nanogpt/default --out images/nanogpt.png
    python -m scripts.figures 'runs/nanogpt/*/olion-*' runs/nanogpt/default/muon-lr1e-3-s1337 --x tokens
    python -m scripts.figures runs/llama/sft --metric val/loss val/exact_match    # one figure, a panel per metric
    python -m scripts.figures images/nanogpt.json        # the same figure again, from its record

A JSON beside the PNG holds the drawn points and each run's config and machine.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tyro

from common import UserError, warn
from common.evidence import is_below
from common.figure import FAINT, label_ends, markdown, mean_and_spread, new_figure, rate, save, style_of
from common.guard import main_guard
from common.options import parse_options
from common.recorded import (
    COLUMNS,
    Line,
    Run,
    find_runs,
    group_lines,
    read_record,
    read_run,
    seeds_of,
)
from common.runlog import read_metrics
from common.whole import write_json
from scripts.probe_figures import QUANTILE, What, draw_levels, metrics_of, words_of

NAMES = {
    "val/loss": "validation loss",
    "val/bits_per_byte": "validation loss, bits per byte",
    "val/exact_match": "fraction of responses repeated exactly",
    "val/pretrain_loss": "loss on the pretraining text, nats per token",
    "val/denoising_loss": "denoising loss on validation images",
    "val/projection_loss": "projection loss on validation images",
    "train/loss": "training loss",
    "line_search/step_over_slope": "step of the line search over <G, D>",
    "line_search/passes": "losses evaluated again per step",
    "step_ms": "time per step, ms",
    "optimizer_ms": "time in the optimizer, ms",
}
TOKEN_LOSSES, TEXT = ("val/loss", "train/loss"), {"nanogpt", "llama"}  # nats per token in experiments with text
LOSSES = ("loss", "bits_per_byte")  # endings of their names
TITLES = {  # of figures, by experiment and group; other groups are titled by name
    ("nanogpt", "stdlib"): "A small GPT on Python's standard library",
    ("llama", "stdlib"): "A small Llama on Python's standard library",
    ("llama", "sft_arithmetic"): "Fine-tuning on word problems",
    ("sit", "digits"): "A small SiT on handwritten digits",
}
EXPERIMENTS = {"nanogpt": "GPT", "llama": "Llama", "sit": "SiT"}


@dataclass(frozen=True)
class Options:
    """Draws curves of runs and prints their table."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, folders that hold runs at any depth, globs of those, or the one JSON beside a figure."""
    out: Path | None = None
    """The figure, with its JSON beside it. Default: curves.png beside the first run, or the figure of the JSON."""
    metric: tuple[str, ...] = ("val/loss",)
    """Recorded metrics to draw against --x, one panel each."""
    x: str = "step"
    """step, tokens, or any other recorded metric."""
    what: What = "curves"
    """Instead of --metric: norms, isotropy, hadamard or spectrum, recorded by the runs' [probe]."""
    title: str | None = None
    """Default: the experiment and its data."""
    ylim: tuple[float, float] | None = None
    """Lowest and highest value shown, of a single metric. Default: all; a loss is cut above the maximum of its last
    3/5."""
    steps_to: str | None = None
    """A loss, or an optimizer whose last loss it is: the table gets the steps and seconds to reach it; "none": it does
    not. Default: adamw, if it is among the runs."""


def name_of(metric: str, lines: list[Line]) -> str:
    """Return a metric's name in a panel."""
    of_text = {run.experiment for line in lines for run in line.runs} <= TEXT
    unit = ", nats per token" if of_text and metric in TOKEN_LOSSES else ""
    return (NAMES.get(metric) or words_of(metric) or metric) + unit


def draw(lines: list[Line], record: dict, out: Path, ylim: tuple[float, float] | None) -> None:
    """Draw a panel per metric, one below the other, over the same x."""
    metrics = record["metric"]
    panel_lines = [[line for line in (line.having(metric) for line in lines) if line.runs] for metric in metrics]
    counts = {len(line.runs) for lines in panel_lines for line in lines}
    seeds = f"mean and range of {seeds_of(lines)}"
    if counts == {1}:
        seeds = seeds_of(lines)
        if len({str(run.config.get("seed")) for line in lines for run in line.runs}) > 1:
            seeds = "one seed per line"
    from matplotlib.ticker import EngFormatter, MaxNLocator  # here: --help does not need it

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
    """Draw curves with final values at their ends; losses are cut so that the end of training fills the panel."""
    ends, low, high = [], [], []
    for line in sorted(lines, key=lambda line: style_of(line.optimizer).width):  # thickest on top
        style = style_of(line.optimizer)
        at, values = line.points(metric)
        mean = values.mean(0)  # (points,)
        # Markers are for greyscale print.
        every = {"marker": style.marker, "markevery": max(1, len(at) // 8), "markersize": 3 + style.width}
        panel.plot(at, mean, color=style.color, linewidth=style.width, linestyle=line.dash, **every)
        panel.plot(at[-1], mean[-1], style.marker, color=style.color, markersize=5 + style.width, clip_on=False)
        if len(line.runs) > 1:
            panel.fill_between(at, values.min(0), values.max(0), color=style.color, alpha=0.18, linewidth=0)
        last = mean_and_spread(list(values[:, -1])).split()[0]
        ends.append((at[-1], mean[-1], f"{last}  {line.label}", line.optimizer))
        late = at >= (0.4 * longest if metric.endswith(LOSSES) else 0)  # excludes a loss's steep start
        low.append(values.min())  # early values too: in fine-tuning, the pretraining loss rises
        high += [values[:, late].max(initial=-math.inf), values[:, -1].max()]
    levels = draw_levels(panel, metric)
    low, high = low + levels, high + levels
    margin = (max(high) - min(low)) * 0.1 or 0.05
    panel.set_ylim(*(ylim or (min(low) - margin, max(high) + margin)))
    label_ends(panel, ends)


def target_of(wanted: str | None, lines: list[Line], metric: str) -> float | None:
    """Return the loss of --steps-to, None for a table without; raises UserError for an optimizer without runs."""
    try:
        return float(wanted or "")
    except ValueError:
        name = wanted or "adamw"
    finals = [line.points(metric)[1][:, -1].mean() for line in lines if line.optimizer == name and line.runs]
    if not finals and wanted not in (None, "none"):
        names = ", ".join(dict.fromkeys(line.optimizer for line in lines))
        raise UserError(f"--steps-to must be a loss, none, or an optimizer of the runs ({names}); got {wanted}")
    return float(min(finals)) if finals else None


def steps_to(line: Line, metric: str, target: float) -> float | None:
    """Return the first x at which a line is below the target by more than its seeds' noise; see `evidence.is_below`."""
    at, values = line.points(metric)
    return next((float(x) for x, losses in zip(at, values.T, strict=True) if is_below(target, list(losses))), None)


def reach_cells(lines: list[Line], metric: str, x: str, wanted: str | None) -> tuple[list[str], dict[str, list[str]]]:
    """Return the headings of the columns about a target, and their cells by line label; empty without a target."""
    having = [each for line in lines if (each := line.having(metric)).runs]
    target = target_of(wanted, having, metric) if metric.endswith(LOSSES) else None
    if target is None:
        return [], {}
    cells = {}
    for line in having:
        is_target = line.points(metric)[1][:, -1].mean() == target  # a line reaches its own last loss at its end
        reached = line.length if is_target else steps_to(line, metric, target)
        times = [run.summary["step_ms"] for run in line.runs if "step_ms" in run.summary]
        seconds = f"{reached * statistics.fmean(times) / 1000:.0f}" if reached is not None and times else "–"
        cells[line.label] = ["–" if reached is None else f"{reached:,.6g}", *([seconds] if x == "step" else [])]
    name = COLUMNS.get(metric, (metric, 0))[0]
    return [f"{x.rstrip('s')}s to {name} {target:.3f}", *(["seconds to it"] if x == "step" else [])], cells


REACHED = (
    "to a loss: the first validation with (loss - mean) sqrt(n) >= t s, of n seeds, s their sample deviation, t\n"
    "Student's at 5 %; one seed: at the loss or below. Seconds: steps times the median step."
)


def table(lines: list[Line], x: str = "step", metric: str = "val/loss", to: str | None = "none") -> str:
    """Return a table of the runs, lowest loss first, without empty columns; times are medians over log lines.

    Runs of different lengths get a column of their last x; `to` is --steps-to, of `metric`.
    """
    headings, reached = reach_cells(lines, metric, x, to)
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
        + reached.get(line.label, ["–"] * len(headings))
        for line in sorted(lines, key=lambda line: statistics.fmean(values(line, "val/loss") or [math.inf]))
    ]
    last = [f"last {x}"] if uneven else []
    titles = ["optimizer", "learning rate", *last, *(heading for heading, _ in columns.values()), *headings]
    return markdown(titles, rows) + (f"\n\n{REACHED}" if headings else "")


def lengths_differ(lines: list[Line]) -> bool:
    return len({run.length for line in lines for run in line.runs}) > 1


def tell_lengths(lines: list[Line], x: str) -> None:
    """Warn about runs of different lengths, whose last losses are not comparable."""
    if lengths_differ(lines):
        runs = sorted((run for line in lines for run in line.runs), key=lambda run: run.length)
        ends = ", ".join(f"{run.name} at {x} {run.length:,.6g}" for run in (runs[0], runs[-1]))
        warn(f"runs have different lengths ({ends}): compare runs of equal length, or state it")


def collect(options: Options) -> dict:
    """Return the record of a figure, written beside it: every run with its points."""
    folders = find_runs(options.runs)
    if options.what != "curves":
        recorded = {key for folder in folders for line in read_metrics(folder) for key in line}
        x = QUANTILE if options.what == "spectrum" else options.x
        options = replace(options, metric=metrics_of(options.what, recorded), x=x)
    runs = [run for folder in folders if (run := read_run(folder, options.metric, options.x))]
    absent = [metric for metric in options.metric if not any(metric in run.points for run in runs)]
    if absent or not runs:
        keys = ", ".join(sorted({key for folder in folders for line in read_metrics(folder) for key in line}))
        wanted = " or ".join(absent) or "an empty --metric"
        raise UserError(f"no run has {wanted} against {options.x}; recorded are {keys or 'no metrics'}")
    return {
        "title": title_of(runs[0].experiment, runs[0].group),
        "metric": options.metric,
        "x": options.x,
        "runs": [asdict(run) for run in runs],
    }


def title_of(experiment: str, group: str) -> str:
    """Return the title of a figure."""
    plain = f"{EXPERIMENTS.get(experiment, experiment)}: {group.replace('_', ' ')}".strip(": ")
    return TITLES.get((experiment, group), plain)


def check_limits(ylim: tuple[float, float] | None, metrics: Sequence[str]) -> None:
    if ylim and len(metrics) > 1:
        raise UserError(f"--ylim takes a single metric, got {', '.join(metrics)}; draw them singly")
    if ylim and not (all(map(math.isfinite, ylim)) and ylim[0] < ylim[1]):
        raise UserError(f"--ylim must be two finite numbers, the lower first; got {ylim[0]:g} {ylim[1]:g}")


def main() -> None:
    options = parse_options(Options, "python -m scripts.figures", __doc__)
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
    write_json(out.with_suffix(".json"), record, indent=1)
    drawn = f"{', '.join(record['metric'])} against {record['x']}"
    print(table(lines, record["x"], record["metric"][0], options.steps_to))
    print(f"\n{drawn}: {out}, its points: {out.with_suffix('.json')}")


if __name__ == "__main__":
    main_guard(main)
