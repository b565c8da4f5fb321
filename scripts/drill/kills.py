"""kill -9 and signals during saves: nothing lost, resumed to equal bits

Each chain is a run that saves after every step and is killed and resumed repeatedly: during a save, or a random time
later. After each kill the newest complete checkpoint must not be older than before; at the end metrics and tensors must
equal those of an undisturbed run.
"""

import json
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from scripts.drill.harness import Cases, Fork, crashed, forked
from scripts.drill.runs import Runs, run_in, training
from scripts.drill.states import digest, newest_whole

# (experiment, optimizer) -> number of kills
CHAINS = {
    ("nanoGPT", "olion"): 10,
    ("nanoGPT", "muon"): 10,
    ("nanoGPT", "adamuon"): 10,
    ("nanoGPT", "adamw"): 10,
    ("SIT", "olion"): 10,
    ("SIT", "muon"): 10,
    ("SIT", "lion"): 10,
    ("SIT", "adamw"): 10,
    ("Llama", "olion"): 10,
    ("Llama", "adamw"): 10,
}
STEPS_PER_KILL = 8  # enough that a run does not end before its last kill, on a loaded machine
MOST_STEPS = 3  # between a resume and the kill
EVERY_STEP = {
    "Llama": ("--checkpoint.interval", "1", "--training.steps", "{steps}", "--lr_scheduler.total_steps", "{steps}"),
    "nanoGPT": ("--checkpoint.every", "1", "--steps", "{steps}"),
    "SIT": ("--checkpoint.every", "1", "--steps", "{steps}"),
}
RESUME = {"Llama": "--job.resume", "nanoGPT": "--resume", "SIT": "--resume"}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)
SAVE_S = 0.03  # approximate time of a save
START_S = 300  # longest start on a loaded machine


def cases(runs: Runs, quick: bool) -> Cases:
    """Yield every kill, and the comparison at the end of each chain."""
    draw = random.Random(0)
    chains = {("nanoGPT", "olion"): 2, ("Llama", "olion"): 1} if quick else CHAINS
    for (experiment, optimizer), kills in chains.items():
        chain = Chain(runs, experiment, optimizer, STEPS_PER_KILL * kills)
        for number in range(kills):
            sent = SIGNALS[number % len(SIGNALS)]
            yield f"{experiment}, {optimizer}, kill {number + 1} by {sent.name}", partial(chain.kill, sent, draw)
        yield f"{experiment}, {optimizer}, equal bits after {kills} kills", chain.compare


class Chain:
    """A run that is killed and resumed, and the same run undisturbed."""

    def __init__(self, runs: Runs, experiment: str, optimizer: str, steps: int):
        self._name, self._steps = experiment, steps
        more = [word.format(steps=steps) for word in EVERY_STEP[experiment]] + ["--optimizer.name", optimizer]
        self._folders = {name: runs.folder / f"kills-{experiment}-{optimizer}-{name}" for name in ("killed", "whole")}
        words = {name: runs.command(experiment, folder, *more) for name, folder in self._folders.items()}
        self._resume = training([*words["killed"], RESUME[experiment]])
        self._undisturbed = training(words["whole"])
        self._newest = 0

    def kill(self, number: signal.Signals, draw: random.Random) -> str | None:
        """Resume, kill during a save or soon after, and compare the newest complete checkpoint with the one before."""
        fork, wanted = Fork(self._resume), self._newest + draw.randint(1, MOST_STEPS)
        folder = self._folders["killed"]
        _wait(fork, lambda: _last_step(folder) >= wanted)
        if draw.random() < 0.7:
            _wait(fork, lambda: any(folder.glob("*/*/checkpoints/.partial-*")) or _unproven(folder))
        time.sleep(draw.uniform(0, SAVE_S))
        if fork.ended():
            outcome = fork.wait()
            return crashed(outcome) or f"ended by itself, with status {outcome.status}: {outcome.err[-200:]}"
        fork.kill(number)
        outcome = fork.wait()
        if number != signal.SIGKILL and (reason := crashed(outcome)):
            return reason
        before, self._newest = self._newest, newest_whole(run_in(folder))
        if self._newest < before:
            return f"the newest complete checkpoint was of step {before}, and is of step {self._newest}"
        return None

    def compare(self) -> str | None:
        """Finish the run, and compare it with the undisturbed one."""
        ends = {"killed": forked(self._resume, START_S), "whole": forked(self._undisturbed, START_S)}
        for name, end in ends.items():
            if end.status != 0:
                return f"the {name} run ended with status {end.status}: {end.err.strip()[-300:]}"
        killed, whole = (run_in(self._folders[name]) for name in ("killed", "whole"))
        if digest(killed, self._steps) != digest(whole, self._steps):
            return "tensors differ"
        return None if _curves(killed) == _curves(whole) else "metrics differ"


def _wait(fork: Fork, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while not fork.ended() and time.monotonic() < deadline:
        with suppress(FileNotFoundError):  # a folder renamed while it is read
            if happened():
                return
        time.sleep(0.001)


def _last_step(folder: Path) -> int:
    return max((int(path.name[5:]) for path in folder.glob("*/*/checkpoint*/step-*")), default=0)


def _unproven(folder: Path) -> bool:
    """Return whether a checkpoint of torchtitan has no manifest yet, as during a save."""
    return any(not (path / "manifest.json").exists() for path in folder.glob("*/*/checkpoint/step-*"))


def _curves(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        {key: line[key] for key in ("step", "train/loss", "val/loss", "grad_norm") if key in line} for line in lines
    ]
