"""Trains with a grid of learning rates for each optimizer, and draws the final losses.

    python -m scripts.sweep nanoGPT/configs/stdlib.toml --lrs 4e-3 8e-3 1.6e-2 --seeds 1337 1338 1339 --jobs 2
    python -m scripts.sweep nanoGPT/configs/stdlib.toml --optimizers olion muon --adamw-lr 4e-3 --set steps=200
    python -m scripts.sweep Llama/train_configs/stdlib.toml --module Llama.train --jobs 2
    python -m scripts.sweep nanoGPT/configs/stdlib.toml --module scripts.ablation --optimizers olion olion_unsigned
    python -m scripts.sweep nanoGPT/configs/stdlib.toml --draw-only

The same command again runs missing cells. Every outcome is merged into one JSON, which keeps earlier ones.
"""

import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import tyro

from common import UserError, one_line, progress, warn
from common.evidence import Paired, digits_of, paired_difference
from common.figure import FAINT, PAPERS, STYLES, label_ends, markdown, mean_and_spread, new_figure, rate, save, style_of
from common.guard import main_guard
from common.options import parse_options
from common.recorded import is_number, method, read_config, read_object, require, seeds_in_words
from common.runlog import END, run_name
from common.whole import write_text
from scripts.figures import title_of

KEY = ("config", "optimizer", "lr", "adamw_lr", "seed")  # identifies a recorded run
SWEPT = {"optimizer.name", "optimizer.lr", "optimizer.adamw_lr", "seed"}
MAX_EXTENDS = 8  # longer chains of configs are cycles
TITAN = {"seed": "debug.seed", "group": "job.group", "steps": "training.steps"}  # torchtitan's names of these keys

warn_once = cache(warn)  # not after every run

Curve = dict[float, dict[int, float]]  # learning rate -> seed -> loss, infinite if the run diverged or failed
MODULES = ("nanoGPT.train", "SIT.train", "Llama.train")  # ours, whose optimizers are known
ABLATION = "scripts.ablation"  # nanoGPT.train with more of them
Curves = dict[tuple[float | None, str], Curve]  # (rate of the AdamW part, optimizer) -> curve


@dataclass(frozen=True)
class Options:
    """Trains with a grid of learning rates for each optimizer, and draws the final losses."""

    config: tyro.conf.Positional[Path]
    """The experiment's TOML, for its train.py."""
    optimizers: tuple[str, ...] = PAPERS
    lrs: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    """Learning rates, each with every optimizer."""
    seeds: tuple[int, ...] = (1337,)
    adamw_lr: tuple[float, ...] = ()
    """Rates of the AdamW part (embeddings, head, vectors), each with every rate. Default: the config's."""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = ()
    """Further options of the experiment, as key=value; they become part of the sweep's name."""
    out: Path | None = None
    """The record, with the figure beside it. Default: images/sweep_EXPERIMENT_CONFIG.json."""
    jobs: int = 1
    """Number of concurrent runs, which share the cores."""
    module: str = "nanoGPT.train"
    """The experiment's training module."""
    draw_only: bool = False
    """Only draw, from the record."""
    title: str | None = None
    """Title of the figure."""

    @property
    def experiment(self) -> str:
        return ("nanoGPT" if self.module == ABLATION else self.module.split(".")[0]).lower()

    def key(self, name: str) -> str:
        """Return the training module's name of a key."""
        return TITAN.get(name, name) if self.experiment == "llama" else name

    @property
    def name(self) -> str:
        return " ".join([self.config.stem, *sorted(self.settings)])

    @property
    def group(self) -> str:
        return "sweep-" + re.sub(r"[^\w.]+", "-", self.name)

    @property
    def subject(self) -> str:
        """The sweep's title, with its settings except long ones, such as paths."""
        settings = [
            setting.rpartition(".")[2].replace("=", " ") for setting in sorted(self.settings) if len(setting) < 32
        ]
        return ", ".join([title_of(self.experiment, self.config.stem), *settings])

    @property
    def runs(self) -> Path:
        """The training module's folder of this group's runs."""
        return Path("runs", self.experiment, self.group)

    @property
    def logs(self) -> Path:
        """Folder of the runs' output; outside `runs`, whose folders a training module may move aside."""
        return self.runs.with_name(f"{self.group}.logs")

    @property
    def record(self) -> Path:
        return self.out or Path("images", f"{self.group.replace('-', f'_{self.experiment}_', 1)}.json")


@dataclass(frozen=True)
class Trial:
    """One cell of the grid."""

    optimizer: str
    lr: float
    adamw_lr: float | None
    seed: int

    @property
    def name(self) -> str:
        return run_name(self.optimizer, self.lr, self.seed, self.adamw_lr)

    def folder(self, options: Options) -> Path:
        return options.runs / self.name

    def command(self, options: Options) -> list[str]:
        flags = {"optimizer.name": self.optimizer, "optimizer.lr": repr(self.lr), options.key("seed"): self.seed}
        if self.adamw_lr is not None:
            flags["optimizer.adamw-lr"] = repr(self.adamw_lr)  # repr: all digits are part of the run's name
        flags[options.key("group")] = options.group
        flags |= dict(setting.split("=", 1) for setting in options.settings)
        arguments = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        quiet = ["--wandb", "disabled", "--checkpoint.every", "0"]  # 0: no checkpoints
        if options.experiment == "llama":
            quiet = ["--metrics.wandb", "disabled", "--checkpoint.load-only"]
        return [sys.executable, "-m", options.module, str(options.config), *arguments, *quiet]


def grid(options: Options) -> list[Trial]:
    """Return all cells, seeds outermost: a sweep that is stopped early has tried all rates once."""
    parts = options.adamw_lr or (look_up(options.config, "optimizer.adamw_lr"),)
    cells = product(options.seeds, parts, options.lrs, options.optimizers)
    trials = [Trial(optimizer, lr, adamw_lr, seed) for seed, adamw_lr, lr, optimizer in cells]
    return list(dict.fromkeys(trials))  # without duplicates


def check(options: Options) -> None:
    """Raise UserError for invalid options before the first run starts."""
    if not options.config.is_file():
        raise FileNotFoundError(f"a sweep needs the experiment's TOML; {options.config} does not exist")
    for setting in options.settings:
        key, equals, _ = setting.partition("=")
        if not key or not equals or key.replace("-", "_") in SWEPT | {options.key("seed")}:
            raise UserError(f"--set must be key=value for keys that are not swept; got {setting!r}")
    if options.module != ABLATION and not re.fullmatch(r"\w+\.train", options.module):
        raise UserError(
            f"--module must be a training module, like nanoGPT.train, or {ABLATION}; got {options.module!r}"
        )
    if options.module in MODULES:
        from optimizers.build import check_name  # here: it imports torch, which --help does not need

        for name in options.optimizers:
            check_name(name)
    for lr in (*options.lrs, *options.adamw_lr):
        if not 0 <= lr < math.inf:
            raise UserError(f"--lrs and --adamw-lr must be finite, 0 or more; got {lr}")
    if options.jobs < 1:
        raise UserError(f"--jobs must be 1 or more; got {options.jobs}")


def look_up(path: Path, key: str, depth: int = 0) -> Any:
    """Return the value of a key such as "optimizer.adamw_lr" in a TOML or its parents; None if it is absent."""
    try:
        table = value = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} must be TOML in UTF-8, got {one_line(error)}; correct the file") from None
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is not None or "extends" not in table:
        return value
    extended = path.parent / str(table["extends"])
    if depth == MAX_EXTENDS:
        raise UserError(f"`extends` must end within {MAX_EXTENDS} files, got a longer chain at {path}; break the cycle")
    return look_up(extended, key, depth + 1)


def planned_steps(options: Options) -> int | None:
    """Return the number of steps of a run; None if it is the training module's default."""
    key = options.key("steps")
    set_here = [setting.removeprefix(f"{key}=") for setting in options.settings if setting.startswith(f"{key}=")]
    if not set_here:
        return look_up(options.config, key)
    if not set_here[-1].isdecimal() or len(set_here[-1]) > 15:
        raise UserError(f"--set {key} must be a number of steps; got {set_here[-1]!r}")
    return int(set_here[-1])


def finished(folder: Path, steps: int | None) -> bool:
    """Return whether a run of this length ended or diverged, from its finished.json."""
    if not (folder / END).exists():
        return False
    end = read_end(folder)
    return bool(end.get("diverged", False)) or steps in (None, end["step"])


def read_end(folder: Path) -> dict:
    """Return a run's finished.json: its last step and validation."""
    path = folder / END
    end = read_object(path)
    require(is_number(end.get("step")), path, "a number as step", end.get("step"))
    for key in ("val_loss", "bits_per_byte"):
        require(end.get(key) is None or is_number(end[key]), path, f"a number or null as {key}", end.get(key))
    return end


def outcome(options: Options, trial: Trial, error: str | None = None) -> dict:
    """Return the record of a run: losses (None if it diverged or failed), settings and machine."""
    folder = trial.folder(options)
    entry = {"config": options.name, "optimizer": trial.optimizer, "lr": trial.lr, "adamw_lr": trial.adamw_lr}
    entry |= {"seed": trial.seed, "val_loss": None, "bits_per_byte": None, "steps": None, "error": error}
    if error is None:
        end = read_end(folder)
        for key in ("val_loss", "bits_per_byte"):
            value = end.get(key)
            entry[key] = value if value is not None and math.isfinite(value) else None
        entry["steps"] = end["step"]
    about = read_config(folder)
    settings = {key: value for key, value in method(about.get("config", {})).items() if key not in SWEPT}
    return entry | {"torch": about.get("torch"), "machine": about.get("machine"), "settings": settings}


def read_record(path: Path) -> dict:
    """Read and check a sweep's record; returns an empty one without a file."""
    if not path.exists():
        return {"settings": {}, "runs": []}
    record = read_object(path)
    require(isinstance(record.setdefault("settings", {}), dict), path, "an object as settings", record["settings"])
    require(isinstance(record.get("runs"), list), path, "a list of runs", record.get("runs"))
    for run in record["runs"]:
        whole = isinstance(run, dict) and run.keys() >= {*KEY, "val_loss", "error"}
        whole = whole and is_number(run["lr"]) and is_number(run["seed"]) and isinstance(run["optimizer"], str)
        whole = whole and all(run[key] is None or is_number(run[key]) for key in ("adamw_lr", "val_loss"))
        require(whole, path, "runs as scripts.sweep records them", run)
    return record


def add(path: Path, entry: dict) -> None:
    """Merge one run into the record, keeping the others; a failure never replaces a loss."""
    record, settings = read_record(path), entry.pop("settings")
    runs = {tuple(run[key] for key in KEY): run for run in record["runs"]}
    identity = tuple(entry[key] for key in KEY)
    if entry["error"] is None or runs.get(identity, entry)["error"] is not None:
        runs[identity] = entry
    before = record["settings"].setdefault(f"{entry['config']}, {entry['optimizer']}", settings)
    changed = [f"{key} {before[key]} -> {value}" for key, value in settings.items() if before.get(key, value) != value]
    if changed:
        warn_once(f"{path} now mixes runs of different settings, {', '.join(changed[:3])}: use another --out")
    # One line per run, so that a diff shows only the added runs.
    lines = ",\n".join(f"  {json.dumps(run)}" for run in sorted(runs.values(), key=lambda run: str(run)))
    settings_lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(of)}" for key, of in record["settings"].items())
    write_text(path, f'{{"runs": [\n{lines}\n ],\n "settings": {{\n{settings_lines}\n }}}}\n')


def start(options: Options, trial: Trial) -> subprocess.Popen:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // options.jobs))}
    options.logs.mkdir(parents=True, exist_ok=True)
    with open(options.logs / f"{trial.name}.log", "w") as log:
        return subprocess.Popen(trial.command(options), stdout=log, stderr=subprocess.STDOUT, env=environment)


def failure_of(log: Path) -> str:
    """Return the reason for a run's failure: its error line, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return ([line for line in lines if line.startswith("error:")] or lines or ["error: no output"])[-1]


def ended(options: Options, trial: Trial, status: int, steps: int | None) -> dict:
    """Return the record of a run whose process has ended."""
    if status >= 0 and finished(trial.folder(options), steps):
        return outcome(options, trial)
    killed = f"error: killed by signal {-status}"
    return outcome(options, trial, killed if status < 0 else failure_of(options.logs / f"{trial.name}.log"))


def train(options: Options) -> list[str]:
    """Run the missing cells of the grid, `jobs` at a time, and record each; returns the names of failed runs."""
    trials, steps, failures = grid(options), planned_steps(options), []
    waiting = [trial for trial in trials if not finished(trial.folder(options), steps)]
    for trial in set(trials) - set(waiting):
        add(options.record, outcome(options, trial))
    running: dict[subprocess.Popen, Trial] = {}
    from common.launch import StopRequest  # here: it imports torch, which --help does not need

    bar = progress(total=len(trials), initial=len(trials) - len(waiting), unit="run")
    with bar, StopRequest() as stop:
        while (waiting or running) and not stop.requested:
            while waiting and len(running) < options.jobs:
                trial = waiting.pop(0)
                running[start(options, trial)] = trial
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                trial = running.pop(process)
                entry = ended(options, trial, process.returncode, steps)
                add(options.record, entry)
                failures += [trial.name] if entry["error"] else []
                loss = "diverged" if entry["val_loss"] is None else f"{entry['val_loss']:.4f}"
                bar.set_postfix_str(f"{trial.name}: {entry['error'] or loss}"[:80])
                bar.update()
        for process in running:  # no run outlives its sweep
            process.terminate()
        for process in running:
            process.wait()
    if stop.requested:
        raise UserError(f"stopped with {len(waiting) + len(running)} runs to do; the same command continues")
    return failures


def losses(runs: list[dict]) -> Curves:
    """Group recorded runs into curves; a run that diverged or failed has an infinite loss."""
    curves: Curves = {}
    order = [*STYLES, *sorted({run["optimizer"] for run in runs} - set(STYLES))]
    for run in sorted(runs, key=lambda run: (run["adamw_lr"] or 0, order.index(run["optimizer"]), run["lr"])):
        curve = curves.setdefault((run["adamw_lr"], run["optimizer"]), {})
        curve.setdefault(run["lr"], {})[run["seed"]] = math.inf if run["val_loss"] is None else run["val_loss"]
    return curves


def mean(losses: dict[int, float], seeds: Iterable[int] | None = None) -> float:
    return statistics.fmean(losses[seed] for seed in (losses if seeds is None else seeds))


def best_rate(curve: Curve) -> float:
    """Return the rate of lowest mean loss among those with the largest set of seeds.

    Rates with fewer seeds are no candidates: `contested` returns those that are lower on shared seeds.
    """
    sets = [frozenset(losses) for losses in curve.values()]
    seeds = max(sets, key=lambda each: (len(each), sets.count(each)))
    return min((lr for lr in curve if curve[lr].keys() == seeds), key=lambda lr: mean(curve[lr]))


def contested(curve: Curve) -> list[float]:
    """Return the rates with other seeds than the best one that are lower on the shared seeds."""
    best = curve[best_rate(curve)]
    return [
        lr
        for lr, losses in sorted(curve.items())
        if losses.keys() != best.keys()
        and (shared := losses.keys() & best.keys())
        and mean(losses, shared) < mean(best, shared)
    ]


def at_edge(curve: Curve) -> str:
    """Return the side on which the best rate has no neighbour: "below", "above" or ""."""
    best, rates = best_rate(curve), sorted(curve)
    return "below" if best == rates[0] else "above" if best == rates[-1] else ""


def bracketed(curve: Curve) -> str:
    """Return "yes" if both neighbours of the best rate were tried and none is lower on shared seeds, else a reason."""
    doubts = [f"try {side} {rate(best_rate(curve))}"] if (side := at_edge(curve)) else []
    doubts += [f"{rate(lr)} is lower on shared seeds: try all seeds there" for lr in contested(curve)]
    return f"no: {'; '.join(doubts)}" if doubts else "yes"


def table(curves: Curves) -> str:
    """Return a table of each optimizer's best rate, its loss, and whether it is bracketed."""
    rows = []
    for (adamw_lr, optimizer), curve in curves.items():
        best = best_rate(curve)
        diverged = math.isinf(mean(curve[best]))
        reached = "diverged or failed" if diverged else mean_and_spread(list(curve[best].values()))
        part = "the same" if adamw_lr is None else rate(adamw_lr)
        rows.append([style_of(optimizer).label, part, rate(best), reached, bracketed(curve)])
    return markdown(["optimizer", "AdamW part's rate", "best rate", "validation loss", "bracketed"], rows)


def paired(curves: Curves) -> dict[tuple[float | None, str], Paired]:
    """Return each optimizer's loss minus the best optimizer's, paired by seed, for each rate of the AdamW part."""
    found = {}
    for part in dict.fromkeys(adamw_lr for adamw_lr, _ in curves):
        bests = {name: curve[best_rate(curve)] for (adamw_lr, name), curve in curves.items() if adamw_lr == part}
        first = min(bests, key=lambda name: mean(bests[name]))
        for name, losses in bests.items():
            if name != first and (difference := paired_difference(losses, bests[first])):
                found[part, name] = difference
    return found


def paired_table(curves: Curves) -> str:
    """Return a table of paired differences with 95 % intervals; "" if no two optimizers share two seeds."""
    rows = []
    for (part, name), each in paired(curves).items():
        digits = digits_of(each.half_width)
        text = f"{each.mean:+.{digits}f} ± {each.half_width:.{digits}f} ({each.seeds} seeds)"
        verdict = "yes" if each.is_beyond_noise else "no"
        rows.append([style_of(name).label, "the same" if part is None else rate(part), text, verdict])
    heads = [
        "optimizer",
        "AdamW part's rate",
        "loss minus the best one's, paired by seed, 95 % interval",
        "beyond noise",
    ]
    return markdown(heads, rows) if rows else ""


def draw_paired(curves: Curves, out: Path, title: str) -> None:
    """Draw the paired differences as points with intervals, a panel per rate of the AdamW part."""
    differences = paired(curves)
    parts = list(dict.fromkeys(part for part, _ in differences))
    seeds = seeds_in_words(seed for curve in curves.values() for seed in curve[best_rate(curve)])
    figure, panels = new_figure(title, f"loss minus the best optimizer's, each at its best rate; {seeds}", len(parts))
    for panel, part in zip(panels, parts, strict=True):
        its = {name: each for (of, name), each in differences.items() if of == part}
        order = sorted(its, key=lambda name: -its[name].mean)  # lowest on top
        for height, name in enumerate(order):
            style, each = style_of(name), its[name]
            panel.errorbar(
                each.mean, height, xerr=each.half_width, color=style.color, marker=style.marker, capsize=4, markersize=8
            )
        panel.axvline(0, color=FAINT, linewidth=1)
        panel.set_yticks(range(len(order)), labels=[style_of(name).label for name in order])
        panel.set_ylim(-0.6, len(order) - 0.4)
        panel.grid(axis="y", visible=False)
        panel.grid(axis="x", color="#E4E4E4", linewidth=0.8)
        first = next(style_of(name).label for of, name in curves if of == part and name not in its)
        panel.set_xlabel(
            f"above {first}, paired by seed, with its 95 % interval"
            + ("" if part is None else f"; AdamW part {rate(part)}")
        )
    figure.subplots_adjust(left=0.13)
    save(figure, out)


def draw(curves: Curves, out: Path, title: str) -> None:
    """Draw the final loss against the learning rate, a panel per rate of the AdamW part, scaled to the minima."""
    valleys = []  # each best, and its neighbours
    for curve in curves.values():
        means, at = [mean(curve[lr]) for lr in sorted(curve)], sorted(curve).index(best_rate(curve))
        valleys += [each for each in means[max(0, at - 1) : at + 2] if math.isfinite(each)]
    if not valleys:
        raise UserError(
            f"a curve needs a finite loss, every run diverged or failed; {out.with_suffix('.json')} has the reasons"
        )
    margin = (max(valleys) - min(valleys)) * 0.1 or 0.05
    parts = list(dict.fromkeys(adamw_lr for adamw_lr, _ in curves))
    seeds = seeds_in_words(seed for curve in curves.values() for losses in curve.values() for seed in losses)
    legend = f"final loss, mean of {seeds}; ring: best, square: at the edge, hollow: fewer seeds"
    figure, panels = new_figure(title, legend, rows=len(parts), sharey=True)
    for panel, part in zip(panels, parts, strict=True):
        panel.set_ylim(min(valleys) - margin, max(valleys) + margin)
        panel.set_xlabel(
            "learning rate of " + ("all tensors" if part is None else f"the matrices; of the AdamW part {rate(part)}")
        )
        draw_panel(panel, {optimizer: curve for (adamw_lr, optimizer), curve in curves.items() if adamw_lr == part})
    save(figure, out)


def draw_panel(panel, curves: dict[str, Curve]) -> None:
    """Draw curves over the rates, bars over the seeds, and an × above for runs that diverged or failed."""
    from matplotlib.ticker import NullLocator  # here: --help does not need it

    bottom, top = panel.get_ylim()
    tried = sorted({lr for curve in curves.values() for lr in curve})
    panel.set_xscale("log")
    panel.set_xticks(tried, labels=map(rate, tried))
    panel.xaxis.set_minor_locator(NullLocator())
    margin = max(1.1, (tried[-1] / tried[0]) ** 0.05)
    edge = tried[-1] * margin
    panel.set_xlim(tried[0] / margin, edge)
    labels, diverged = [], dict.fromkeys(tried, 0)
    for optimizer, curve in sorted(curves.items(), key=lambda item: style_of(item[0]).width):  # thickest on top
        style, rates, best = style_of(optimizer), sorted(curve), best_rate(curve)
        color, lowest, edge_best = style.color, mean(curve[best]), at_edge(curve)
        means = [min(mean(curve[lr]), 2 * top - bottom) for lr in rates]  # above the panel, but finite
        panel.plot(rates, means, color=color, linewidth=style.width, marker=style.marker, markersize=6)
        fewer = [(lr, each) for lr, each in zip(rates, means, strict=True) if len(curve[lr]) < len(curve[best])]
        for lr, each in fewer:
            panel.plot(lr, each, style.marker, color=color, markerfacecolor="white", markersize=6)
        ring = {"markersize": 14, "markerfacecolor": "none", "color": color, "markeredgewidth": 1.6}
        panel.plot(best, lowest, "s" if edge_best else "o", **ring)
        panel.plot([best, edge], [lowest, lowest], ":", color=color, linewidth=1, alpha=0.7)
        for lr in rates:
            finite = [loss for loss in curve[lr].values() if math.isfinite(loss)]
            if len(finite) > 1:
                panel.vlines(lr, min(finite), max(finite), color=color, linewidth=6, alpha=0.3)
            if len(finite) < len(curve[lr]):  # above the panel, stacked
                height = top + (top - bottom) * (0.025 + 0.03 * diverged[lr])
                panel.plot(lr, height, "x", color=color, markeredgewidth=2, clip_on=False)
                diverged[lr] += 1
        reached = mean_and_spread(list(curve[best].values())).split()[0] if math.isfinite(lowest) else ""
        at = f"at {rate(best)}{', edge' * bool(edge_best)}"
        words = f"{reached}  {style.label} {at}" if reached else f"{style.label}: no finite loss"
        labels.append((edge, lowest, words, optimizer))
    label_ends(panel, labels)


def main() -> None:
    options = parse_options(Options, "python -m scripts.sweep", __doc__)
    check(options)
    failures = [] if options.draw_only else train(options)
    recorded = read_record(options.record)["runs"]
    curves = losses([run for run in recorded if run["config"] == options.name])
    if not curves:
        names = ", ".join(sorted({run["config"] for run in recorded})) or "nothing"
        raise UserError(f"{options.record} must hold a run of {options.name}, holds {names}: run the sweep first")
    print(table(curves))
    picture = options.record.with_suffix(".png")
    draw(curves, picture, options.title or f"Learning rates: {options.subject}")
    print(f"\n{picture}, from {options.record}")
    if differences := paired_table(curves):
        title = options.title or f"Differences: {options.subject}"
        draw_paired(curves, picture.with_stem(f"{picture.stem}_paired"), title)
        print(f"\n{differences}\n\n{picture.with_stem(f'{picture.stem}_paired')}")
    if failures:
        named = ", ".join(failures[:3]) + ", ..." * (len(failures) > 3)
        raise UserError(f"{len(failures)} runs failed ({named}): their output is in {options.logs}")


if __name__ == "__main__":
    main_guard(main)
