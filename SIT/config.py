"""Settings of a SiT run, with their defaults. torch is not imported, to keep --help fast."""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from common import BadValue
from common.config import ConfigError, at_least
from common.optimizer_config import OptimizerConfig
from common.run_config import RunConfig
from common.schedule import ScheduleConfig

Prediction = Literal["velocity", "noise", "data", "score"]

# Table 1 of DiT, also SiT's: letter -> depth, width, heads.
LETTERS = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
SIZES = {
    f"SiT-{letter}/{patch}": {"patch_size": patch, "depth": depth, "width": width, "n_head": n_head}
    for letter, (depth, width, n_head) in LETTERS.items()
    for patch in (2, 4, 8)
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a SiT; the defaults are SiT-B/2 on 256 x 256 ImageNet latents, aligned with DINOv2-B."""

    size: str = "SiT-B/2"
    """SiT-S, B, L or XL with patches of 2, 4 or 8, such as "SiT-XL/4"; empty: set the next four fields."""
    patch_size: int = 0
    """Side of a patch, in pixels of the input; 0: that of `size`, as in the next three fields."""
    depth: int = 0
    """Number of blocks."""
    width: int = 0
    """Width C, a multiple of n_head and of 4."""
    n_head: int = 0
    """Attention heads per block."""
    input_size: int = 32
    """Side of the square input: of the latent (an eighth of the image's), or of the image itself."""
    channels: int = 4
    """Channels of the input: 4 for a Stable Diffusion latent."""
    mlp_ratio: float = 4.0
    """Hidden width of an MLP, as a multiple of C."""
    n_class: int = 1000
    """Number of classes; the label n_class means no class, for classifier-free guidance."""
    encoder_depth: int = 4
    """Number of blocks before the projector: 4 in the paper, 8 in REPA."""
    projector_width: int = 2048
    """Width of the projector's two hidden layers (REPA)."""
    z_dim: int = 768
    """Features per token of the encoder to align with; 0: no projector."""

    def __post_init__(self):
        shape = self._shape()
        at_least_one = shape | {name: getattr(self, name) for name in ("input_size", "channels", "n_class")}
        if self.z_dim:
            at_least_one |= {name: getattr(self, name) for name in ("encoder_depth", "projector_width", "z_dim")}
        for name, value in at_least_one.items():
            if value < 1:
                raise BadValue(f"{name} must be at least 1, got {value}: set it; a size sets {', '.join(shape)}")
        if shape["width"] % shape["n_head"] or shape["width"] % 4:  # 4: sine and cosine of row and column
            raise BadValue(f"width must be a multiple of n_head ({shape['n_head']}) and 4, got {shape['width']}")
        if self.input_size % shape["patch_size"]:
            raise BadValue(
                f"input_size must be a multiple of patch_size, got {self.input_size} and {shape['patch_size']}"
            )
        if self.z_dim and self.encoder_depth > shape["depth"]:
            raise BadValue(f"encoder_depth must be at most depth {shape['depth']}, got {self.encoder_depth}")
        if not self.mlp_ratio * shape["width"] >= 1:
            raise BadValue(f"mlp_ratio must make a hidden layer, got {self.mlp_ratio}: DiT's is 4")

    def _shape(self) -> dict[str, int]:
        if self.size and self.size not in SIZES:
            raise BadValue(f"size must be one of {', '.join(SIZES)}, or empty; got {self.size!r}")
        names = ("patch_size", "depth", "width", "n_head")
        return {name: getattr(self, name) or SIZES.get(self.size, {}).get(name, 0) for name in names}

    def resolved(self) -> "ModelConfig":
        """Return this config with the fields of `size` filled in."""
        return dataclasses.replace(self, **self._shape())

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one input: (channels, height, width)."""
        return self.channels, self.input_size, self.input_size

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.input_size // self._shape()["patch_size"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """The path from data to noise, the network's prediction, and the alignment of its tokens."""

    path: Literal["linear", "cosine"] = "linear"
    """The path from data to noise."""
    prediction: Prediction = "velocity"
    """The network's prediction."""
    times: Literal["uniform", "lognormal"] = "uniform"
    """Distribution of training times."""
    encoder: str = "dinov2-b"
    """Encoder of the features to align tokens with: dinov2-s, -b, -l, -g, digits; empty trains without REPA."""
    encoder_folder: str = ""
    """Folder of its weights; empty: the Hugging Face cache."""
    projection_weight: float = 0.5
    """Weight of the projection loss, added to the denoising loss (REPA)."""
    label_dropout: float = 0.1
    """Fraction of labels replaced by no class, for classifier-free guidance."""

    def __post_init__(self):
        at_least(0, self, "projection_weight", "label_dropout")
        if self.label_dropout >= 1:
            raise ConfigError(f"label_dropout must be below 1, got {self.label_dropout}; 0.1 is SiT's")


@dataclass(frozen=True)
class DataConfig:
    """The images and their batches."""

    kind: Literal["digits", "latents"] = "latents"
    """digits: scikit-learn's, 8 x 8 pixels; latents: a folder that `python -m SIT.prepare` wrote."""
    folder: str = "data/imagenet256"
    """Folder of latents."""
    batch_size: int = 256
    """Images per step, over all ranks and micro-batches."""
    micro_batch: int = 64
    """Largest number of images per forward pass of a rank; lower it if memory runs out: the result is the same."""
    flips: bool = False
    """Mirror images with probability 1/2; needs `prepare encode --flip`."""
    vae: str = ""
    """VAE for previews: name on the Hugging Face Hub, or folder; empty: the one of the latents."""
    on_corrupt: Literal["fail", "skip"] = "fail"
    """An unreadable file ends the run (fail), or is skipped with a warning (skip)."""
    workers: int = 4
    """Threads per rank that read latents and images; 4 read 690 images per second on two cores."""
    read_ahead: int = 2
    """Number of micro-batches to read, with their noise, ahead of the network."""

    def __post_init__(self):
        at_least(1, self, "batch_size", "micro_batch", "workers", "read_ahead")
        if self.flips and self.kind == "digits":
            raise ConfigError("data.flips needs latents, got digits, which are not digits when mirrored: leave it out")


@dataclass(frozen=True)
class SiTOptimizerConfig(OptimizerConfig):
    """The optimizer; its options are checked when it is built."""

    modulation: Literal["matrix", "adamw"] = "matrix"
    """Rule of the adaLN modulation weights: that of the matrices, or AdamW (SIT.model.tensor_roles)."""
    split_qkv: bool = False
    """Orthogonalize the query, key and value blocks of the fused weight separately; no effect on lion and adamw."""


@dataclass(frozen=True)
class EvalConfig:
    """Validation of the averaged model, on a fixed set with fixed noise and times."""

    every: int = 1000
    """Steps between validations; two more are at step 0 and at the end."""
    images: int = 1024
    """Largest number of validation images; of a latents folder always the same ones, held out from training."""
    preview: int = 16
    """Images that the averaged model samples into samples/ at each validation; 0: none."""
    preview_steps: int = 50
    """Their number of ODE steps."""

    def __post_init__(self):
        at_least(1, self, "every", "images", "preview_steps")
        at_least(0, self, "preview")


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run; the defaults are the paper's SiT-B/2 on ImageNet latents."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: SiTOptimizerConfig = field(default_factory=SiTOptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=partial(ScheduleConfig, warmup=0, decay="constant"))  # as REPA
    eval: EvalConfig = field(default_factory=EvalConfig)
    steps: int = 400_000
    """Optimizer steps."""
    ema: float = 0.9999
    """Decay per step of the exponential moving average of the weights."""
    recompute: bool = False
    """Activation checkpointing: store only the blocks' inputs; less memory, a third more time."""
    log_every: int = 50
    """Steps between logged metrics."""
    out: str = "runs/sit"
    """Folder of all runs."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema must be in [0, 1), got {self.ema}; 0.9999 is SiT's")
