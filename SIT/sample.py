r"""Draw images from a trained SiT, with its averaged weights.

    python -m SIT.sample runs/sit/digits/RUN --count 100                 # one figure of all
    torchrun --standalone --nproc-per-node 8 -m SIT.sample RUN --count 50000 --method sde --steps 250 \
        --guidance 1.8 --interval 0 0.7 --npz                            # also the file that ADM's evaluator reads
    python -m SIT.sample SiT-XL-2-256x256.pt --guidance 4                # a published SiT or REPA checkpoint

Image i has its own noise, drawn from (seed, i), and the class i mod n_class: up to rounding it depends neither on the
number of ranks nor on the batch size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from common import UserError
from common.config import at_least
from common.guard import main_guard
from common.options import parse_options

MOST_GUIDANCE = 1000.0  # published scales are below 10; far above, images become noise, then overflow


@dataclass(frozen=True)
class Sampler:
    """The sampling method."""

    steps: int = 50
    """Steps from noise to image."""
    method: Literal["euler", "heun", "sde"] = "heun"
    """euler and heun follow the ODE, heun with two evaluations per step; sde is Euler-Maruyama."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is none."""
    guided_channels: int = 0
    """Guide only this many first channels; 0: all, as REPA's sampler. DiT's and SiT's guide 3 of 4."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times with guidance; 1 is noise."""


@dataclass(frozen=True)
class Options(Sampler):
    run: tyro.conf.Positional[Path] = Path()
    """Folder of a run, with config.json and checkpoints/; or a published checkpoint, a file."""
    count: int = 64
    """Number of images, in cyclic order of classes."""
    out: Path | None = None
    """The picture, a .png; default: samples.png in the run's folder. The .npz is written beside it."""
    npz: bool = False
    """Also write all images as samples.npz: arr_0 (count, side, side, 3) uint8, arr_1 their classes."""
    batch_size: int = 64
    """Images per batch and rank."""
    vae: str = ""
    """The VAE: name on the Hugging Face Hub, or folder; default: that of the run's latents."""
    seed: int = 0
    """The same seed gives the same images."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to compute on; auto takes a GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the model's matrix products; bfloat16 is about twice as fast on GPUs, and rounds to 8 bits."""


def check(options: Options) -> None:
    """Raise UserError for an option out of its range."""
    at_least(1, options, "count", "steps", "batch_size")
    at_least(0, options, "seed", "guided_channels")
    if not abs(options.guidance) <= MOST_GUIDANCE:
        raise UserError(f"--guidance must be a number up to {MOST_GUIDANCE:g}, got {options.guidance}; 1 is none")
    if options.out and options.out.suffix != ".png":
        raise UserError(
            f"--out must be the picture, a .png, beside which --npz writes its file; got {options.out}: name a .png"
        )


def main() -> None:
    options = parse_options(Options, "python -m SIT.sample", __doc__)
    check(options)
    from common import launch  # here: torch takes seconds to import, and --help does not need it
    from SIT.sampling import sample

    sample(options, launch.start(options.device))
    launch.stop()


if __name__ == "__main__":
    main_guard(main)
