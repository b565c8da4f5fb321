"""Make the input of SIT.train: images of one size and their latents, or the digits' networks.

    python -m SIT.prepare convert ILSVRC/Data/CLS-LOC/train --out data/imagenet256    # a folder per class
    python -m SIT.prepare encode data/imagenet256
    torchrun --standalone --nproc-per-node 8 -m SIT.prepare encode data/imagenet256   # on eight GPUs
    python -m SIT.prepare digits                                                      # seconds, no download
    python -m SIT.prepare SIT/configs/digits.toml       # the data of that config, if it is the digits

SIT/latents.py has the layout of the folder. Both ways through ImageNet go on where they were interrupted: a file is
there whole or not at all, and dataset.json comes last.
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
    """Crop images to their centre, at one size, and number the classes by the order of their folders."""

    source: tyro.conf.Positional[Path]
    """A folder that has one for each class, with images in them."""
    out: Path
    """The folder to make: images/ in it, with a dataset.json; outside of the source."""
    size: int = 256
    """The side of the images, in pixels."""
    on_corrupt: Literal["fail", "skip"] = "fail"
    """A file that cannot be read is named, and either ends the work or is left out and counted."""
    workers: int = CORE_COUNT
    """Threads."""


@dataclass(frozen=True)
class Encode:
    """Write the mean and the standard deviation of each image's latents; under torchrun, on several GPUs."""

    folder: tyro.conf.Positional[Path]
    """A folder with images/, as `convert` makes it. Into it go vae-sd/ and its dataset.json."""
    flip: bool = False
    """Encode the mirrored images, into vae-sd-flip/, which training with flips needs too."""
    vae: str = "stabilityai/sd-vae-ft-mse"
    """Name on the Hugging Face Hub, or a folder with its files."""
    batch_size: int = 32
    """Images at once. The same number gives the same bits, on any number of GPUs."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    workers: int = 8
    """Threads per rank that read images."""


@dataclass(frozen=True)
class Digits:
    """Train the frozen encoder of the digits, and the judge of samples, unless they are there."""

    out: Path = Path("data/digits")
    """The folder to make."""


def prepare_for(settings: Config) -> list[Path]:
    """Make a training config's data, if it takes seconds and no download: the digits' networks; returns folders."""
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
    from common import launch  # here: --help goes without torch, which takes seconds to import
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
