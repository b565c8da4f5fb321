"""A GPT and a SiT that train in seconds: their configs and training data."""

from pathlib import Path

GPT = """
log_every = 1
wandb = "disabled"
device = "cpu"
[model]
n_layer = 2
n_head = 2
n_embd = 32
context = 32
vocab_size = 0
[data]
folder = "{corpus}"
[optimizer]
lr = 4e-3
"""
SIT = """
log_every = 1
wandb = "disabled"
device = "cpu"
ema = 0.9
[model]
size = ""
patch_size = 2
depth = 2
width = 16
n_head = 2
input_size = 8
channels = 1
n_class = 10
encoder_depth = 1
projector_width = 16
z_dim = 8
[data]
kind = "digits"
[objective]
encoder = "digits"
encoder_folder = "{encoder}"
[optimizer]
lr = 4e-3
[schedule]
warmup = 2
[eval]
preview = 0
"""


def write_config(folder: Path, name: str, shape: str, *differing: str) -> Path:
    """Write a config, each text of `differing` over the one before; returns its path, FOLDER/NAME.toml."""
    path = folder / f"{name}-0.toml"
    path.write_text(shape)
    for i, text in enumerate(differing, start=1):
        above = folder / (f"{name}-{i}.toml" if i < len(differing) else f"{name}.toml")
        above.write_text(f'extends = "{path.name}"\n{text}')
        path = above
    return path


def write_text(path: Path, functions: int) -> Path:
    """Write a text of this many lines of code; return its path."""
    path.write_text("\n".join(f"def f{i}(x): return x * {i} + {i * i % 97}" for i in range(functions)))
    return path


def write_encoder(folder: Path) -> None:
    """Write the encoder of digits that the SiT is aligned with, of random weights, into a new folder."""
    import torch

    from SIT.digits import ENCODER_FILE, DigitsCNN, save_digits_cnn

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    with open(folder / ENCODER_FILE, "wb") as file:
        save_digits_cnn(DigitsCNN(width=4, z_dim=8), file)
