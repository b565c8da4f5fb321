"""Encodes a folder of images to latents, on one GPU or, under torchrun, on several: `python -m SIT.prepare encode`."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common import UserError, launch, progress
from common.config import at_least
from common.read_ahead import read_ahead
from SIT.files import check_space, claim, is_whole, write_json, write_whole
from SIT.latents import CONVERT_IT, FLIPPED, IMAGES, LABELS, LATENTS, read_image, read_labels
from SIT.vae import VAE, load_vae

if TYPE_CHECKING:
    from SIT.prepare import Encode

LONGEST_WAIT_S = 3600.0  # for the slowest rank; all have as many batches


def encode(config: "Encode", vae: VAE | None = None) -> Path:
    """Write the latents of DIR/images to DIR/vae-sd, or -flip; returns that folder.

    The batches, and so every bit, do not depend on the number of ranks or on interruptions.

    vae: replaces the one that the config names.
    Raises UserError for images that are missing, corrupt or of different shapes, and if the disk is too small.
    """
    at_least(1, config, "batch_size", "workers")
    process = launch.start(config.device, timeout_s=LONGEST_WAIT_S)
    folder = config.folder / (FLIPPED if config.flip else LATENTS)
    labels = sorted(read_labels(config.folder / IMAGES)[0].values())  # (path, class) of each image
    files = [file for file, _ in labels]
    batches = [files[start : start + config.batch_size] for start in range(0, len(files), config.batch_size)]
    shape = read_image(config.folder / IMAGES / files[0], CONVERT_IT).shape  # (3, side, side)
    vae = (vae or load_vae(config.vae)).to(process.device)
    name = str(Path(config.vae).resolve()) if Path(config.vae).is_dir() else config.vae
    request = {"vae": name, "image side": shape[-1], "flip": config.flip}  # the latents depend on these
    latent_shape = vae.latent_shape(shape[-1])
    todo = launch.on_main(lambda: plan(folder, request, batches, latent_shape))  # before any rank writes
    mine = [batches[number] for number in todo[process.rank :: process.world_size]]
    with progress(total=len(mine), is_main=process.is_main, desc="rank 0's batches") as bar:
        for batch, pixels in read_images(config, mine, shape, process.device):
            pixels = pixels.to(process.device, non_blocking=True)  # (B, 3, side, side)
            latents = vae.encode(pixels.flip(-1) if config.flip else pixels).cpu().numpy()  # (B, 2C, H, W)
            for file, latent in zip(batch, latents, strict=True):
                write_whole(folder / npy_of(file), partial(np.save, arr=latent))
            bar.update()
    launch.all_reduce_sum([0.0], process)  # until every rank is done
    record = {"labels": [[npy_of(file), label] for file, label in labels], "scaling": vae.scaling, "vae": name}
    launch.on_main(lambda: write_json(folder / LABELS, record))
    if process.is_main:
        print(f"{folder}: {len(files):,} latents, of which {sum(len(batches[n]) for n in todo):,} were encoded now")
    return folder


def plan(folder: Path, request: dict, batches: list[list[str]], shape: tuple[int, int, int]) -> list[int]:
    """Claim the folder of latents (C, H, W); returns the numbers of the batches that are not complete."""
    claim(folder, request)
    (channels, height, width), whole = shape, BytesIO()
    np.lib.format.write_array(whole, np.zeros((2 * channels, height, width), np.float32))  # mean and deviation
    size = len(whole.getvalue())
    missing = [sum(not is_whole(folder / npy_of(file), size) for file in batch) for batch in batches]
    check_space(folder, sum(missing), size)
    return [number for number, count in enumerate(missing) if count]


def read_images(
    config: "Encode", batches: list[list[str]], shape: tuple[int, ...], device: torch.device
) -> Iterator[tuple[list[str], Tensor]]:
    """Yield each batch of files with its images (B, 3, side, side) uint8; a thread reads the next batch meanwhile."""

    def read(file: str) -> np.ndarray:
        image = read_image(config.folder / IMAGES / file, CONVERT_IT)
        if image.shape != shape:
            raise UserError(f"images must have one shape; the first is {shape}, {file} {image.shape}: {CONVERT_IT}")
        return image

    with ThreadPoolExecutor(config.workers) as pool:
        loaded = read_ahead(
            lambda batch: torch.from_numpy(np.stack(list(pool.map(read, batch)))), batches, device=device
        )
        yield from zip(batches, loaded, strict=True)


def npy_of(image: str) -> str:
    """Return the file name of an image's latent."""
    return image.rpartition(".")[0] + ".npy"
