"""Settings of a SiT run, each with its default and the reason for it. No import of torch: --help is quick."""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from common.config import ConfigError, at_least
from common.optimizer_config import OptimizerConfig
from common.run_config import RunConfig
from common.schedule import ScheduleConfig

Prediction = Literal["velocity", "noise", "data", "score"]

# DiT's table 1, which SiT keeps: letter -> depth, width, heads.
LETTERS = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
SIZES = {
    f"SiT-{letter}/{patch}": {"patch_size": patch, "depth": depth, "width": width, "n_head": n_head}
    for letter, (depth, width, n_head) in LETTERS.items()
    for patch in (2, 4, 8)
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a SiT; the defaults are SiT-B/2 on 256 x 256 ImageNet latents, aligned with DINOv2-B."""

    size: str = "SiT-B/2"
    """SiT-S, B, L or XL, with patches of 2, 4 or 8, as "SiT-XL/4"; "" leaves the four fields below to be set."""
    patch_size: int = 0
    """Side of a patch, in pixels of the input; 0 is the size's own, here and in the next three."""
    depth: int = 0
    """Blocks."""
    width: int = 0
    """Width C, a multiple of n_head and of 4."""
    n_head: int = 0
    """Attention heads of a block."""
    input_size: int = 32
    """Side of the square input: of the latent, an eighth of the image's, or of the image itself."""
    channels: int = 4
    """Channels of the input: 4 of a Stable Diffusion latent."""
    mlp_ratio: float = 4.0
    """Width of a block's hidden layer, in widths C."""
    n_class: int = 1000
    """Classes; the label n_class itself means none, for classifier-free guidance."""
    encoder_depth: int = 4
    """Blocks before the projector: the paper aligns after 4, REPA after 8."""
    projector_width: int = 2048
    """Width of the projector's two hidden layers (REPA)."""
    z_dim: int = 768
    """Features of the encoder to align with, for each token; 0 builds no projector."""

    def __post_init__(self):
        shape = self._shape()
        at_least_one = shape | {name: getattr(self, name) for name in ("input_size", "channels", "n_class")}
        if self.z_dim:
            at_least_one |= {name: getattr(self, name) for name in ("encoder_depth", "projector_width", "z_dim")}
        for name, value in at_least_one.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}: set it; a size sets {', '.join(shape)}")
        if shape["width"] % shape["n_head"] or shape["width"] % 4:  # 4: sine and cosine of row and column
            raise ValueError(f"width must be a multiple of n_head ({shape['n_head']}) and 4, got {shape['width']}")
        if self.input_size % shape["patch_size"]:
            raise ValueError(
                f"input_size must be a multiple of patch_size, got {self.input_size} and {shape['patch_size']}"
            )
        if self.z_dim and self.encoder_depth > shape["depth"]:
            raise ValueError(f"encoder_depth must be at most depth {shape['depth']}, got {self.encoder_depth}")
        if not self.mlp_ratio * shape["width"] >= 1:
            raise ValueError(f"mlp_ratio must make a hidden layer, got {self.mlp_ratio}: DiT's is 4")

    def _shape(self) -> dict[str, int]:
        if self.size and self.size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, or empty; got {self.size!r}")
        names = ("patch_size", "depth", "width", "n_head")
        return {name: getattr(self, name) or SIZES.get(self.size, {}).get(name, 0) for name in names}

    def resolved(self) -> "ModelConfig":
        """Return this config with what `size` stands for filled in."""
        return dataclasses.replace(self, **self._shape())

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Of one input: (channels, height, width)."""
        return self.channels, self.input_size, self.input_size

    @property
    def grid(self) -> int:
        """Tokens a side."""
        return self.input_size // self._shape()["patch_size"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """The path from data to noise, the prediction of the network on it, and the alignment of its tokens."""

    path: Literal["linear", "cosine"] = "linear"
    """The path from data to noise."""
    prediction: Prediction = "velocity"
    """What the network predicts."""
    times: Literal["uniform", "lognormal"] = "uniform"
    """How times are drawn."""
    encoder: str = "dinov2-b"
    """Whose features the tokens are aligned with: dinov2-s, -b, -l, -g, digits; empty trains without REPA."""
    encoder_folder: str = ""
    """Where its weights are, if not in the Hugging Face cache."""
    projection_weight: float = 0.5
    """Of the projection loss, beside the denoising loss (REPA)."""
    label_dropout: float = 0.1
    """Part of the labels replaced by none, for classifier-free guidance."""

    def __post_init__(self):
        at_least(0, self, "projection_weight", "label_dropout")
        if self.label_dropout >= 1:
            raise ConfigError(f"label_dropout must be below 1, got {self.label_dropout}; 0.1 is SiT's")


@dataclass(frozen=True)
class DataConfig:
    """The images, and how they are cut into batches."""

    kind: Literal["digits", "latents"] = "latents"
    """digits: scikit-learn's, 8 x 8 pixels; latents: a folder that `python -m SIT.prepare` made."""
    folder: str = "data/imagenet256"
    """The folder of latents."""
    batch_size: int = 256
    """Images per step, over all ranks and micro-batches."""
    micro_batch: int = 64
    """Most images that one rank takes through the model at once; lower it if memory runs out, the result stays."""
    flips: bool = False
    """Mirror every second image, at random; needs `prepare encode --flip`."""
    vae: str = ""
    """Name on the Hugging Face Hub, or folder, of the VAE, for previews; empty: the one that made the latents."""
    on_corrupt: Literal["fail", "skip"] = "fail"
    """What to do with a file that cannot be read: end, or skip it with a warning."""
    workers: int = 4
    """Threads per rank that read latents and images; 4 read 690 images per second on two cores."""
    read_ahead: int = 2
    """Micro-batches that are read, and their noise drawn, before they are wanted."""

    def __post_init__(self):
        at_least(1, self, "batch_size", "micro_batch", "workers", "read_ahead")
        if self.flips and self.kind == "digits":
            raise ConfigError("flips are for latents; mirrored digits are none: leave data.flips out")


@dataclass(frozen=True)
class SiTOptimizerConfig(OptimizerConfig):
    """The optimizer, and what it is told about a SiT."""

    modulation: Literal["matrix", "adamw"] = "matrix"
    """Who trains the adaLN modulation weights: the matrices' rule, or AdamW (SIT.model.tensor_roles)."""
    split_qkv: bool = False
    """Orthogonalize the query, key and value blocks of the fused weight apart; lion and adamw have nothing to split."""


@dataclass(frozen=True)
class EvalConfig:
    """Validation of the averaged model, on a fixed set with fixed noise and times."""

    every: int = 1000
    """Steps between validations; there is one at step 0 and one at the end."""
    images: int = 1024
    """Validation images, at most; of a latents folder they are drawn once for all, and kept from training."""
    preview: int = 16
    """Images sampled at each validation, by the averaged model, into samples/; 0 draws none."""
    preview_steps: int = 50
    """Steps of the ODE sampler for them."""

    def __post_init__(self):
        at_least(1, self, "every", "images", "preview_steps")
        at_least(0, self, "preview")


@dataclass(frozen=True)
class Config(RunConfig):
    """Every knob of a run; the defaults are the paper's SiT-B/2 on ImageNet latents."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: SiTOptimizerConfig = field(default_factory=SiTOptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=partial(ScheduleConfig, warmup=0, decay="constant"))  # as REPA
    eval: EvalConfig = field(default_factory=EvalConfig)
    steps: int = 400_000
    """Optimizer steps."""
    ema: float = 0.9999
    """Part that the average of the weights keeps per step."""
    recompute: bool = False
    """Keep only the blocks' inputs, and compute them again in the backward pass: less memory, a third more time."""
    log_every: int = 50
    """Steps between lines of metrics."""
    out: str = "runs/sit"
    """Folder of all runs."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema must be in [0, 1), got {self.ema}; 0.9999 is SiT's")
