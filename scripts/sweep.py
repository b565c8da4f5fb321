"""Trains a grid of learning rates for each optimizer, and draws what each rate led to.

    python -m scripts.sweep nanoGPT/configs/stdlib.toml --lrs 4e-3 8e-3 1.6e-2 --seeds 1337 1338 1339 --jobs 2
    python -m scripts.sweep nanoGPT/configs/stdlib.toml --optimizers olion muon --adamw-lr 4e-3 --set steps=200
    python -m scripts.sweep Llama/train_configs/stdlib.toml --module Llama.train --jobs 2
    python -m scripts.sweep nanoGPT/configs/stdlib.toml --draw-only

The same command again does what is missing. Every outcome is merged into one JSON, where nothing recorded is lost.
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
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.ticker import NullLocator

from common import UserError, progress, warn
from common.figure import STYLES, label_ends, markdown, mean_and_spread, new_figure, rate, save, style_of
from common.launch import StopRequest, main_guard
from common.runlog import run_name
from scripts.figures import method, read_config

KEY = ("config", "optimizer", "lr", "adamw_lr", "seed")  # what makes a recorded run another run
SWEPT = {"optimizer.name", "optimizer.lr", "optimizer.adamw_lr", "seed"}
TITAN = {"seed": "debug.seed", "group": "job.group", "steps": "training.steps"}  # torchtitan's words for these keys

warn_once = cache(warn)  # not after every run

# (rate of the AdamW part, optimizer) -> learning rate -> a loss for each seed
Curves = dict[tuple[float | None, str], dict[float, list[float]]]


@dataclass(frozen=True)
class Options:
    """Trains a grid of learning rates for each optimizer, and draws what each rate led to."""

    config: tyro.conf.Positional[Path]
    """The experiment's TOML, as its train.py takes it."""
    optimizers: tuple[str, ...] = tuple(STYLES)
    lrs: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    """Learning rates, each tried with each optimizer."""
    seeds: tuple[int, ...] = (1337,)
    adamw_lr: tuple[float, ...] = ()
    """Rates of the AdamW part (embeddings, head, norms), each tried with each rate. Default: the config's."""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = ()
    """More of the experiment's options, as key=value; they become a part of the sweep's name."""
    out: Path | None = None
    """The record; the picture lies beside it. Default: images/sweep_EXPERIMENT_NAME.json, NAME being the config's."""
    jobs: int = 1
    """Runs at once; each gets its share of the cores."""
    module: str = "nanoGPT.train"
    """The experiment's training module."""
    draw_only: bool = False
    """Only draws, from the record."""
    title: str | None = None
    """Of the picture."""

    @property
    def experiment(self) -> str:
        return self.module.split(".")[0].lower()

    def key(self, name: str) -> str:
        """What the training module calls its key `name`."""
        return TITAN.get(name, name) if self.experiment == "llama" else name

    @property
    def name(self) -> str:
        return " ".join([self.config.stem, *sorted(self.settings)])

    @property
    def group(self) -> str:
        return "sweep-" + re.sub(r"[^\w.]+", "-", self.name)

    @property
    def runs(self) -> Path:
        """Where the training module leaves the runs of a group."""
        return Path("runs", self.experiment, self.group)

    @property
    def logs(self) -> Path:
        """What the runs printed; not among them, where a training module may move old folders aside."""
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
        flags = {"optimizer.name": self.optimizer, "optimizer.lr": f"{self.lr:g}", options.key("seed"): self.seed}
        if self.adamw_lr is not None:
            flags["optimizer.adamw-lr"] = f"{self.adamw_lr:g}"
        flags[options.key("group")] = options.group
        flags |= dict(setting.split("=", 1) for setting in options.settings)
        arguments = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        quiet = ["--wandb", "disabled", "--checkpoint.every", "0"]  # 0: no checkpoints
        if options.experiment == "llama":
            quiet = ["--metrics.wandb", "disabled", "--checkpoint.load-only"]
        return [sys.executable, "-m", options.module, str(options.config), *arguments, *quiet]


def grid(options: Options) -> list[Trial]:
    """Every cell, seeds outermost: a sweep that is stopped early has seen all rates once."""
    parts = options.adamw_lr or (look_up(options.config, "optimizer.adamw_lr"),)
    cells = product(options.seeds, parts, options.lrs, options.optimizers)
    return [Trial(optimizer, lr, adamw_lr, seed) for seed, adamw_lr, lr, optimizer in cells]


def check(options: Options) -> None:
    """Refuses what no run could use, before the first one starts."""
    if not options.config.is_file():
        raise FileNotFoundError(f"a sweep needs the experiment's TOML; there is no {options.config}")
    for setting in options.settings:
        key, equals, _ = setting.partition("=")
        if not key or not equals or key.replace("-", "_") in SWEPT | {options.key("seed")}:
            raise ValueError(f"--set takes key=value for keys that are not swept; got {setting!r}")
    if options.jobs < 1:
        raise ValueError(f"--jobs takes a number of runs from 1 up; got {options.jobs}")


def look_up(path: Path, key: str) -> Any:
    """What a TOML, or the one that it extends, says of a key such as "optimizer.adamw_lr"; None where neither does."""
    try:
        table = value = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None and "extends" in table:
        return look_up(path.parent / table["extends"], key)
    return value


def planned_steps(options: Options) -> int | None:
    """The last step of a run, or None where only the training module knows."""
    key = options.key("steps")
    set_here = [setting.removeprefix(f"{key}=") for setting in options.settings if setting.startswith(f"{key}=")]
    return int(set_here[-1]) if set_here else look_up(options.config, key)


def finished(folder: Path, steps: int | None) -> bool:
    """finished.json is written when a run ends or diverges; a run of another length was another sweep's."""
    mark = folder / "finished.json"
    end = json.loads(mark.read_text()) if mark.exists() else None
    return end is not None and (end.get("diverged", False) or steps in (None, end["step"]))


def outcome(options: Options, trial: Trial, error: str | None = None) -> dict:
    """What is recorded of a run: its losses (None where it diverged or failed), and what it ran with and on."""
    folder = trial.folder(options)
    entry = {"config": options.name, "optimizer": trial.optimizer, "lr": trial.lr, "adamw_lr": trial.adamw_lr}
    entry |= {"seed": trial.seed, "val_loss": None, "bits_per_byte": None, "steps": None, "error": error}
    if error is None:
        end = json.loads((folder / "finished.json").read_text())
        for key in ("val_loss", "bits_per_byte"):
            entry[key] = end[key] if end[key] is not None and math.isfinite(end[key]) else None
        entry["steps"] = end["step"]
    about = read_config(folder)
    settings = {key: value for key, value in method(about.get("config", {})).items() if key not in SWEPT}
    return entry | {"torch": about.get("torch"), "machine": about.get("machine"), "settings": settings}


def read_record(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {"settings": {}, "runs": []}


def add(path: Path, entry: dict) -> None:
    """Merges one run into the record; what is there stays, and a failure never replaces a loss."""
    record, settings = read_record(path), entry.pop("settings")
    runs = {tuple(run[key] for key in KEY): run for run in record["runs"]}
    place = tuple(entry[key] for key in KEY)
    if entry["error"] is None or runs.get(place, entry)["error"] is not None:
        runs[place] = entry
    before = record["settings"].setdefault(f"{entry['config']}, {entry['optimizer']}", settings)
    changed = [f"{key} {before[key]} -> {value}" for key, value in settings.items() if before.get(key, value) != value]
    if changed:
        warn_once(f"{path} now mixes runs of different settings, {', '.join(changed[:3])}: give them another --out")
    # One line a run: what a later sweep adds is what a diff shows.
    lines = ",\n".join(f"  {json.dumps(run)}" for run in sorted(runs.values(), key=lambda run: str(run)))
    settings_lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(of)}" for key, of in record["settings"].items())
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(f'{{"runs": [\n{lines}\n ],\n "settings": {{\n{settings_lines}\n }}}}\n')
    aside.replace(path)  # whole, whenever the sweep is stopped


def start(options: Options, trial: Trial) -> subprocess.Popen:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // options.jobs))}
    options.logs.mkdir(parents=True, exist_ok=True)
    with open(options.logs / f"{trial.name}.log", "w") as log:
        return subprocess.Popen(trial.command(options), stdout=log, stderr=subprocess.STDOUT, env=environment)


def last_words(log: Path) -> str:
    """Why a run failed: its error line, or else the last thing that it said."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return ([line for line in lines if line.startswith("error:")] or lines or ["error: ended without a word"])[-1]


def ended(options: Options, trial: Trial, status: int, steps: int | None) -> dict:
    """The outcome of a run whose process has ended."""
    if status >= 0 and finished(trial.folder(options), steps):
        return outcome(options, trial)
    killed = f"error: killed by signal {-status}"
    return outcome(options, trial, killed if status < 0 else last_words(options.logs / f"{trial.name}.log"))


def train(options: Options) -> list[str]:
    """Runs what is missing of the grid, `jobs` at once, and records each end; returns the names of what failed."""
    trials, steps, failures = grid(options), planned_steps(options), []
    waiting = [trial for trial in trials if not finished(trial.folder(options), steps)]
    for trial in set(trials) - set(waiting):
        add(options.record, outcome(options, trial))
    running: dict[subprocess.Popen, Trial] = {}
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
        raise UserError(f"stopped with {len(waiting) + len(running)} runs to do; the same command does them")
    return failures


def losses(runs: list[dict]) -> Curves:
    """Sorts recorded runs into curves; a run that diverged or failed has an infinite loss."""
    curves: Curves = {}
    order = [*STYLES, *sorted({run["optimizer"] for run in runs} - set(STYLES))]
    for run in sorted(runs, key=lambda run: (run["adamw_lr"] or 0, order.index(run["optimizer"]), run["lr"])):
        curve = curves.setdefault((run["adamw_lr"], run["optimizer"]), {})
        curve.setdefault(run["lr"], []).append(math.inf if run["val_loss"] is None else run["val_loss"])
    return curves


def best_rate(curve: dict[float, list[float]]) -> float:
    return min(curve, key=lambda lr: statistics.fmean(curve[lr]))


def table(curves: Curves) -> str:
    """Each optimizer's best rate, what it reached there, and whether rates on both sides of it were tried."""
    rows = []
    for (adamw_lr, optimizer), curve in curves.items():
        best, rates = best_rate(curve), sorted(curve)
        edges = {rates[0]: f"no: try below {rate(best)}", rates[-1]: f"no: try above {rate(best)}"}
        diverged = math.isinf(statistics.fmean(curve[best]))
        reached = "diverged or failed" if diverged else mean_and_spread(curve[best])
        part = "the same" if adamw_lr is None else rate(adamw_lr)
        rows.append([style_of(optimizer).label, part, rate(best), reached, edges.get(best, "yes")])
    return markdown(["optimizer", "AdamW part's rate", "best rate", "validation loss", "bracketed"], rows)


def draw(curves: Curves, out: Path, title: str) -> None:
    """Final loss against learning rate, a panel for each rate of the AdamW part; the valleys fill the picture."""
    valleys = []  # each best, and what was tried right beside it
    for curve in curves.values():
        means = [statistics.fmean(curve[lr]) for lr in sorted(curve)]
        at = means.index(min(means))
        valleys += [mean for mean in means[max(0, at - 1) : at + 2] if math.isfinite(mean)]
    if not valleys:
        raise ValueError(
            f"every run diverged or failed, so there is no curve to draw; {out.with_suffix('.json')} says why"
        )
    margin = (max(valleys) - min(valleys)) * 0.1 or 0.05
    parts = list(dict.fromkeys(adamw_lr for adamw_lr, _ in curves))
    legend = "final validation loss, mean over seeds; ring: best, bar: lowest to highest, ×: diverged or failed"
    figure, panels = new_figure(title, legend, rows=len(parts), sharey=True)
    for panel, part in zip(panels, parts, strict=True):
        panel.set_ylim(min(valleys) - margin, max(valleys) + margin)
        panel.set_xlabel(
            "learning rate of " + ("all tensors" if part is None else f"the matrices; of the AdamW part {rate(part)}")
        )
        draw_panel(panel, {optimizer: curve for (adamw_lr, optimizer), curve in curves.items() if adamw_lr == part})
    save(figure, out)


def draw_panel(panel, curves: dict[str, dict[float, list[float]]]) -> None:
    bottom, top = panel.get_ylim()
    tried = sorted({lr for curve in curves.values() for lr in curve})
    panel.set_xscale("log")
    panel.set_xticks(tried, labels=map(rate, tried))
    panel.xaxis.set_minor_locator(NullLocator())
    margin = max(1.1, (tried[-1] / tried[0]) ** 0.05)
    edge = tried[-1] * margin
    panel.set_xlim(tried[0] / margin, edge)
    labels, diverged = [], dict.fromkeys(tried, 0)
    for optimizer, curve in sorted(curves.items(), key=lambda item: style_of(item[0]).width):  # the thickest on top
        style, rates, best = style_of(optimizer), sorted(curve), best_rate(curve)
        color, lowest = style.color, statistics.fmean(curve[best])
        means = [min(statistics.fmean(curve[lr]), 2 * top - bottom) for lr in rates]  # out of sight, yet finite
        panel.plot(rates, means, color=color, linewidth=style.width, marker=style.marker, markersize=6)
        panel.plot(best, lowest, "o", markersize=14, markerfacecolor="none", color=color, markeredgewidth=1.6)
        panel.plot([best, edge], [lowest, lowest], ":", color=color, linewidth=1, alpha=0.7)
        for lr in rates:
            finite = [loss for loss in curve[lr] if math.isfinite(loss)]
            if len(finite) > 1:
                panel.vlines(lr, min(finite), max(finite), color=color, linewidth=6, alpha=0.3)
            if len(finite) < len(curve[lr]):  # above the panel, one over the other
                height = top + (top - bottom) * (0.025 + 0.03 * diverged[lr])
                panel.plot(lr, height, "x", color=color, markeredgewidth=2, clip_on=False)
                diverged[lr] += 1
        words = f"{lowest:#.4g}  {style.label} at {rate(best)}" if math.isfinite(lowest) else f"{style.label} has none"
        labels.append((edge, lowest, words, optimizer))
    label_ends(panel, labels)


def main() -> None:
    options = tyro.cli(Options)
    check(options)
    failures = [] if options.draw_only else train(options)
    recorded = read_record(options.record)["runs"]
    curves = losses([run for run in recorded if run["config"] == options.name])
    if not curves:
        names = ", ".join(sorted({run["config"] for run in recorded})) or "nothing"
        raise ValueError(f"there is no run of {options.name} in {options.record}; it holds {names}")
    print(table(curves))
    draw(curves, options.record.with_suffix(".png"), options.title or f"Learning rates on {options.name}")
    print(f"\n{options.record.with_suffix('.png')}, from {options.record}")
    if failures:
        named = ", ".join(failures[:3]) + ", ..." * (len(failures) > 3)
        raise ValueError(f"{len(failures)} runs failed ({named}): what they said is in {options.logs}")


if __name__ == "__main__":
    main_guard(main)
