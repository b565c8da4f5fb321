"""Make what SIT.train reads: images of one size and their latents, or the digits' networks.

    python -m SIT.prepare convert ILSVRC/Data/CLS-LOC/train --out data/imagenet256    # a folder a class
    python -m SIT.prepare encode data/imagenet256
    torchrun --standalone --nproc-per-node 8 -m SIT.prepare encode data/imagenet256   # on eight GPUs
    python -m SIT.prepare digits                                                      # seconds, no download

SIT/latents.py has the layout of the folder. Both ways through ImageNet go on where they were interrupted: a file is
there whole or not at all, and dataset.json comes last.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from common import UserError, launch, progress, warn
from common.config import at_least
from common.corpus import locked
from SIT import digits
from SIT.data import read_ahead
from SIT.files import check_space, claim, is_whole, map_in_groups, write_json, write_whole
from SIT.latents import (
    CONVERT_IT,
    FLIPPED,
    IMAGE_SUFFIXES,
    IMAGES,
    LABELS,
    LATENTS,
    Corrupt,
    list_files,
    read_image,
    read_labels,
    visible_files,
)
from SIT.vae import DEFAULT, VAE, load_vae

CORE_COUNT = os.cpu_count() or 1
LONGEST_WAIT_S = 3600.0  # for the slowest rank; all have as many batches


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
    """What `convert` made: a folder with images/. Into it go vae-sd/ and its dataset.json."""
    flip: bool = False
    """Encode the mirrored images, into vae-sd-flip/: what training with flips needs too."""
    vae: str = DEFAULT
    """Name on the Hugging Face Hub, or a folder with its files."""
    batch_size: int = 32
    """Images at once. The same number gives the same bits, on any number of GPUs."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    workers: int = 8
    """Threads of a rank that read images."""


@dataclass(frozen=True)
class Digits:
    """Train the frozen encoder of the digits, and the judge of samples, unless they are there."""

    out: Path = digits.FOLDER
    """The folder to make."""


# ---- Images


def convert(config: Convert) -> Path:
    """Write DIR/images, and return it; raises UserError for a source without class folders or with a corrupt image."""
    at_least(1, config, "size", "workers")
    folder = config.out / IMAGES
    if folder.resolve().is_relative_to(config.source.resolve()):  # the next run would take images/ for a class
        raise UserError(f"--out must lie outside of the source, {config.source}, got {config.out}: choose another")
    sources = list_files(config.source, IMAGE_SUFFIXES, "name a folder that exists")
    outside = sorted(file for file in sources.values() if "/" not in file)
    if outside or not sources:
        found = f"{outside[0]} is outside of one" if outside else "there is none"
        raise UserError(f"{config.source} must hold images in a folder for each class, {found}: sort them into folders")
    classes = class_names(config.source, set(sources.values()))
    claim(folder, {"source": str(config.source.resolve()), "size": config.size})
    targets = {file: file.rpartition(".")[0] + ".png" for file in sorted(sources.values())}
    todo = [file for file in targets if not (folder / targets[file]).is_file()]
    check_space(folder, len(todo), 3 * config.size**2)

    def convert_one(file: str) -> str | None:
        try:
            image = centre_crop(read_image(config.source / file), config.size)
        except Corrupt as error:
            if config.on_corrupt == "fail":
                raise
            warn(f"{error}; skipped")
            return file
        write_whole(folder / targets[file], partial(save_png, image=image))
        return None

    outcomes = map_in_groups(convert_one, todo, config.workers)
    skipped = {file for file in progress(outcomes, desc="images", total=len(todo), unit=" images") if file}
    number = {name: place for place, name in enumerate(classes)}
    labels = [[targets[file], number[file.split("/")[0]]] for file in targets if file not in skipped]
    refuse_empty_classes(config.source, classes, [file for file, _ in labels])
    write_json(folder / LABELS, {"labels": labels, "classes": classes, "size": config.size})
    print(f"{folder}: {len(labels):,} images in {len(classes):,} classes, {len(skipped)} skipped")
    return folder


def class_names(source: Path, images: set[str]) -> list[str]:
    """Name the class folders of a source, in the order that numbers them, and warn of files that are no images.

    Raises UserError for a folder without images: left out, it would change the numbers of the classes after it.
    """
    classes = sorted(path.name for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    others = sorted(set(visible_files(source)) - images)
    if others:
        kinds = Counter(Path(file).suffix.lower() or "no suffix" for file in others)
        counted = ", ".join(f"{kind}: {count:,}" for kind, count in kinds.most_common())
        warn(f"{source}: {len(others):,} files are no images, and are left out ({counted}); the first is {others[0]}")
    refuse_empty_classes(source, classes, images)
    return classes


def refuse_empty_classes(source: Path, classes: list[str], images: Iterable[str]) -> None:
    """Raise UserError where no image (a path below the source) is of some class."""
    empty = sorted(set(classes) - {file.split("/")[0] for file in images})
    if empty:
        raise UserError(
            f"each class folder of {source} must hold an image that can be read ({', '.join(sorted(IMAGE_SUFFIXES))}), "
            f"{len(empty)} of {len(classes)} hold none, the first is {empty[0]}: "
            "convert its files, or move it elsewhere"
        )


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Resize the shorter side of (3, H, W) uint8 to `size` and cut out the middle: (3, size, size).

    As ADM (Dhariwal and Nichol 2021) and after it SiT and REPA do: halved by averaging as long as it stays large
    enough, then bicubic.
    """
    from PIL import Image

    picture = Image.fromarray(image.transpose(1, 2, 0))
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def save_png(opened: BinaryIO, image: np.ndarray) -> None:
    """Write (3, H, W) uint8 as a PNG, not compressed: a quarter of the time to read, for half as much disk again."""
    from PIL import Image

    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(opened, "png", compress_level=0)


# ---- Latents


def encode(config: Encode, vae: VAE | None = None) -> Path:
    """Write the latents of DIR/images into DIR/vae-sd, or -flip, and return that folder.

    Batches are the same however many ranks share them and wherever the work was interrupted, and so is each bit.

    vae: instead of the one that the config names.
    Raises UserError for images that are missing, corrupt or not of one shape, and where the disk is too small.
    """
    at_least(1, config, "batch_size", "workers")
    ranks = launch.start(config.device, timeout_s=LONGEST_WAIT_S)
    folder = config.folder / (FLIPPED if config.flip else LATENTS)
    labels = sorted(read_labels(config.folder / IMAGES)[0].values())  # (path, class) of each image
    files = [file for file, _ in labels]
    batches = [files[start : start + config.batch_size] for start in range(0, len(files), config.batch_size)]
    shape = read_image(config.folder / IMAGES / files[0], CONVERT_IT).shape  # (3, side, side)
    vae = (vae or load_vae(config.vae)).to(ranks.device)
    name = str(Path(config.vae).resolve()) if Path(config.vae).is_dir() else config.vae
    request = {"vae": name, "image side": shape[-1], "flip": config.flip}  # what decides a latent, but for its image
    latent_shape = vae.latent_shape(shape[-1])
    todo = launch.on_main(lambda: plan(folder, request, batches, latent_shape))  # before any rank writes
    mine = [batches[number] for number in todo[ranks.rank :: ranks.world_size]]
    with progress(total=len(mine), is_main=ranks.is_main, desc="rank 0's batches") as bar:
        for batch, pixels in read_images(config, mine, shape):
            pixels = pixels.to(ranks.device)  # (B, 3, side, side)
            latents = vae.encode(pixels.flip(-1) if config.flip else pixels).cpu().numpy()  # (B, 2C, H, W)
            for file, latent in zip(batch, latents, strict=True):
                write_whole(folder / npy_of(file), partial(np.save, arr=latent))
            bar.update()
    launch.all_reduce_sum([0.0], ranks)  # until every rank is done
    record = {"labels": [[npy_of(file), label] for file, label in labels], "scaling": vae.scaling, "vae": name}
    launch.on_main(lambda: write_json(folder / LABELS, record))
    if ranks.is_main:
        print(f"{folder}: {len(files):,} latents, of which {sum(len(batches[n]) for n in todo):,} were encoded now")
    return folder


def plan(folder: Path, request: dict, batches: list[list[str]], shape: tuple[int, int, int]) -> list[int]:
    """Claim the folder of latents (C, H, W), and return the numbers of the batches that it does not hold whole."""
    claim(folder, request)
    (channels, height, width), whole = shape, BytesIO()
    np.lib.format.write_array(whole, np.zeros((2 * channels, height, width), np.float32))  # mean and deviation
    size = len(whole.getvalue())
    missing = [sum(not is_whole(folder / npy_of(file), size) for file in batch) for batch in batches]
    check_space(folder, sum(missing), size)
    return [number for number, count in enumerate(missing) if count]


def read_images(config: Encode, batches: list[list[str]], shape: tuple[int, ...]) -> Iterator[tuple[list[str], Tensor]]:
    """Give each batch of files with its images (B, 3, side, side) uint8; a thread reads the next batch meanwhile."""

    def read(file: str) -> np.ndarray:
        image = read_image(config.folder / IMAGES / file, CONVERT_IT)
        if image.shape != shape:
            raise UserError(f"images must be of one shape; the first is {shape}, {file} {image.shape}: {CONVERT_IT}")
        return image

    with ThreadPoolExecutor(config.workers) as pool:
        loaded = read_ahead(lambda batch: torch.from_numpy(np.stack(list(pool.map(read, batch)))), batches)
        yield from zip(batches, loaded, strict=True)


def npy_of(image: str) -> str:
    """Name the latent of an image."""
    return image.rpartition(".")[0] + ".npy"


# ---- Digits


def train_digits(config: Digits) -> Path:
    """Train the digits' encoder and judge unless they are there, and return their folder."""
    with locked(config.out):
        for file, recipe in digits.RECIPES.items():
            if (config.out / file).is_file():
                print(f"{config.out / file} is there")
                continue
            network, accuracy = digits.train_digits_cnn(**recipe)
            write_whole(config.out / file, partial(digits.save_digits_cnn, network))
            print(f"{config.out / file}: recognises {accuracy:.1%} of the validation digits")
    return config.out


def main() -> None:
    config = tyro.cli(Convert | Encode | Digits, prog="python -m SIT.prepare", description=__doc__)
    verbs = {Convert: convert, Encode: encode, Digits: train_digits}
    try:
        verbs[type(config)](config)
    finally:
        launch.stop()


if __name__ == "__main__":
    launch.main_guard(main)
