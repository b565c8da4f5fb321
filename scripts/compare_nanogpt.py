"""Times training steps of nanoGPT.train with AdamW beside those of a checkout of karpathy/nanoGPT, at the same size.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT && bash scripts/setup.sh
    python -m nanoGPT.prepare nanoGPT/configs/stdlib.toml
    python -m scripts.compare_nanogpt ../nanoGPT
    python -m scripts.compare_nanogpt ../nanoGPT nanoGPT/configs/gpt2_small.toml --steps 100

Both train alternately, in processes of their own, on the same tokens, from the config's shape, batch and corpus, on the
GPU if there is one (bfloat16, compiled if the config says so), else on the CPU in float32. A step is a whole iteration:
batch, forward and backward pass, clipping and update; the median is over the steps after the first quarter.
"""

import os
import pickle
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro

from common import BadValue, UserError, progress
from common.guard import main_guard
from common.options import parse_options

LINE = re.compile(r"^iter \d+: loss .*, time ([0-9.]+)ms", re.MULTILINE)  # printed per step by their train.py


@dataclass(frozen=True)
class Options:
    """Times training steps of nanoGPT.train beside those of karpathy/nanoGPT."""

    checkout: tyro.conf.Positional[Path]
    """Folder of their repository, with train.py, model.py and configurator.py."""
    config: tyro.conf.Positional[Path] = Path("nanoGPT/configs/stdlib.toml")
    """Config whose shape, batch and corpus both train."""
    steps: int = 40
    """Steps of each run."""
    rounds: int = 3
    """Runs of each; the first to run alternates."""


def check() -> Options:
    options = parse_options(Options, "python -m scripts.compare_nanogpt", __doc__)
    for name in ("train.py", "model.py", "configurator.py"):
        if not (options.checkout / name).is_file():
            raise UserError(f"the checkout must hold karpathy/nanoGPT's {name}; {options.checkout / name} is missing")
    if options.steps < 4 or options.rounds < 1:
        raise BadValue(f"steps must be 4 or more and rounds 1 or more; got {options.steps} and {options.rounds}")
    return options


if __name__ == "__main__":  # --help and errors before the imports below, which take seconds
    main_guard(check)

import torch

from common.config import parse_config
from common.runlog import machine, read_metrics
from nanoGPT.config import Config
from nanoGPT.train import fit_vocabulary


def ours(options: Options, folder: Path) -> list[float]:
    """Train with nanoGPT.train; return the milliseconds of each step."""
    flags = {"steps": options.steps, "log-every": 1, "eval.every": options.steps, "eval.windows": 8}
    flags |= {"optimizer.name": "adamw", "schedule.warmup": 1, "checkpoint.every": 0, "probe.every": None}
    flags |= {"wandb": "disabled", "out": folder, "group": "compared"}
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    _run([sys.executable, "-m", "nanoGPT.train", str(options.config), *words], Path.cwd())
    (run,) = folder.glob("compared/*")
    return [line["step_ms"] for line in read_metrics(run) if "step_ms" in line]


def theirs(options: Options, settings: Config, folder: Path) -> list[float]:
    """Train with their train.py in a folder that has what it reads there; return the milliseconds of each step."""
    corpus = folder / "data" / "corpus"
    corpus.mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        (corpus / name).symlink_to(Path(settings.data.folder, name).resolve())
    with open(corpus / "meta.pkl", "wb") as file:
        pickle.dump({"vocab_size": settings.model.vocab_size}, file)
    (folder / "configurator.py").symlink_to((options.checkout / "configurator.py").resolve())
    gpu, model, batch = torch.cuda.is_available(), settings.model, settings.data
    flags = {"dataset": "corpus", "out_dir": "out", "max_iters": options.steps, "log_interval": 1, "eval_iters": 1}
    flags |= {"n_layer": model.n_layer, "n_head": model.n_head, "n_embd": model.n_embd, "block_size": model.context}
    flags |= {"batch_size": batch.micro_batch, "gradient_accumulation_steps": batch.batch_size // batch.micro_batch}
    flags |= {"eval_interval": 10**9, "always_save_checkpoint": False, "device": "cuda" if gpu else "cpu"}
    flags |= {"dtype": "bfloat16" if gpu else "float32", "compile": gpu and settings.compile}
    words = [f"--{key}={value}" for key, value in flags.items()]
    printed = _run([sys.executable, str((options.checkout / "train.py").resolve()), *words], folder)
    return [float(found) for found in LINE.findall(printed)][1:]  # the first includes a validation


def _run(command: list[str], folder: Path) -> str:
    ran = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    if ran.returncode:
        raise UserError(f"a training that is timed must end well; {command[1:3]} said: {ran.stderr[-300:].strip()}")
    return ran.stdout


def main() -> None:
    options = check()
    settings = fit_vocabulary(parse_config(Config, [str(options.config)]))
    here = machine()["machine"]
    print(f"{(here['gpus'] or [here['cpu']])[0]}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| round | nanoGPT.train, ms per step | karpathy/nanoGPT, ms per step | ratio |\n|---|---:|---:|---:|")
    found: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in progress(range(options.rounds), unit="round"):
        for name in ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours"):
            with tempfile.TemporaryDirectory() as folder:
                times = ours(options, Path(folder)) if name == "ours" else theirs(options, settings, Path(folder))
            found[name].append(median(times[len(times) // 4 :]))
        mine, other = found["ours"][-1], found["theirs"][-1]
        print(f"| {number + 1} | {mine:.1f} | {other:.1f} | {mine / other:.3f} |", flush=True)
    mine, other = median(found["ours"]), median(found["theirs"])
    print(f"| median | {mine:.1f} | {other:.1f} | {mine / other:.3f} |")


if __name__ == "__main__":
    main_guard(main)
