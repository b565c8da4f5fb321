"""Folders of images and their latents, as written by SIT.prepare or by REPA's own preprocessing:

    images/CLASS/NAME.png        input of the encoder of representation alignment
    vae-sd/CLASS/NAME.npy        float32 (2C, H, W): mean and standard deviation by the VAE, concatenated
    vae-sd/dataset.json          {"labels": [["CLASS/NAME.npy", 0], ...], "scaling": 0.18215, "vae": "NAME or folder"}
    vae-sd-flip/CLASS/NAME.npy   latents of the mirrored images, for training with flips

Image, latent and label are matched by name.
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

from common import BadValue, UserError, one_line, warn

if TYPE_CHECKING:
    from PIL.Image import Image

SCALING = 0.18215  # of sd-vae-ft-mse: scales its latents to a variance of about one (Rombach et al. 2022)
IMAGES, LATENTS, FLIPPED = "images", "vae-sd", "vae-sd-flip"  # the first two are REPA's names
LABELS = "dataset.json"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
CONVERT, ENCODE = "`python -m SIT.prepare convert`", "`python -m SIT.prepare encode`"
CONVERT_IT = f"remove it, then run {CONVERT} again"  # it keeps existing files


class Corrupt(UserError):
    """A file that cannot be read, or is not of the type that its name says."""


class Latents:
    """The items of a folder: SIT.data.Items whose latents are sampled from the VAE's mean and deviation.

    folder: with images/ and vae-sd/.
    n_class: number of classes of the model, 1 or more.
    on_corrupt: "fail", or "skip": use the next readable item of the same split. `skipped` has the reasons by name.
    flips: mirror items with probability 1/2; needs `prepare encode --flip`.
    with_images: read the images too, for representation alignment.
    workers: number of reading threads.

    `scaling` converts latents to the model's space; `vae` is the name or folder of their VAE, "" if not recorded.

    Raises UserError if a file has no counterpart, a label is not a class, or a latent differs in shape from the first.
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
            raise BadValue(f"on_corrupt must be 'fail' or 'skip', got {on_corrupt!r}")
        if n_class < 1:
            raise BadValue(f"n_class must be 1 or more, got {n_class}")
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
        """Return the items with these indices."""
        part = copy.copy(self)
        part.names, part.labels = zip(*((self.names[index], self.labels[index]) for index in indices), strict=True)
        part.skipped = {}
        return part

    def fetch(self, indices: Sequence[int], draws: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Read x (B, C, H, W), y (B,) and images (B, 3, side, side); draws: the random seed of each item."""
        latents, images, labels = zip(*self._pool.map(self._readable_item, indices, draws), strict=True)
        fetched = {"x": torch.from_numpy(np.stack(latents)), "y": torch.tensor(labels)}
        return fetched | {"images": torch.from_numpy(np.stack(images))} if self.images else fetched

    def _readable_item(self, index: int, draw: Sequence[int]) -> tuple[np.ndarray, np.ndarray | None, int]:
        for ahead in range(len(self)):
            position = (index + ahead) % len(self)
            name = self.names[position]
            try:
                if name not in self.skipped:
                    return *self._item(name, draw), self.labels[position]
            except Corrupt as error:
                if self.on_corrupt == "fail":
                    raise
                self.skipped[name] = str(error)
                warn(f"{error}; skipped, {len(self.skipped)} of {len(self)} so far")
        raise UserError(f"{self.folder} must hold a readable item, has none: prepare another folder")

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
                f"images must have one shape; {image_path} is {image.shape}, another is {self._image_shape}: "
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
                continue  # counted when it is drawn
            if len(shape) != 3 or shape[0] % 2:
                raise UserError(f"a latent must be an array (2C, H, W), {path} is {shape}: {encode_again(path)}")
            return shape[0] // 2, *shape[1:]
        folder = self.folder / LATENTS
        raise UserError(f"{folder} must hold a readable latent, has none: {encode_again(folder)}")


# ---- Counterparts: images, latents and labels


def read_labels(folder: Path) -> tuple[dict[str, tuple[str, Any]], float, str]:
    """Read a folder's dataset.json: path and class by name, the scaling, and the VAE ("" if absent).

    Raises UserError if it is missing or damaged.
    """
    path = folder / LABELS
    if not path.is_file():
        raise UserError(
            f"{folder} must hold {LABELS}, which is written last: run {CONVERT}, then {ENCODE}, to the end, and name "
            f"{folder.parent}"
        )
    try:
        record = json.loads(path.read_text())
        labels = {name_of(file): (file, label) for file, label in record["labels"]}
        count, scaling, vae = len(record["labels"]), float(record.get("scaling", SCALING)), str(record.get("vae", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{path} must be {{"labels": [[path, class], ...]}}, is not ({error!r}): write it again'
        ) from None
    if not labels or len(labels) != count:
        raise UserError(f"{path} must label each file once; its {count} labels are of {len(labels)}: write it again")
    return labels, scaling, vae


def name_of(file: str) -> str:
    """Return the common name of an image and its latent: the path without suffix and REPA's prefix of latents."""
    folder, _, base = file.replace("\\", "/").rpartition("/")
    return f"{folder}/{base.rpartition('.')[0].replace('img-mean-std-', 'img', 1)}"


def list_files(folder: Path, suffixes: set[str], remedy: str) -> dict[str, str]:
    """Return the files of a folder with one of these suffixes: relative path by name.

    remedy: of the error for a missing folder.
    """
    if not folder.is_dir():
        raise UserError(f"need the folder {folder}, which is missing: {remedy}")
    found: dict[str, str] = {}
    for file in visible_files(folder):
        if os.path.splitext(file)[1].lower() not in suffixes:
            continue
        other = found.setdefault(name_of(file), file)
        if other != file:
            raise UserError(f"in {folder}, {file} and {other} must have different names: rename one")
    return found


def visible_files(folder: Path) -> Iterator[str]:
    """Yield the relative path of each file below a folder, except hidden ones, which interrupted writes leave."""
    for inner, subfolders, bases in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]  # thumbnails and the like
        prefix = Path(inner).relative_to(folder).as_posix()
        yield from (base if prefix == "." else f"{prefix}/{base}" for base in bases if not base.startswith("."))


def check_counterparts(first: dict[str, Any], second: dict[str, Any], one: str, other: str) -> None:
    """Raise UserError for names that only one of two has, with their number and the first of them."""
    for has, lacks, kind, missing in ((first, second, one, other), (second, first, other, one)):
        alone = sorted(has.keys() - lacks.keys())
        if alone:
            raise UserError(
                f"each {kind} must have its {missing}, {len(alone)} of {len(has)} have none, the first is {alone[0]}: "
                "add them, or prepare the folder again"
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
    """Return the remedy for a latent or a folder of them: existing files are not encoded again."""
    command = f"{ENCODE[:-1]} --flip`" if FLIPPED in path.parts else ENCODE
    return f"remove it, then run {command} again"


# numpy parses headers with `ast`, whose recursion counter all threads share in Python 3.11: headers parsed concurrently
# sometimes raise "SystemError: AST constructor recursion depth mismatch".
_header_lock = threading.Lock()


def open_array(path: Path) -> np.ndarray:
    """Memory-map a .npy file; raises Corrupt if it is damaged."""
    try:
        with _header_lock:
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, struct.error) as error:  # numpy has no error class of its own
        raise Corrupt(f"{path} must be a whole .npy file, is not ({one_line(error)}): {encode_again(path)}") from error


def read_latent(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Read mean and deviation (2C, H, W), float32, of a latent of shape (C, H, W).

    Raises Corrupt if the file is damaged, UserError if its shape differs.
    """
    mapped, expected = open_array(path), (2 * shape[0], *shape[1:])
    if mapped.shape != expected:
        raise UserError(f"latents must have one shape, {expected}; {path} is {mapped.shape}: {encode_again(path)}")
    latent = np.array(mapped, dtype=np.float32)
    if not np.isfinite(latent).all():
        raise Corrupt(f"{path} must hold finite numbers, does not: {encode_again(path)}")
    return latent


def read_image(path: Path, remedy: str = "replace or remove it") -> np.ndarray:
    """Read an image as RGB, (3, H, W) uint8, 16 bits scaled to 8; raises Corrupt, with the remedy, if it is damaged."""
    from PIL import Image  # here: digits do not need it

    try:
        with Image.open(path) as image:
            return np.ascontiguousarray(rgb_of(image).transpose(2, 0, 1))
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:  # as PIL raises
        raise Corrupt(f"{path} must be a whole image, is not ({one_line(error)}): {remedy}") from error


def rgb_of(image: "Image") -> np.ndarray:
    """Return the pixels of an opened image as RGB, (H, W, 3) uint8; raises ValueError for an unknown value range."""
    if image.mode.startswith("I;16"):  # PIL's conversion clips at 255, which turns nearly all pixels white
        levels = np.asarray(image).astype(np.uint32)  # (H, W), 0 to 65,535
        return np.repeat(((levels * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise BadValue(f"32-bit pixels (mode {image.mode}) have an unknown range: save 8 or 16 bits per channel")
    return np.asarray(image.convert("RGB"))
