"""Runs for the faults: a corpus, a config and a finished run of each experiment, which take seconds."""

import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from scripts.drill.harness import forked, program

ROOT = Path(__file__).resolve().parents[2]
GPT = """
log_every = 1
wandb = "disabled"
device = "cpu"
steps = 4
[model]
n_layer = 2
n_head = 2
n_embd = 32
context = 32
vocab_size = 0
[data]
folder = "{folder}/corpus"
batch_size = 2
micro_batch = 2
[optimizer]
lr = 4e-3
[schedule]
warmup = 2
[eval]
every = 4
windows = 4
[checkpoint]
every = 2
"""
SIT = """
log_every = 1
wandb = "disabled"
device = "cpu"
steps = 4
ema = 0.9
[model]
size = ""
patch_size = 2
depth = 2
width = 16
n_head = 2
input_size = 8
channels = 1
n_class = 10
encoder_depth = 1
projector_width = 16
z_dim = 8
[data]
kind = "digits"
batch_size = 4
micro_batch = 4
[objective]
encoder = "digits"
encoder_folder = "{folder}/digits"
[optimizer]
lr = 4e-3
[schedule]
warmup = 2
[eval]
every = 4
images = 4
preview = 0
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
        text = self.folder / "text.txt"
        text.write_text("\n".join(f"def f{i}(x): return x * {i} + {i * i % 97}" for i in range(1000)))
        _done("nanoGPT.prepare", text, "--out", self.folder / "corpus", "--workers", "1")
        return self._written("gpt.toml", GPT)

    @cached_property
    def sit_config(self) -> Path:
        """The TOML of a SiT of digits, with its encoder beside it."""
        forked(self._make_encoder)
        return self._written("sit.toml", SIT)

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

    def _written(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text.format(folder=self.folder))
        return path

    def _make_encoder(self) -> None:
        import torch

        from SIT.digits import ENCODER_FILE, DigitsCNN, save_digits_cnn

        (self.folder / "digits").mkdir()
        torch.manual_seed(0)
        with open(self.folder / "digits" / ENCODER_FILE, "wb") as file:
            save_digits_cnn(DigitsCNN(width=4, z_dim=8), file)


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
