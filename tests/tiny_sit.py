"""Tiny networks with random weights, of the classes of the published ones that SIT uses."""

import torch

from SIT.vae import VAE

DINOV2 = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "layerscale_value": 0.5,
}
AUTOENCODER = {
    "block_out_channels": (4, 4),
    "norm_num_groups": 2,
    "latent_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def tiny_dinov2(**changes):
    """A Dinov2Model of 4 x 4 patches of 7 pixels, always with the same weights."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**DINOV2 | changes)).eval()
    torch.nn.init.normal_(model.embeddings.position_embeddings)  # at its own std, 0.02, resampling hardly shows
    return model


def tiny_vae(**changes) -> VAE:
    """A VAE whose latents have 3 channels and half the side of the image, always with the same weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return VAE(AutoencoderKL(**AUTOENCODER | changes))
