"""A SiT of digits that trains in a second in this process."""

from pathlib import Path

import torch
from torch import Tensor, nn

from common import checkpoint
from common.config import parse_config
from common.launch import Process
from common.runlog import read_metrics
from scripts.drill import tiny
from SIT import train as training
from SIT.model import ModelConfig, SiT
from SIT.train import Config

ROOT = Path(__file__).resolve().parents[1]
ONE = Process(0, 0, 1, torch.device("cpu"))  # a single process
CONFIG = """
[schedule]
decay = "cosine"
"""
# Nothing divides: of 5 images in micro-batches of 1, one of 2 ranks has none in the last round, as in that of
# the 5 validation images.
UNEVEN = """
steps = 4
[data]
batch_size = 5
micro_batch = 1
[eval]
every = 2
images = 5
[checkpoint]
every = 2
"""
TIMINGS = {"step_ms", "optimizer_ms", "images_per_second", "peak_memory_mb"}


def write_config(folder: Path, differing: str = UNEVEN) -> Path:
    """Write a config in this folder: the one above, changed by a test's own TOML; returns its path."""
    encoder = folder / "encoder"
    tiny.write_encoder(encoder)
    return tiny.write_config(folder, "tiny", tiny.SIT.format(encoder=encoder), CONFIG, differing)


def settings_of(config: Path, *arguments: str, out: Path | None = None) -> Config:
    return parse_config(Config, [str(config), "--out", str(out or config.parent / "runs"), *arguments])


def train(config: Path, *arguments: str, out: Path | None = None) -> bool:
    """Train in this process: a process of its own takes seconds to start."""
    return training.train(settings_of(config, *arguments, out=out), ONE)


def run_folder(out: Path) -> Path:
    """The one run below this folder."""
    (folder,) = (out / "default").iterdir()
    return folder


def curves(out: Path) -> list[dict]:
    """The metrics of the one run below this folder, without times and memory."""
    lines = read_metrics(run_folder(out))
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def weights(run: Path, settings: Config) -> dict[str, Tensor]:
    """The weights of a run's newest checkpoint in float64: model.NAME and average.NAME."""
    both = nn.ModuleDict({name: SiT(settings.model).double() for name in ("model", "average")})
    assert checkpoint.load(run / "checkpoints", both)
    return dict(both.named_parameters())


def random_model(**changes) -> SiT:
    """A tiny SiT whose every weight is random: a new one puts out zeros."""
    shape = {"size": "", "patch_size": 2, "depth": 2, "width": 16, "n_head": 2, "input_size": 8, "channels": 1}
    model = SiT(ModelConfig(**shape | {"n_class": 10, "z_dim": 0} | changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()
