"""ranks that disagree: all end in one line within 60 s

Two processes of one run; the second has another command line, corpus, program or folder.
"""

import json
import math
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from scripts.drill.harness import TIMEOUT_S, Cases, Fork, Outcome, crashed, output_lines, thinned
from scripts.drill.runs import Runs, training

BOTH = ("nanoGPT", "SIT")
DIFFERENT = {  # options of rank 1, for experiments with a RunConfig
    "seed": ("--seed", "7"),
    "lr": ("--optimizer.lr", "1e-3"),
    "weight decay": ("--optimizer.weight_decay", "0.5"),
    "batch": ("--data.batch_size", "6"),
    "micro-batch": ("--data.micro_batch", "1"),
    "folder": ("--group", "other"),
    "eval.every": ("--eval.every", "1"),
    "checkpoint.every": ("--checkpoint.every", "1"),
    "steps": ("--steps", "2"),
    "resume": ("--resume",),
}
GRACE_S = 15  # after a rank's failure, for the others to report theirs
LLAMA = {
    "seed": ("--debug.seed", "7"),
    "lr": ("--optimizer.lr", "1e-3"),
    "batch": ("--training.global_batch_size", "4"),
    "validation.freq": ("--validation.freq", "1"),
    "checkpoint.interval": ("--checkpoint.interval", "1"),
    "folder": ("--job.group", "other"),
    "resume": ("--job.resume",),
}


def cases(runs: Runs, quick: bool) -> Cases:
    """Yield every disagreement."""
    for name, words, other in thinned(list(_all(runs)), quick, keep=3):
        yield name, partial(_attempt, runs, words, other)


def _all(runs: Runs) -> Iterator[tuple[str, list[str], list[str]]]:
    out = runs.folder / "ranks"
    for experiment in BOTH:
        words = runs.command(experiment, out)
        for name, more in DIFFERENT.items():
            yield f"{experiment}: another {name} on one rank", words, [*words, *more]
    words = runs.command("nanoGPT", out)
    yield "nanoGPT: another corpus on one rank", words, [*words, "--data.folder", str(_other_corpus(runs))]
    yield "nanoGPT: another root of runs on one rank", words, [*words, "--out", str(runs.folder / "elsewhere")]
    yield "nanoGPT: an invalid command line on one rank", words, [*words, "--optimizer.lr", "x"]
    yield "nanoGPT: another program on one rank", words, runs.command("SIT", out)
    yield "SIT: an encoder that is missing on one rank", (w := runs.command("SIT", out)), [*w, *_nowhere(runs)]
    llama = runs.command("Llama", out, "--training.local_batch_size", "1")
    for name, more in LLAMA.items():
        yield f"Llama: another {name} on one rank", llama, [*llama, *more]


def _nowhere(runs: Runs) -> list[str]:
    return ["--objective.encoder_folder", str(runs.folder / "nowhere")]


def _other_corpus(runs: Runs) -> Path:
    """Return a copy of the corpus with another last token and a matching meta.json."""
    from nanoGPT.data import sha256

    folder = runs.folder / "other-corpus"
    if not folder.exists():
        shutil.copytree(runs.folder / "corpus", folder)
        path = folder / "train.bin"
        path.write_bytes(path.read_bytes()[:-2] + b"\x41\x00")
        meta = json.loads((folder / "meta.json").read_text())
        meta["files"]["train.bin"]["sha256"] = sha256(path)
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def _attempt(runs: Runs, words: list[str], other: list[str]) -> str | None:
    shutil.rmtree(runs.folder / "ranks", ignore_errors=True)
    port = _free_port()
    forks = [Fork(training(line), _environment(rank, port)) for rank, line in enumerate((words, other))]
    _watch(forks)
    outcomes = [fork.wait(GRACE_S) for fork in forks]
    return next((reason for rank, end in enumerate(outcomes) if (reason := _judge(rank, end))), None)


def _watch(forks: list[Fork]) -> None:
    """Wait for the ranks and, like torchrun, end the others some time after one has failed."""
    start, failed_at = time.monotonic(), math.inf
    while not all([fork.ended() for fork in forks]):  # a list, so that every fork updates its `status`
        now = time.monotonic()
        if any(fork.status for fork in forks):
            failed_at = min(failed_at, now)
        if now - failed_at > GRACE_S:
            for fork in forks:
                fork.kill(signal.SIGTERM)
        if now - start > TIMEOUT_S:
            return
        time.sleep(0.01)


def _judge(rank: int, outcome: Outcome) -> str | None:
    if outcome.status in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return None  # ended because of another rank's failure, which is judged separately
    if crash := crashed(outcome):
        return f"rank {rank}: {crash}"
    lines = [line for line in output_lines(outcome) if "ProcessGroup" not in line]
    if outcome.status == 0:
        return f"rank {rank}: ended with status 0"
    return None if len(lines) == 1 else f"rank {rank}: {len(lines)} lines: {' | '.join(lines)[:300]}"


def _environment(rank: int, port: int) -> dict[str, str]:
    words = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    return {"MASTER_ADDR": "localhost", **{key: str(value) for key, value in words.items()}}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
