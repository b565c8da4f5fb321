"""Training data of SiT: pixels of handwritten digits or a folder's latents, and the order of items.

Shapes: B images, C channels, H and W the sides of a latent or digit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common import UserError


class Items(Protocol):
    """The source of batches; x is in the model's space: pixels in [-1, 1], or scaled latents."""

    shape: tuple[int, int, int]  # of one x: (C, H, W)
    n_class: int
    vae: str  # name or folder of the latents' VAE; "" if unknown or absent
    scaling: float  # of the latents

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int], draws: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Read x (B, C, H, W) float32, y (B,) int64 and, for REPA, images (B, 1 or 3, side, side) uint8.

        draws: the random seed of each item.
        """


@dataclass(frozen=True)
class Pixels:
    """Images in memory: (n, C, H, W) uint8, with labels (n,) int64."""

    images: Tensor
    labels: Tensor
    n_class: int
    vae: str = ""
    scaling: float = 1.0

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Sequence[int], draws: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        rows = np.asarray(indices)
        images, labels = self.images.numpy()[rows], self.labels.numpy()[rows]  # not torch: common/read_ahead.py
        pixels = images.astype(np.float32) / np.float32(127.5) - 1
        return {name: torch.from_numpy(each) for name, each in (("x", pixels), ("y", labels), ("images", images))}


def hold_out(length: int, count: int) -> dict[str, np.ndarray]:
    """Split the indices of `length` items into "train" and "val", the latter with `count`, at most a tenth.

    The split is random, with a fixed seed: the last items by name would be of one class. Raises UserError for fewer
    than two items.
    """
    if length < 2:
        raise UserError(f"need an item to train on and one to validate, got {length}: prepare more images")
    order = np.random.default_rng(0).permutation(length)
    count = min(count, max(length // 10, 1))
    return {"train": np.sort(order[count:]), "val": np.sort(order[:count])}


# ---- Digits and pixels


def digits(val_fraction: float = 0.2) -> dict[str, Pixels]:
    """Load scikit-learn's 1797 handwritten digits, (1, 8, 8), as "train" and "val", stratified by class."""
    from sklearn.datasets import load_digits  # here: takes seconds, and latents do not need it

    source = load_digits()  # grey values 0 to 16
    images = torch.from_numpy(np.round(source.images * 255 / 16).astype(np.uint8)[:, None])  # (n, 1, 8, 8)
    labels = torch.from_numpy(source.target.astype(np.int64))  # (n,)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    parts = {"train": [], "val": []}
    for label in range(10):
        rows = shuffled[source.target[shuffled] == label]
        cut = round(val_fraction * len(rows))
        parts["val"].append(rows[:cut])
        parts["train"].append(rows[cut:])
    rows = {split: np.sort(np.concatenate(chosen)) for split, chosen in parts.items()}  # the file's order mixes digits
    return {split: Pixels(images[rows[split]], labels[rows[split]], 10) for split in rows}


def to_pixels(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 pixels in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_images(pixels: Tensor) -> Tensor:
    """Convert pixels, clamped to [-1, 1], to uint8 images."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---- Batches


def batch(items: Items, *, seed: int, step: int, rows: slice, global_batch: int) -> dict[str, Tensor]:
    """Fetch the rows `rows` of a step's global batch, on the CPU.

    (seed, step, row) determines an item and its randomness, so that the batch depends neither on the number of ranks
    and micro-batches nor on a resume. Each epoch has its own order; a step may span two, so that no item is left out.
    """
    numbers, indices = range(global_batch)[rows], []
    for number in numbers:
        epoch, position = divmod(step * global_batch + number, len(items))
        indices.append(int(epoch_order(len(items), seed, epoch)[position]))
    return items.fetch(indices, [(seed, step, number) for number in numbers])


@lru_cache(maxsize=2)  # a step spans two epochs at most, unless there are fewer items than rows
def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """Shuffle the indices of `length` items for one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(length)


def take(items: Items, indices: Sequence[int], seed: int) -> dict[str, Tensor]:
    """Fetch items by index, with randomness fixed by (seed, index), so that validations are equal."""
    # Four numbers, the last not 0: to numpy (3, 1) is (3, 1, 0), the seed of a training row.
    return items.fetch(indices, [(seed, index, 0, 1) for index in indices])


def move(fetched: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Move a batch to a device; to a GPU asynchronously."""
    if torch.device(device).type == "cuda":  # a no-op for read_ahead's, already pinned; others would copy synchronously
        fetched = {name: tensor.pin_memory() for name, tensor in fetched.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in fetched.items()}
