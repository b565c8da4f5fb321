"""Forked processes in which faults are tried, and the outcomes that count as handled.

A fork takes milliseconds, while a new Python would import torch for seconds, and a crash ends only the fork.
"""

import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

TIMEOUT_S = 60  # within which any fault must be reported
MEMORY_BYTES = 8 * 2**30  # beyond the parent's: an impossible size fails instead of filling the machine

MODULES = [
    *("nanoGPT.train", "nanoGPT.sample", "nanoGPT.prepare", "nanoGPT.model"),
    *("SIT.train", "SIT.sample", "SIT.evaluate", "SIT.prepare", "SIT.measures", "SIT.convert", "SIT.encode"),
    *("Llama.train", "Llama.weights", "Llama.prepare", "Llama.evaluate", "Llama.arithmetic"),
    *("scripts.figures", "scripts.sweep", "scripts.plan", "scripts.bench_optimizers", "scripts.bench_signs"),
    *("scripts.bench_communication", "torch._dynamo", "torch.distributed.fsdp", "sklearn.datasets", "tyro"),
]

# Warnings (Python's have a second line, of code), torchtitan's logs, and the ends of tqdm's bars.
_ASIDE = re.compile(r"^warning:|^left out:|Warning: |^warnings\.warn|^\[titan\]|\[\d\d:\d\d[<,].*\]$")
Case = tuple[str, Callable[[], str | None]]  # a fault's name, and a trial, which returns None or how it fell short
Cases = Iterator[Case]


@dataclass(frozen=True)
class Outcome:
    """The end of a process; `status` is -N after signal N, None if it was killed after the timeout."""

    status: int | None
    out: str
    err: str
    seconds: float


class Fork:
    """A forked process that runs `function`, with its output in files."""

    def __init__(self, function: Callable[[], Any], environment: dict[str, str] | None = None):
        self._files = [tempfile.TemporaryFile() for _ in range(2)]
        self._status: int | None = None
        self._start = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(function, environment or {})

    def _run(self, function: Callable[[], Any], environment: dict[str, str]) -> None:
        status = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number, file in enumerate(self._files, start=1):
                os.dup2(file.fileno(), number)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            os.environ |= environment
            function()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def ended(self) -> bool:
        """Return whether the process has ended."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status is not None

    @property
    def status(self) -> int | None:
        """Exit status, -N after signal N; None until `ended` returns True."""
        return self._status

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, unless it has ended."""
        if not self.ended():
            os.kill(self.pid, number)

    def wait(self, timeout_s: float = TIMEOUT_S) -> Outcome:
        """Return the outcome; the process is killed, with its children, after the timeout."""
        deadline = time.monotonic() + timeout_s
        while not self.ended() and time.monotonic() < deadline:
            time.sleep(0.002)
        status = self._status
        if status is None:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._status = -signal.SIGKILL
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return Outcome(status, *texts, time.monotonic() - self._start)


def forked(function: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Outcome:
    """Run a function in a fork; returns the outcome."""
    return Fork(function).wait(timeout_s)


def preload() -> None:
    """Import the programs' modules, once for all forks."""
    for name in MODULES:
        import_module(name)


def program(module: str, *argv: object) -> Callable[[], None]:
    """Return a function that runs `python -m module argv...` in this process."""

    def run() -> None:
        from common.guard import main_guard

        sys.argv = [module, *map(str, argv)]
        main_guard(import_module(module).main)

    return run


def refusal(outcome: Outcome) -> str | None:
    """Return None for a one-line error with a nonzero status, else how the outcome differs."""
    lines = output_lines(outcome)
    if crash := crashed(outcome):
        return crash
    if outcome.status == 0:
        return f"accepted: {' '.join((lines or outcome.out.splitlines())[-1:])[:160]}"
    if len(lines) != 1:
        return f"{len(lines)} lines: {' | '.join(lines)[:300]}"
    return None


def crashed(outcome: Outcome) -> str | None:
    """Return a description of a process that hung, was killed or left a traceback; None for any other."""
    if outcome.status is None:
        return f"hung for {outcome.seconds:.0f} s: {' | '.join(output_lines(outcome)[-2:])[:200]}"
    if outcome.status < 0:
        return f"ended by signal {-outcome.status}"
    if "Traceback" in outcome.err:
        return f"traceback: {outcome.err.strip().splitlines()[-1][:200]}"
    return None


def output_lines(outcome: Outcome) -> list[str]:
    """Return the lines of stderr except warnings, logs and progress bars."""
    texts = (line.rpartition("\r")[2].strip() for line in outcome.err.split("\n"))
    return [text for text in texts if text and not _ASIDE.search(text)]


def thinned(cases: list, quick: bool, keep: int = 6) -> list:
    """Return all cases or, in a quick drill, `keep` of them, evenly spaced."""
    return cases[:: max(1, len(cases) // keep)] if quick else cases
