"""Folders of images and their latents, as SIT.prepare or REPA's own preprocessing makes them:

    images/CLASS/NAME.png        input of the encoder of representation alignment
    vae-sd/CLASS/NAME.npy        float32 (2C, H, W): the VAE's mean, on it the standard deviation
    vae-sd/dataset.json          {"labels": [["CLASS/NAME.npy", 0], ...], "scaling": 0.18215, "vae": "NAME or folder"}
    vae-sd-flip/CLASS/NAME.npy   the same of the mirrored images, where flips are wanted

Image, latent and label belong together by name, whatever the order of the files.
"""

import copy
import json
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from common import UserError, one_line, warn

if TYPE_CHECKING:
    from PIL.Image import Image

SCALING = 0.18215  # of sd-vae-ft-mse: brings its latents to a variance of about one (Rombach et al. 2022)
IMAGES, LATENTS, FLIPPED = "images", "vae-sd", "vae-sd-flip"  # the first two are REPA's names
LABELS = "dataset.json"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
CONVERT, ENCODE = "`python -m SIT.prepare convert`", "`python -m SIT.prepare encode`"
CONVERT_IT = f"remove it, then run {CONVERT} again"  # to a file that is there it does nothing


class Corrupt(UserError):
    """A file that cannot be read, or is not of the kind that its name promises."""


class Latents:
    """The items of a folder: SIT.data.Items, drawn from the VAE's mean and deviation of each image.

    folder: holds images/ and vae-sd/.
    n_class: classes of the model, 1 or more.
    on_corrupt: "fail", or "skip": the next item that can be read takes the place, of the same part. `skipped` says
        why, by name.
    flips: mirror every second item, at random; needs `prepare encode --flip`.
    with_images: read the images too; training without representation alignment goes without.
    workers: threads that read.

    `scaling` brings latents to the model's space; `vae` is the name or folder of the VAE they are of, "" where the
    folder does not record it.

    Raises UserError where a file has no counterpart, a label is no class, or a latent differs in shape from the first.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        n_class: int,
        on_corrupt: Literal["fail", "skip"] = "fail",
        flips: bool = False,
        with_images: bool = True,
        workers: int = 4,
    ):
        if on_corrupt not in ("fail", "skip"):
            raise ValueError(f"on_corrupt must be 'fail' or 'skip', got {on_corrupt!r}")
        if n_class < 1:
            raise ValueError(f"n_class must be 1 or more, got {n_class}")
        self.folder, self.n_class, self.on_corrupt, self.flips = Path(folder), n_class, on_corrupt, flips
        labels, self.scaling, self.vae = read_labels(self.folder / LATENTS)
        self.latents = list_files(self.folder / LATENTS, {".npy"}, f"run {ENCODE}")
        check_counterparts(self.latents, labels, "latent", "label")
        if flips:
            flipped = list_files(self.folder / FLIPPED, {".npy"}, f"run {ENCODE[:-1]} --flip`, or train without flips")
            check_counterparts(self.latents, flipped, "latent", "mirrored latent")
        self.images = list_files(self.folder / IMAGES, IMAGE_SUFFIXES, f"run {CONVERT}") if with_images else {}
        if with_images:
            check_counterparts(self.latents, self.images, "latent", "image")
        self.names = sorted(self.latents)
        self.labels = check_classes([labels[name] for name in self.names], n_class)
        self.skipped: dict[str, str] = {}
        self._image_shape: tuple[int, ...] | None = None
        self._pool = ThreadPoolExecutor(workers)
        self.shape = self._first_shape()  # (C, H, W)

    def __len__(self) -> int:
        return len(self.names)

    def part(self, indices: Iterable[int]) -> "Latents":
        """Return the items of these indices alone."""
        part = copy.copy(self)
        part.names, part.labels = zip(*((self.names[index], self.labels[index]) for index in indices), strict=True)
        part.skipped = {}
        return part

    def fetch(self, indices: Sequence[int], draws: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Read x (B, C, H, W), y (B,) and images (B, 3, side, side), each with the randomness that its draw seeds."""
        latents, images, labels = zip(*self._pool.map(self._readable_item, indices, draws), strict=True)
        fetched = {"x": torch.from_numpy(np.stack(latents)), "y": torch.tensor(labels)}
        return fetched | {"images": torch.from_numpy(np.stack(images))} if self.images else fetched

    def _readable_item(self, index: int, draw: Sequence[int]) -> tuple[np.ndarray, np.ndarray | None, int]:
        for ahead in range(len(self)):
            place = (index + ahead) % len(self)
            name = self.names[place]
            try:
                if name not in self.skipped:
                    return *self._item(name, draw), self.labels[place]
            except Corrupt as error:
                if self.on_corrupt == "fail":
                    raise
                self.skipped[name] = str(error)
                warn(f"{error}; skipped, {len(self.skipped)} of {len(self)} so far")
        raise UserError(f"{self.folder} must hold an item that can be read, has none: prepare another folder")

    def _item(self, name: str, draw: Sequence[int]) -> tuple[np.ndarray, np.ndarray | None]:
        random = np.random.default_rng(draw)
        flip = self.flips and random.random() < 0.5
        latent_path = self.folder / (FLIPPED if flip else LATENTS) / self.latents[name]
        mean, deviation = np.split(read_latent(latent_path, self.shape), 2)  # (C, H, W) each
        noise = random.standard_normal(mean.shape, dtype=np.float32)
        latent = (mean + deviation * noise) * np.float32(self.scaling)
        if not self.images:
            return latent, None
        image_path = self.folder / IMAGES / self.images[name]
        image = read_image(image_path, CONVERT_IT)  # (3, side, side)
        self._image_shape = self._image_shape or image.shape
        if image.shape != self._image_shape:
            raise UserError(
                f"images must be of one shape; {image_path} is {image.shape}, another is {self._image_shape}: "
                + CONVERT_IT
            )
        return latent, np.ascontiguousarray(image[..., ::-1]) if flip else image

    def _first_shape(self) -> tuple[int, int, int]:
        for name in self.names:
            path = self.folder / LATENTS / self.latents[name]
            try:
                shape = open_array(path).shape
            except Corrupt:
                if self.on_corrupt == "fail":
                    raise
                continue  # it is counted once it is drawn
            if len(shape) != 3 or shape[0] % 2:
                raise UserError(f"a latent must be an array (2C, H, W), {path} is {shape}: {encode_again(path)}")
            return shape[0] // 2, *shape[1:]
        folder = self.folder / LATENTS
        raise UserError(f"{folder} must hold a latent that can be read, has none: {encode_again(folder)}")


# ---- Counterparts: images, latents and labels


def read_labels(folder: Path) -> tuple[dict[str, tuple[str, Any]], float, str]:
    """Read a folder's dataset.json: path and class by name, the scaling and the VAE ("" where it has none).

    Refuses a missing or damaged one.
    """
    path = folder / LABELS
    if not path.is_file():
        raise UserError(
            f"{folder} must hold {LABELS}, which is written when all else is there: run {CONVERT}, then "
            f"{ENCODE}, to the end, and name {folder.parent}"
        )
    try:
        record = json.loads(path.read_text())
        labels = {name_of(file): (file, label) for file, label in record["labels"]}
        count, scaling, vae = len(record["labels"]), float(record.get("scaling", SCALING)), str(record.get("vae", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{path} must be {{"labels": [[path, class], ...]}}, is not ({error!r}): make it anew'
        ) from None
    if not labels or len(labels) != count:
        raise UserError(f"{path} must label each file once; its {count} labels are of {len(labels)}: make it anew")
    return labels, scaling, vae


def name_of(file: str) -> str:
    """Return the common name of an image and its latent: the path without suffix and without REPA's mark of latents."""
    folder, _, base = file.replace("\\", "/").rpartition("/")
    return f"{folder}/{base.rpartition('.')[0].replace('img-mean-std-', 'img', 1)}"


def list_files(folder: Path, suffixes: set[str], remedy: str) -> dict[str, str]:
    """Find the files of a folder that have one of these suffixes: their path in it, by name.

    remedy: of a missing folder, for the error.
    """
    if not folder.is_dir():
        raise UserError(f"need the folder {folder}, which is not there: {remedy}")
    found: dict[str, str] = {}
    for file in visible_files(folder):
        if os.path.splitext(file)[1].lower() not in suffixes:
            continue
        other = found.setdefault(name_of(file), file)
        if other != file:
            raise UserError(f"in {folder}, {file} and {other} must have names of their own: rename one")
    return found


def visible_files(folder: Path) -> Iterator[str]:
    """Yield each file below a folder, relative to it, without hidden ones, which interrupted writes leave."""
    for inner, subfolders, bases in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]  # thumbnails and the like
        place = Path(inner).relative_to(folder).as_posix()
        yield from (base if place == "." else f"{place}/{base}" for base in bases if not base.startswith("."))


def check_counterparts(first: dict[str, Any], second: dict[str, Any], one: str, other: str) -> None:
    """Refuse names of which only one of two is there; names the first of them, and counts them."""
    for has, lacks, what, missing in ((first, second, one, other), (second, first, other, one)):
        alone = sorted(has.keys() - lacks.keys())
        if alone:
            raise UserError(
                f"each {what} must have its {missing}, {len(alone)} of {len(has)} have none, the first is {alone[0]}: "
                "add what is missing, or prepare the folder again"
            )


def check_classes(labels: Iterable[tuple[str, Any]], n_class: int) -> list[int]:
    """Return the classes; raises UserError for a label that is not below `n_class`."""
    classes = []
    for file, label in labels:
        if type(label) is not int or not 0 <= label < n_class:
            raise UserError(
                f"a label must be a whole number from 0 to {n_class - 1}, {file} has {label!r}: correct {LABELS} or "
                "set model.n_class"
            )
        classes.append(label)
    return classes


# ---- Files


def encode_again(path: Path) -> str:
    """Return the remedy for a latent, or all of a folder: whole files are not encoded again."""
    command = f"{ENCODE[:-1]} --flip`" if FLIPPED in path.parts else ENCODE
    return f"remove it, then run {command} again"


# numpy parses a header by `ast`, whose recursion counter all threads share in Python 3.11: headers parsed at the same
# time now and then raise "SystemError: AST constructor recursion depth mismatch".
_header_lock = threading.Lock()


def open_array(path: Path) -> np.ndarray:
    """Map a .npy file into memory; raises Corrupt where it is none."""
    try:
        with _header_lock:
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, struct.error) as error:  # numpy has no class of its own
        raise Corrupt(f"{path} must be a whole .npy file, is not ({one_line(error)}): {encode_again(path)}") from error


def read_latent(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Read mean and deviation (2C, H, W), float32, of a latent of shape (C, H, W).

    Raises Corrupt where the file is damaged, UserError where its shape is another.
    """
    mapped, expected = open_array(path), (2 * shape[0], *shape[1:])
    if mapped.shape != expected:
        raise UserError(f"latents must be of one shape, {expected}; {path} is {mapped.shape}: {encode_again(path)}")
    latent = np.array(mapped, dtype=np.float32)
    if not np.isfinite(latent).all():
        raise Corrupt(f"{path} must hold finite numbers, does not: {encode_again(path)}")
    return latent


def read_image(path: Path, remedy: str = "replace or remove it") -> np.ndarray:
    """Read an image as RGB, (3, H, W) uint8, 16 bits scaled to 8; raises Corrupt, with the remedy, where it cannot."""
    from PIL import Image  # the digits go without

    try:
        with Image.open(path) as image:
            return np.ascontiguousarray(rgb_of(image).transpose(2, 0, 1))
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:  # as PIL raises
        raise Corrupt(f"{path} must be a whole image, is not ({one_line(error)}): {remedy}") from error


def rgb_of(image: "Image") -> np.ndarray:
    """Return the pixels of an opened image as RGB, (H, W, 3) uint8; raises ValueError for a range that is not known."""
    if image.mode.startswith("I;16"):  # PIL's own conversion clips at 255, which makes nearly all of it white
        levels = np.asarray(image).astype(np.uint32)  # (H, W), 0 to 65,535
        return np.repeat(((levels * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (mode {image.mode}) have no known white: save 8 or 16 bits per channel")
    return np.asarray(image.convert("RGB"))
