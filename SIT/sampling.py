"""Drawing images from a trained SiT, for `python -m SIT.sample` and the previews of training."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import UserError, checkpoint, launch, progress
from common.config import from_dict
from common.json_files import check as check_shape
from common.json_files import read_object
from common.parallel import precision
from common.whole import write_whole
from SIT import transport
from SIT.data import to_images
from SIT.files import check_memory, check_space
from SIT.model import ModelConfig, SiT
from SIT.published import PUBLISHED, open_published
from SIT.sample import Options, Sampler, check

if TYPE_CHECKING:
    from PIL.Image import Image

SETTINGS = {"model": dict, "objective": {"path": str, "prediction": str, "label_dropout": float}}
SETTINGS |= {"data": {"kind": str, "vae": str}, "optimizer": {"name": str}}
Decode = Callable[[Tensor], Tensor]  # (B, C, H, W) of the model -> uint8 images (B, 1 or 3, side, side)


def labels_of(numbers: list[int], n_class: int) -> Tensor:
    """Return the classes of the images with these numbers: number mod n_class."""
    return torch.tensor([number % n_class for number in numbers])


def seeded(*seed_key: int) -> torch.Generator:
    """Return a generator seeded by several numbers, such as (seed, step).

    They are mixed into 32 bits, since torch's CPU generator uses no more: of seed * 2**32 + step only the step.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed_key).generate_state(1)[0]))


@torch.no_grad()
def draw(
    model: nn.Module,
    numbers: list[int],
    sampler: Sampler,
    objective: dict[str, Any],
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw the images with these numbers, in the model's space: (len(numbers), C, H, W) float32.

    objective: section of the run's config, with the model's prediction and path. dtype: of the model's matrix products,
    by autocast; the state between steps is always float64.
    """
    config: ModelConfig = model.config
    path, prediction = transport.Path(objective["path"]), objective["prediction"]
    y = labels_of(numbers, config.n_class).to(device)
    generators = [seeded(seed, number) for number in numbers]
    shape = (len(numbers), *config.input_shape)
    noise = transport.normal_like(torch.zeros(shape, device=device), generators)

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype.itemsize < 4):
            value = model(x, t, y)[0]
        return transport.to_velocity(value.to(x.dtype), x, t, path, prediction)

    guided = transport.guided(
        velocity, y, config.n_class, sampler.guidance, sampler.interval, sampler.guided_channels or None
    )
    start = transport.first_time(sampler.steps, prediction)
    if sampler.method == "sde":
        return transport.sample_sde(guided, noise, sampler.steps, path, generators, start=start)
    return transport.sample_ode(guided, noise, sampler.steps, sampler.method, start)


def picture(images: Tensor, columns: int, least_side: int = 32) -> "Image":
    """Arrange uint8 images (n, 1 or 3, side, side) in rows, small ones enlarged."""
    from PIL import Image  # here: training without previews does not need it

    rows = math.ceil(len(images) / columns)
    empty = images.new_zeros(rows * columns - len(images), *images.shape[1:])
    tiles = torch.cat([images.cpu(), empty.cpu()])
    tiles = tiles.unflatten(0, (rows, columns))  # (rows, columns, channels, side, side)
    whole = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).squeeze(2).numpy()
    scale = math.ceil(least_side / images.shape[-1])
    return Image.fromarray(whole.repeat(scale, 0).repeat(scale, 1))


def open_decoder(kind: str, vae: str, channels: int, device: torch.device, scaling: float | None = None) -> Decode:
    """Return the decoder of the model's outputs: a rescaling for pixels, the VAE of this name or folder for latents.

    Raises UserError if the VAE's channels or, where known, its scaling differ from the latents'.
    """
    if kind == "digits":
        return to_images
    from SIT.vae import DEFAULT, load_vae

    autoencoder = load_vae(vae or DEFAULT, device)
    if (autoencoder.channels, autoencoder.scaling) != (channels, scaling or autoencoder.scaling):
        wanted = f"{channels} channels" + (f" and scaling {scaling}" if scaling else "")
        raise UserError(
            f"need the VAE of the latents, with {wanted}; {vae or DEFAULT} has {autoencoder.channels} and "
            f"{autoencoder.scaling}: name the other, as data.vae in training and as --vae in sampling"
        )
    return autoencoder.decode


def load_run(folder: Path, device: torch.device) -> tuple[SiT, dict[str, Any]]:
    """Return a run's model with its newest averaged weights, and its config, for any training layout."""
    path, remedy = folder / "config.json", "name the folder of a SIT run, with config.json and checkpoints"
    content = read_object(path, {"experiment": str}, remedy)
    if content["experiment"] != "sit":
        raise UserError(f"need the folder of a SIT run, got {folder} of {content['experiment']}: name another")
    check_shape(content, str(path), {"config": SETTINGS}, remedy)
    settings = content["config"]
    config = from_dict(ModelConfig, settings["model"])
    both = nn.ModuleDict({"model": SiT(config), "average": SiT(config)})
    if checkpoint.load(folder / "checkpoints", both) is None:
        raise UserError(f"{folder} must have a checkpoint, has none: train it first, with checkpoint.every above 0")
    model = both["average"].to(device).eval()
    model.projector = None
    return model, settings


def open_model(options: Options, device: torch.device) -> tuple[SiT, dict[str, Any], Decode]:
    """Open a run or file: the model, its [objective] section, and the decoder of its outputs."""
    if options.run.is_file():
        model, settings = open_published(options.run).to(device).eval(), PUBLISHED
    else:
        model, settings = load_run(options.run, device)
    if options.guidance != 1 and settings["objective"]["label_dropout"] == 0:
        raise UserError(
            f"--guidance {options.guidance:g} needs a model trained with objective.label_dropout above 0, "
            f"{options.run} has 0: leave --guidance out"
        )
    if options.guided_channels > model.config.channels:
        raise UserError(
            f"--guided-channels must be at most the model's {model.config.channels}, got {options.guided_channels}"
        )
    vae = options.vae or settings["data"]["vae"]
    return model, settings["objective"], open_decoder(settings["data"]["kind"], vae, model.config.channels, device)


def sample(options: Options, process: launch.Process) -> Path:
    """Draw the images, divided among the ranks, and write them; returns the picture's path."""
    check(options)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, as in training
    run = options.run
    out = options.out or (run.with_name(f"{run.stem}-samples.png") if run.is_file() else run / "samples.png")
    model, objective, decode = open_model(options, process.device)
    launch.on_main(lambda: out.parent.mkdir(parents=True, exist_ok=True))
    images = draw_all(model, objective, decode, options, out.parent, process)
    if process.is_main:
        if options.npz:
            labels = labels_of(list(range(options.count)), model.config.n_class).numpy()
            colored = np.broadcast_to(images, (*images.shape[:-1], 3))
            write_whole(out.with_suffix(".npz"), lambda opened: np.savez(opened, colored, labels))
        shown = torch.from_numpy(images[:100]).permute(0, 3, 1, 2)
        picture(shown, columns=max(1, round(len(shown) ** 0.5))).save(out)
        print(f"{options.count} images: {out}" + (f", {out.with_suffix('.npz')}" if options.npz else ""))
    return out


def draw_all(
    model: SiT, objective: dict[str, Any], decode: Decode, options: Options, folder: Path, process: launch.Process
) -> np.ndarray | None:
    """Draw the images, divided among the ranks; returns all on rank 0, (count, side, side, 1 or 3) uint8.

    Raises UserError if the disk of `folder` has no room for the .npz.
    """
    together = options.batch_size * process.world_size
    images, filled, rounds = None, 0, range(0, options.count, together)
    with progress(rounds, is_main=process.is_main, desc="sampling", unit="round") as bar:
        for start in bar:
            first = start + options.batch_size * process.rank
            mine = list(range(first, min(first + options.batch_size, options.count)))  # may be empty in the last round
            drawn = None
            if mine:
                dtype = precision(options.dtype, process)
                drawn = draw(model, mine, options, objective, options.seed, process.device, dtype)
                if not drawn.isfinite().all():
                    raise UserError(
                        f"images must be finite, those of {options.run} are not: lower --guidance, or name a run that "
                        "has not diverged"
                    )
                drawn = decode(drawn)
                drawn = drawn.permute(0, 2, 3, 1).cpu().numpy()  # (B, side, side, 1 or 3)
            for part in gather(drawn, process):
                if images is None:
                    check_memory(options.count * part[0].size, "--count")
                    check_space(folder, int(options.npz), options.count * 3 * part[0, ..., 0].size)
                    images = np.empty((options.count, *part.shape[1:]), np.uint8)  # once: 50,000 are 10 GB
                images[filled : filled + len(part)] = part
                filled += len(part)
    return images


def gather(images: np.ndarray | None, process: launch.Process) -> list[np.ndarray]:
    """Gather all ranks' images on rank 0, in the order of the ranks; a rank may have none."""
    parts = [images]
    if dist.is_initialized():
        parts = [None] * process.world_size if process.is_main else []
        dist.gather_object(images, parts or None)
    return [part for part in parts if part is not None]


def preview(
    average: nn.Module, decode: Decode, settings: Any, process: launch.Process, folder: Path, step: int
) -> None:
    """Draw a few images into samples/ during training; all ranks draw the same, which FSDP requires."""
    objective = {"path": settings.objective.path, "prediction": settings.objective.prediction}
    count, sampler = settings.eval.preview, Sampler(steps=settings.eval.preview_steps)
    dtype = precision(settings.dtype, process)  # that of training, in which FSDP gathers the weights
    drawn = draw(average, list(range(count)), sampler, objective, 0, process.device, dtype)
    if process.is_main:
        out = folder / "samples" / f"{step:08d}.png"
        out.parent.mkdir(exist_ok=True)
        picture(decode(drawn), columns=max(1, round(count**0.5))).save(out)
