"""Let a trained model write on from a prompt.

    python -m nanoGPT.sample --run runs/nanogpt/stdlib/olion-lr2e-3-s1337 --prompt "def main():"

The newest checkpoint of the run is used, and the tokenizer of the corpus that it was trained on.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import tyro

from common import checkpoint, launch
from nanoGPT.data import fit_vocabulary, read_meta, tokenizer
from nanoGPT.model import GPT, GPTConfig


@dataclass(frozen=True)
class Sample:
    run: Path
    """Folder of a run, with config.json and checkpoints/."""
    prompt: str = ""
    """Where the text begins; an empty prompt is the start of a document."""
    tokens: int = 256
    """How many tokens to add."""
    temperature: float = 0.8
    """Below 1 keeps closer to the likeliest tokens; 0 takes the likeliest each time."""
    top_k: int = 50
    """Choose among this many of the likeliest tokens; 0 chooses among all."""
    seed: int = 0
    """The same seed on the same device gives the same text."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""


def sample(config: Sample) -> str:
    """Return the prompt and its continuation.

    Raises FileNotFoundError when the run, its checkpoint or its corpus is missing, ValueError when the run is not
    nanoGPT's.
    """
    for name in ("tokens", "temperature", "top_k"):
        if getattr(config, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(config, name)}")
    model, corpus = load_run(config.run)
    device = launch.start(config.device).device
    model.to(device).eval()
    encoding = tokenizer(corpus["tokenizer"])
    # Every document of the corpus follows an end-of-text.
    prompt = [encoding.eot_token, *encoding.encode(config.prompt, disallowed_special=())]
    tokens = model.generate(
        torch.tensor([prompt], device=device),  # (1, T)
        config.tokens,
        config.temperature,
        config.top_k or None,
        torch.Generator(device).manual_seed(config.seed),
        vocab_size=encoding.n_vocab,
    )
    return encoding.decode(tokens[0, 1:].tolist())


def load_run(run: Path) -> tuple[GPT, dict]:
    """Build a run's model with its newest weights, and read the meta.json of its corpus."""
    record_path = run / "config.json"
    if not record_path.is_file():
        raise FileNotFoundError(f"{run} holds no run (no config.json): give a folder below runs/nanogpt")
    record = json.loads(record_path.read_text())
    if record["experiment"] != "nanogpt":
        raise ValueError(f"the run must be nanoGPT's, {run} is of {record['experiment']}: give another folder")
    settings = record["config"]
    corpus = read_meta(settings["data"]["folder"])
    names = {field.name for field in fields(GPTConfig)}
    shape = GPTConfig(**{name: value for name, value in settings["model"].items() if name in names})
    model = GPT(fit_vocabulary(shape, corpus))
    if checkpoint.load(run / "checkpoints", model) is None:
        raise FileNotFoundError(f"{run / 'checkpoints'} must hold a checkpoint, holds none: train the run first")
    return model, corpus


def main() -> None:
    print(sample(tyro.cli(Sample, prog="python -m nanoGPT.sample", description=__doc__)))


if __name__ == "__main__":
    launch.main_guard(main)
