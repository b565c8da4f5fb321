"""Frozen encoders for REPA (Yu et al. 2024, arXiv 2410.06940), which aligns a SiT's tokens with their features.

Shapes: B images, C features per token.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import BadValue
from SIT.digits import ENCODER_FILE, FOLDER, DigitsCNN, load_digits_cnn
from SIT.hub import load_pretrained

if TYPE_CHECKING:
    from transformers import Dinov2Model

DINOV2 = {f"dinov2-{size[0]}": f"facebook/dinov2-{size}" for size in ("small", "base", "large", "giant")}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1], which DINOv2 expects


class Encoder(Protocol):
    """A frozen network that computes features of images; `load_encoder` loads one by name."""

    z_dim: int
    grid: int  # tokens per side: the SiT's

    def __call__(self, images: Tensor) -> Tensor:
        """Return features (B, grid * grid, z_dim) float32, row by row, of uint8 images (B, 1 or 3, side, side)."""

    def double(self) -> "Encoder":
        """Switch to float64: float32's rounding depends on the CPU and on the batch."""


class Dinov2:
    """The patch tokens of DINOv2 after its final norm, as in REPA.

    grid: tokens per side; images are resampled to as many patches (16 patches of 14 pixels are 224).
    """

    def __init__(self, model: "Dinov2Model", grid: int = 16):
        self.model, self.grid, self.z_dim = model.eval().requires_grad_(False), grid, model.config.hidden_size
        self.side = grid * model.config.patch_size
        embeddings = model.embeddings
        # transformers would resample the table without antialiasing; it keeps one of the right size.
        table = resample_positions(embeddings.position_embeddings, grid)
        embeddings.position_embeddings = nn.Parameter(table, requires_grad=False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        pixels = imagenet_pixels(images, self.side).to(self.model.dtype)  # (B, 3, side, side)
        tokens = self.model(pixel_values=pixels).last_hidden_state  # (B, 1 + grid * grid, C), the class token first
        return tokens[:, 1:].to(torch.promote_types(tokens.dtype, torch.float32))

    def double(self) -> "Dinov2":
        self.model.double()
        return self


class DigitsEncoder:
    """The feature grid of the digits' network, for 8 x 8 digits in patches of 2."""

    def __init__(self, network: DigitsCNN):
        self.network, self.grid, self.z_dim = network, network.grid, network.z_dim

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.network.tokens(images)

    def double(self) -> "DigitsEncoder":
        self.network.double()
        return self


def imagenet_pixels(images: Tensor, side: int) -> Tensor:
    """Normalise uint8 images (B, 1 or 3, H, W) as ImageNet's, then resample them: (B, 3, side, side) float32.

    In REPA's order, and without antialiasing like there: bicubic from 256 to 224.
    """
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (images.float() / 255 - mean) / std  # (B, 3, H, W): grey is broadcast
    return F.interpolate(pixels, size=(side, side), mode="bicubic")


def resample_positions(table: Tensor, grid: int) -> Tensor:
    """Resample position embeddings (1, 1 + n * n, C), of a class token and a square, to (1, 1 + grid * grid, C).

    Antialiased, like timm's resample_abs_pos_embed, which REPA calls.
    """
    side = round((table.shape[1] - 1) ** 0.5)
    if side == grid:
        return table
    first, square = table[:, :1], table[:, 1:]
    square = square.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()  # (1, C, n, n)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([first, square.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def load_encoder(
    name: str, device: torch.device | str = "cpu", folder: str | Path | None = None, grid: int = 16
) -> Encoder:
    """Load an encoder by its name: dinov2-s, -b, -l, -g, or digits.

    grid: tokens per side, equal to the SiT's; the digits' network has 4.
    folder: with config.json and weights of DINOv2 (default: the Hugging Face Hub or its cache), or with encoder.pt of
    the digits' network (default: data/digits).
    Raises ValueError for another name, UserError if the files are missing.
    """
    if name == "digits":
        return DigitsEncoder(load_digits_cnn(Path(folder or FOLDER) / ENCODER_FILE, device))
    if name not in DINOV2:
        raise BadValue(f"the encoder must be one of {', '.join(DINOV2)}, digits; got {name!r}")
    from transformers import Dinov2Model

    return Dinov2(load_pretrained(Dinov2Model, DINOV2[name], folder).to(device), grid)
