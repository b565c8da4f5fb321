"""Prepare the input of SIT.train: images of one size and their latents, or the digits' networks.

    python -m SIT.prepare convert ILSVRC/Data/CLS-LOC/train --out data/imagenet256    # a folder per class
    python -m SIT.prepare encode data/imagenet256
    torchrun --standalone --nproc-per-node 8 -m SIT.prepare encode data/imagenet256   # on eight GPUs
    python -m SIT.prepare digits                                                      # seconds, no download
    python -m SIT.prepare SIT/configs/digits.toml       # the data of that config, if it is the digits

SIT/latents.py documents the folder. Interrupted, `convert` and `encode` continue where they stopped: files are complete
or absent, and dataset.json is written last.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from common.config import parse_config
from common.guard import main_guard
from common.options import parse_options
from SIT.config import Config

CORE_COUNT = os.cpu_count() or 1


@dataclass(frozen=True)
class Convert:
    """Resize and crop images to one size; classes are numbered in the order of their folders."""

    source: tyro.conf.Positional[Path]
    """Folder with a folder of images per class."""
    out: Path
    """Folder to write: images/ with a dataset.json; outside the source."""
    size: int = 256
    """Side of the images, in pixels."""
    on_corrupt: Literal["fail", "skip"] = "fail"
    """An unreadable file ends the program (fail), or is skipped with a warning (skip)."""
    workers: int = CORE_COUNT
    """Number of threads."""


@dataclass(frozen=True)
class Encode:
    """Write the mean and the standard deviation of each image's latents; under torchrun, on several GPUs."""

    folder: tyro.conf.Positional[Path]
    """Folder with images/, as `convert` writes it; vae-sd/ with a dataset.json is added."""
    flip: bool = False
    """Encode the mirrored images to vae-sd-flip/, which training with flips also needs."""
    vae: str = "stabilityai/sd-vae-ft-mse"
    """The VAE: name on the Hugging Face Hub, or a folder with its files."""
    batch_size: int = 32
    """Images per batch. The same number gives the same bits, on any number of GPUs."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to compute on; auto takes a GPU if there is one."""
    workers: int = 8
    """Threads per rank that read images."""


@dataclass(frozen=True)
class Digits:
    """Train the digits' encoder and the judge of samples, unless they exist."""

    out: Path = Path("data/digits")
    """Folder to write."""


def prepare_for(settings: Config) -> list[Path]:
    """Prepare the digits' networks that a training config needs; returns their folders."""
    from SIT import digits

    folders = set()
    if settings.data.kind == "digits":
        folders.add(digits.FOLDER)  # the judge of samples
    if settings.objective.encoder == "digits":
        folders.add(Path(settings.objective.encoder_folder or digits.FOLDER))
    return [digits.prepare(folder) for folder in sorted(folders)]


def main() -> None:
    if sys.argv[1:] and sys.argv[1].endswith(".toml"):
        prepare_for(parse_config(Config))
        return
    options = parse_options(Convert | Encode | Digits, "python -m SIT.prepare", __doc__)
    from common import launch  # here: torch takes seconds to import, and --help does not need it
    from SIT import convert, digits, encode

    try:
        if isinstance(options, Convert):
            convert.convert(options)
        elif isinstance(options, Encode):
            encode.encode(options)
        else:
            digits.prepare(options.out)
    finally:
        launch.stop()


if __name__ == "__main__":
    main_guard(main)
