"""Runs for the faults: a corpus, a config and a finished run of each experiment, which take seconds."""

import shutil
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

from scripts.drill import tiny
from scripts.drill.harness import forked, program

ROOT = Path(__file__).resolve().parents[2]
GPT = """
steps = 4
[data]
batch_size = 2
micro_batch = 2
[schedule]
warmup = 2
[eval]
every = 4
windows = 4
[checkpoint]
every = 2
"""
SIT = """
steps = 4
[data]
batch_size = 4
micro_batch = 4
[eval]
every = 4
images = 4
[checkpoint]
every = 2
"""
LLAMA = {
    "--model.hf_assets_path": "{folder}/llama_corpus",
    "--training.dataset_path": "{folder}/llama_corpus",
    "--validation.dataset_path": "{folder}/llama_corpus",
    "--training.steps": "4",
    "--training.seq_len": "32",
    "--training.local_batch_size": "2",
    "--training.global_batch_size": "2",
    "--validation.windows": "2",
    "--validation.local_batch_size": "2",
    "--validation.freq": "4",
    "--metrics.log_freq": "1",
    "--metrics.wandb": "disabled",
    "--lr_scheduler.warmup_steps": "2",
    "--job.group": "drill",
    "--checkpoint.interval": "2",
}
EXPERIMENTS = ("nanoGPT", "SIT", "Llama")


class Runs:
    """Corpora, configs and finished runs below a folder, created on first use."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def gpt_config(self) -> Path:
        """The TOML of a GPT, with its corpus beside it."""
        text, corpus = tiny.write_text(self.folder / "text.txt", functions=1000), self.folder / "corpus"
        _done("nanoGPT.prepare", text, "--out", corpus, "--workers", "1")
        return tiny.write_config(self.folder, "gpt", tiny.GPT.format(corpus=corpus), GPT)

    @cached_property
    def sit_config(self) -> Path:
        """The TOML of a SiT of digits, with its encoder beside it."""
        encoder = self.folder / "digits"
        forked(partial(tiny.write_encoder, encoder))
        return tiny.write_config(self.folder, "sit", tiny.SIT.format(encoder=encoder), SIT)

    @cached_property
    def llama_flags(self) -> list[str]:
        """The command line of a Llama, whose corpus is part of this repository."""
        source = self.folder / "source"
        shutil.copytree(ROOT / "common", source, ignore=shutil.ignore_patterns("__pycache__"))
        _done("Llama.prepare", source, "--out", self.folder / "llama_corpus", "--vocab-size", "400")
        flags = [word.format(folder=self.folder) for pair in LLAMA.items() for word in pair]
        return [str(ROOT / "Llama/train_configs/stdlib.toml"), *flags]

    def command(self, experiment: str, out: Path, *more: object) -> list[str]:
        """Return the command that trains an experiment into `out`, module first."""
        more = tuple(map(str, more))
        if experiment == "Llama":
            return ["Llama.train", *self.llama_flags, "--job.dump_folder", str(out), *more]
        config = self.gpt_config if experiment == "nanoGPT" else self.sit_config
        return [f"{experiment}.train", str(config), "--out", str(out), *more]

    def finished(self, experiment: str) -> Path:
        """Return the folder of a finished run with checkpoints of steps 2 and 4; do not modify it."""
        out = self.folder / f"finished-{experiment}"
        if not out.exists():
            _done(*self.command(experiment, out))
        return run_in(out)

    def copy(self, experiment: str, name: str) -> Path:
        """Return a fresh copy of the finished run in a folder of its own."""
        finished, out = self.finished(experiment), self.folder / name
        shutil.rmtree(out, ignore_errors=True)
        target = out / finished.parent.name / finished.name
        shutil.copytree(finished, target)
        return target


def run_in(out: Path) -> Path:
    """Return the only run below a folder of runs."""
    (run,) = {path.parent for path in out.rglob("config.json")}
    return run


def checkpoints(run: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run / ("checkpoint" if (run / "checkpoint").is_dir() else "checkpoints")


def training(words: list[str]) -> Callable[[], None]:
    """Return a function that runs this training command."""
    return program(*words)


def _done(module: str, *argv: object) -> None:
    outcome = forked(program(module, *argv), 300)
    if outcome.status != 0:
        raise RuntimeError(f"{module} must run before faults are tried; status {outcome.status}: {outcome.err[-2000:]}")
