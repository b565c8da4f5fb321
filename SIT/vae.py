"""The autoencoder between images and latents: Stable Diffusion's, through diffusers."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common import UserError
from SIT.data import to_images, to_pixels
from SIT.hub import load_pretrained

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

DEFAULT = "stabilityai/sd-vae-ft-mse"  # on the Hugging Face Hub; SiT's and REPA's


class VAE:
    """A frozen AutoencoderKL between uint8 images (B, 3, side, side) and latents (B, C, H, W).

    Example: `VAE.decode(z)`, where z is scaled, as in training.
    """

    def __init__(self, autoencoder: "AutoencoderKL"):
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.scaling = float(autoencoder.config.scaling_factor)  # 0.18215 of Stable Diffusion 1's and 2's
        self.channels = autoencoder.config.latent_channels  # C

    def to(self, device: torch.device | str) -> "VAE":
        """Move the model to a device."""
        self.autoencoder.to(device)
        return self

    def latent_shape(self, side: int) -> tuple[int, int, int]:
        """Return (C, H, W) of the latent of an image of this side; raises UserError for a side that does not fit."""
        shape = self.autoencoder.config
        factor = 2 ** (len(shape.block_out_channels) - 1)  # each block but the last halves the side
        if side % factor:
            raise UserError(
                f"the VAE needs images with a side that is a multiple of {factor}, got {side}: convert them again"
            )
        return self.channels, side // factor, side // factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return mean and standard deviation of the latents, concatenated and not scaled: (B, 2C, H, W) float32."""
        posterior = self.autoencoder.encode(to_pixels(images)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (B, C, H, W) to uint8 images (B, 3, side, side)."""
        return to_images(self.autoencoder.decode(latents.float() / self.scaling).sample)


def load_vae(name: str = DEFAULT, device: torch.device | str = "cpu") -> VAE:
    """Load a VAE by its name on the Hugging Face Hub, or from a folder with its config.json and weights.

    Raises UserError if it cannot be loaded.
    """
    from diffusers import AutoencoderKL

    where = (DEFAULT, name) if Path(name).is_dir() else (name, None)
    return VAE(load_pretrained(AutoencoderKL, *where)).to(device)
