"""Training data of SiT, handwritten digits as pixels or latents of a folder, and the order of its items.

Letters in the shape comments: B images, C channels, H and W the sides of a latent, or of a digit.
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
    vae: str  # name or folder of the VAE whose latents they are; "" where it is not known, or there is none
    scaling: float  # of the latents

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int], draws: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Read x (B, C, H, W) float32, y (B,) int64 and, if wanted, images (B, 1 or 3, side, side) uint8.

        A draw is the seed of the randomness of its item.
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
        images, labels = self.images.numpy()[rows], self.labels.numpy()[rows]  # of numpy: see common/read_ahead.py
        pixels = images.astype(np.float32) / np.float32(127.5) - 1
        return {name: torch.from_numpy(each) for name, each in (("x", pixels), ("y", labels), ("images", images))}


def hold_out(length: int, count: int) -> dict[str, np.ndarray]:
    """Divide the indices of `length` items: "train", and "val" with `count` of them, a tenth at most, for validation.

    The same ones always, drawn at random: the last by name would all be of one class. Raises UserError for fewer than
    two items.
    """
    if length < 2:
        raise UserError(f"need an item to train on and one to validate, there is {length}: prepare more images")
    order = np.random.default_rng(0).permutation(length)
    count = min(count, max(length // 10, 1))
    return {"train": np.sort(order[count:]), "val": np.sort(order[:count])}


# ---- Digits and pixels


def digits(val_fraction: float = 0.2) -> dict[str, Pixels]:
    """Load scikit-learn's 1797 handwritten digits, (1, 8, 8), as "train" and "val", each class divided alike."""
    from sklearn.datasets import load_digits  # seconds to import, and latents go without

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
    rows = {
        split: np.sort(np.concatenate(chosen)) for split, chosen in parts.items()
    }  # the writers' order mixes digits
    return {split: Pixels(images[rows[split]], labels[rows[split]], 10) for split in rows}


def to_pixels(images: Tensor) -> Tensor:
    """Turn uint8 images into float32 pixels in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_images(pixels: Tensor) -> Tensor:
    """Turn pixels, clamped to [-1, 1], into uint8 images."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---- Batches


def batch(items: Items, *, seed: int, step: int, rows: slice, global_batch: int) -> dict[str, Tensor]:
    """Fetch the rows `rows` of a step's global batch, on the CPU.

    (seed, step, row) fixes an item and its randomness, so that the batch is the same however many ranks and
    accumulation steps share it, and a resumed run goes on as it would have. Each epoch has an order of its own; a step
    may lie across two, and so none of its items is left out.
    """
    numbers, indices = range(global_batch)[rows], []
    for number in numbers:
        epoch, place = divmod(step * global_batch + number, len(items))
        indices.append(int(epoch_order(len(items), seed, epoch)[place]))
    return items.fetch(indices, [(seed, step, number) for number in numbers])


@lru_cache(maxsize=2)  # a step lies in two epochs at most, unless there are fewer items than rows
def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """Shuffle the indices of `length` items for one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(length)


def take(items: Items, indices: Sequence[int], seed: int) -> dict[str, Tensor]:
    """Fetch chosen items, with randomness fixed by (seed, index), so that validation repeats."""
    # Four numbers, the last not 0: to numpy (3, 1) is (3, 1, 0), the seed of a training row.
    return items.fetch(indices, [(seed, index, 0, 1) for index in indices])


def move(fetched: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Move a batch to a device; on a GPU the copy is under way when this returns."""
    if torch.device(device).type == "cuda":  # read_ahead leaves them pinned; of others the copy would wait
        fetched = {name: tensor.pin_memory() for name, tensor in fetched.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in fetched.items()}
