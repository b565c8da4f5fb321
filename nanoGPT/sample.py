"""Continue a prompt with a trained model.

    python -m nanoGPT.sample --run runs/nanogpt/stdlib/olion-lr2e-3-s1337 --prompt "def main():"

It uses the run's newest checkpoint and the tokenizer of its corpus.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common import UserError
from common.config import at_least, from_dict
from common.guard import main_guard
from common.json_files import check, read_object
from common.options import parse_options

if TYPE_CHECKING:
    from nanoGPT.model import GPT


@dataclass(frozen=True)
class Sample:
    run: Path
    """Folder of a run, with config.json and checkpoints/."""
    prompt: str = ""
    """Beginning of the text; empty: start of a document."""
    tokens: int = 256
    """Number of tokens to add."""
    temperature: float = 0.8
    """Below 1 favours likelier tokens; 0 takes the likeliest each time."""
    top_k: int = 50
    """Sample among this many of the likeliest tokens; 0: among all."""
    seed: int = 0
    """The same seed on the same device gives the same text."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to compute on; auto takes a GPU if there is one."""


def sample(config: Sample) -> str:
    """Return the prompt and its continuation.

    Raises UserError for an option out of range and for another experiment's run, FileNotFoundError if the run, its
    checkpoint or its corpus is missing.
    """
    at_least(0, config, "tokens", "temperature", "top_k", "seed")
    if config.seed >= 2**64:  # torch's generators take 64 bits
        raise UserError(f"--seed must be below 2**64, got {config.seed}")
    import torch  # here: these imports take seconds, and --help does not need them

    from common import launch
    from nanoGPT.data import tokenizer

    model, corpus = load_run(config.run)
    device = launch.start(config.device).device
    model.to(device).eval()
    encoding = tokenizer(corpus["tokenizer"])
    # In the corpus every document follows an end-of-text.
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


def load_run(run: Path) -> "tuple[GPT, dict]":
    """Return a run's model with its newest weights, and the meta.json of its corpus."""
    from common import checkpoint
    from nanoGPT.data import fit_vocabulary, read_meta
    from nanoGPT.model import GPT, GPTConfig

    path, remedy = run / "config.json", "give the folder of a run, below runs/nanogpt"
    record = read_object(path, {"experiment": str}, remedy)
    if record["experiment"] != "nanogpt":
        raise UserError(f"the run must be nanoGPT's, {run} is of {record['experiment']}: give another folder")
    check(record, str(path), {"config": {"data": {"folder": str}, "model": dict}}, remedy)
    settings = record["config"]
    corpus = read_meta(settings["data"]["folder"])
    model = GPT(fit_vocabulary(from_dict(GPTConfig, settings["model"]), corpus))
    if checkpoint.load(run / "checkpoints", model) is None:
        raise FileNotFoundError(f"{run / 'checkpoints'} must hold a checkpoint, holds none: train the run first")
    return model, corpus


def main() -> None:
    print(sample(parse_options(Sample, "python -m nanoGPT.sample", __doc__)))


if __name__ == "__main__":
    main_guard(main)
