r"""Draw images from a trained SiT, by the average of its weights.

    python -m SIT.sample runs/sit/digits/RUN --count 100                 # a picture of them
    torchrun --standalone --nproc-per-node 8 -m SIT.sample RUN --count 50000 --method sde --steps 250 \
        --guidance 1.8 --interval 0 0.7 --npz                            # and the file that ADM's evaluator reads

Image i has noise of its own, drawn from (seed, i), and the class i mod n_class: it depends neither on the ranks nor on
the batch, up to rounding.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from common import UserError, checkpoint, launch
from SIT import transport
from SIT.data import to_images
from SIT.model import ModelConfig, SiT

if TYPE_CHECKING:
    from PIL.Image import Image

Decode = Callable[[Tensor], Tensor]  # (B, C, H, W) of the model -> uint8 images (B, 1 or 3, side, side)


@dataclass(frozen=True)
class Sampler:
    """How images are drawn."""

    steps: int = 50
    """Steps from noise to image."""
    method: Literal["euler", "heun", "sde"] = "heun"
    """euler and heun follow the ODE, heun with two evaluations a step; sde is Euler-Maruyama."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is none."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times at which to guide; 1 is noise."""


@dataclass(frozen=True)
class Options(Sampler):
    run: tyro.conf.Positional[Path] = Path()
    """Folder of a run, with config.json and checkpoints/."""
    count: int = 64
    """How many images; the classes take turns."""
    out: Path | None = None
    """The picture; default: samples.png in the run's folder. The .npz lies beside it."""
    npz: bool = False
    """Also write all images as samples.npz: arr_0 (count, side, side, 3) uint8, arr_1 their classes."""
    batch_size: int = 64
    """Images that one rank draws at once."""
    vae: str = ""
    """Folder of the VAE, if it is not in the Hugging Face cache."""
    seed: int = 0
    """The same seed gives the same images."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""


def labels_of(numbers: list[int], n_class: int) -> Tensor:
    """Return the classes of images, which take turns."""
    return torch.tensor([number % n_class for number in numbers])


def seeded(*place: int) -> torch.Generator:
    """Return the generator of a place in the project's numbers, such as (seed, step).

    They are mixed into the 32 bits that torch's generator on the CPU reads of a seed; of seed * 2**32 + step it would
    read the step alone.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))


@torch.no_grad()
def draw(
    model: nn.Module, numbers: list[int], sampler: Sampler, objective: dict[str, Any], seed: int, device: torch.device
) -> Tensor:
    """Draw the images of these numbers, as the model sees images: (len(numbers), C, H, W).

    objective: the section of the run's config: what the model predicts, on which path.
    """
    config: ModelConfig = model.config
    path, prediction = transport.Path(objective["path"]), objective["prediction"]
    y = labels_of(numbers, config.n_class).to(device)
    generators = [seeded(seed, number) for number in numbers]
    shape = (len(numbers), *config.input_shape)
    noise = transport.normal_like(torch.zeros(shape, device=device), generators)

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return transport.to_velocity(model(x, t, y)[0], x, t, path, prediction)

    guided = transport.guided(velocity, y, config.n_class, sampler.guidance, sampler.interval)
    start = transport.first_time(sampler.steps, prediction)
    if sampler.method == "sde":
        return transport.sample_sde(guided, noise, sampler.steps, path, generators, start=start)
    return transport.sample_ode(guided, noise, sampler.steps, sampler.method, start)


def picture(images: Tensor, columns: int, least_side: int = 32) -> "Image":
    """Lay uint8 images (n, 1 or 3, side, side) out in rows, small ones enlarged."""
    from PIL import Image  # here: training without previews needs none

    rows = math.ceil(len(images) / columns)
    empty = images.new_zeros(rows * columns - len(images), *images.shape[1:])
    tiles = torch.cat([images.cpu(), empty.cpu()]).unflatten(
        0, (rows, columns)
    )  # (rows, columns, channels, side, side)
    whole = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).squeeze(2).numpy()
    scale = math.ceil(least_side / images.shape[-1])
    return Image.fromarray(whole.repeat(scale, 0).repeat(scale, 1))


def open_decoder(kind: str, vae_folder: str, device: torch.device) -> Decode:
    """Return what turns the model's outputs into images: of pixels a scale, of latents the VAE."""
    if kind == "digits":
        return to_images
    from SIT.vae import load_vae

    return load_vae(folder=vae_folder or None, device=device).decode


def load_run(folder: Path, device: torch.device) -> tuple[SiT, dict[str, Any]]:
    """Read a run's config and its newest average of weights, whichever layout it was trained in."""
    record = folder / "config.json"
    content = json.loads(record.read_text()) if record.is_file() else {}
    if content.get("experiment") != "sit":
        raise UserError(f"need the folder of a SIT run, with config.json and checkpoints; {folder} is none")
    settings = content["config"]
    config = ModelConfig(**settings["model"])
    both = nn.ModuleDict({"model": SiT(config), "average": SiT(config)})
    if checkpoint.load(folder / "checkpoints", both) is None:
        raise UserError(f"{folder} has no checkpoint to sample from; train it first, with checkpoint.every above 0")
    model = both["average"].to(device).eval()
    model.projector = None
    return model, settings


def sample(options: Options, ranks: launch.Launch) -> Path:
    """Draw the images, each rank its share, and write them; returns the picture's path."""
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, as in training
    model, settings = load_run(options.run, ranks.device)
    decode = open_decoder(settings["data"]["kind"], options.vae or settings["data"]["vae"], ranks.device)
    out = options.out or options.run / "samples.png"
    together = options.batch_size * ranks.world_size
    everything = []  # on rank 0: (B, side, side, 1 or 3) each
    for start in tqdm(range(0, options.count, together), disable=not ranks.is_main, desc="sampling", unit="round"):
        first = start + options.batch_size * ranks.rank
        mine = list(range(first, min(first + options.batch_size, options.count)))  # the last round may leave none
        images = None
        if mine:
            images = decode(draw(model, mine, options, settings["objective"], options.seed, ranks.device))
            images = images.permute(0, 2, 3, 1).cpu().numpy()  # (B, side, side, 1 or 3)
        everything += [part for part in gather(images, ranks) if part is not None]
    if ranks.is_main:
        out.parent.mkdir(parents=True, exist_ok=True)
        images = np.concatenate(everything)  # (count, side, side, 1 or 3)
        shown = torch.from_numpy(images[:100]).permute(0, 3, 1, 2)
        picture(shown, columns=max(1, round(len(shown) ** 0.5))).save(out)
        if options.npz:
            labels = labels_of(list(range(options.count)), model.config.n_class).numpy()
            np.savez(out.with_suffix(".npz"), images.repeat(3 // images.shape[-1], axis=-1), labels)
        print(f"{options.count} images: {out}" + (f", {out.with_suffix('.npz')}" if options.npz else ""))
    return out


def gather(images: np.ndarray | None, ranks: launch.Launch) -> list[np.ndarray | None]:
    """Bring all ranks' images to rank 0, in the order of the ranks."""
    if not dist.is_initialized():
        return [images]
    parts = [None] * ranks.world_size if ranks.is_main else None
    dist.gather_object(images, parts)
    return parts or []


def preview(average: nn.Module, decode: Decode, settings: Any, ranks: launch.Launch, out: Path) -> None:
    """Draw a few images in the middle of training; under FSDP every rank takes part, and all draw the same."""
    objective = {"path": settings.objective.path, "prediction": settings.objective.prediction}
    count, sampler = settings.eval.preview, Sampler(steps=settings.eval.preview_steps)
    drawn = draw(average, list(range(count)), sampler, objective, 0, ranks.device)
    if ranks.is_main:
        out.parent.mkdir(exist_ok=True)
        picture(decode(drawn), columns=max(1, round(count**0.5))).save(out)


def main() -> None:
    options = tyro.cli(Options, prog="python -m SIT.sample", description=__doc__)
    for name in ("count", "steps", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    sample(options, launch.start(options.device))
    launch.stop()


if __name__ == "__main__":
    launch.main_guard(main)
