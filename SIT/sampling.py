"""Images drawn from a trained SiT, as `python -m SIT.sample` and the previews of training draw them."""

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
    model: nn.Module,
    numbers: list[int],
    sampler: Sampler,
    objective: dict[str, Any],
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw the images of these numbers, as the model sees images: (len(numbers), C, H, W) float32.

    objective: the section of the run's config: the model's prediction, and its path. dtype: of the model's products;
    in half precision autocast keeps the rest in float32, and the state between steps is in float64 always.
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
    """Lay uint8 images (n, 1 or 3, side, side) out in rows, small ones enlarged."""
    from PIL import Image  # here: training without previews needs none

    rows = math.ceil(len(images) / columns)
    empty = images.new_zeros(rows * columns - len(images), *images.shape[1:])
    tiles = torch.cat([images.cpu(), empty.cpu()])
    tiles = tiles.unflatten(0, (rows, columns))  # (rows, columns, channels, side, side)
    whole = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).squeeze(2).numpy()
    scale = math.ceil(least_side / images.shape[-1])
    return Image.fromarray(whole.repeat(scale, 0).repeat(scale, 1))


def open_decoder(kind: str, vae: str, channels: int, device: torch.device, scaling: float | None = None) -> Decode:
    """Return the decoder of the model's outputs: of pixels a scale, of latents the VAE of this name or folder.

    Raises UserError for a VAE of other channels or, where it is known, of another scaling than the latents'.
    """
    if kind == "digits":
        return to_images
    from SIT.vae import DEFAULT, load_vae

    autoencoder = load_vae(vae or DEFAULT, device)
    if (autoencoder.channels, autoencoder.scaling) != (channels, scaling or autoencoder.scaling):
        wanted = f"{channels} channels" + (f" and scaling {scaling}" if scaling else "")
        raise UserError(
            f"need the VAE that encoded the latents, of {wanted}; {vae or DEFAULT} has {autoencoder.channels} and "
            f"{autoencoder.scaling}: name the other, as data.vae in training and as --vae in sampling"
        )
    return autoencoder.decode


def load_run(folder: Path, device: torch.device) -> tuple[SiT, dict[str, Any]]:
    """Read a run's config and its newest average of weights, whichever layout it was trained in."""
    path, remedy = folder / "config.json", "name the folder of a SIT run, with config.json and checkpoints"
    content = read_object(path, {"experiment": str}, remedy)
    if content["experiment"] != "sit":
        raise UserError(f"need the folder of a SIT run; {folder} is of {content['experiment']}: name another")
    check_shape(content, str(path), {"config": SETTINGS}, remedy)
    settings = content["config"]
    config = from_dict(ModelConfig, settings["model"])
    both = nn.ModuleDict({"model": SiT(config), "average": SiT(config)})
    if checkpoint.load(folder / "checkpoints", both) is None:
        raise UserError(f"{folder} has no checkpoint to sample from; train it first, with checkpoint.every above 0")
    model = both["average"].to(device).eval()
    model.projector = None
    return model, settings


def open_model(options: Options, device: torch.device) -> tuple[SiT, dict[str, Any], Decode]:
    """Open a run or file: the model, the config's section of its objective, and the decoder of its outputs."""
    if options.run.is_file():
        model, settings = open_published(options.run).to(device).eval(), PUBLISHED
    else:
        model, settings = load_run(options.run, device)
    if options.guidance != 1 and settings["objective"]["label_dropout"] == 0:
        raise UserError(
            f"--guidance {options.guidance:g} needs a model that learnt to go without a class, {options.run} was "
            "trained with objective.label_dropout 0: leave --guidance out"
        )
    if options.guided_channels > model.config.channels:
        raise UserError(
            f"--guided-channels must be at most the model's {model.config.channels}, got {options.guided_channels}"
        )
    vae = options.vae or settings["data"]["vae"]
    return model, settings["objective"], open_decoder(settings["data"]["kind"], vae, model.config.channels, device)


def sample(options: Options, process: launch.Process) -> Path:
    """Draw the images, each rank its share, and write them; returns the picture's path."""
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
    """Draw each rank's share; rank 0 gets them all, (count, side, side, 1 or 3) uint8.

    Raises UserError where the disk of `folder` has no room for the .npz.
    """
    together = options.batch_size * process.world_size
    images, filled, rounds = None, 0, range(0, options.count, together)
    with progress(rounds, is_main=process.is_main, desc="sampling", unit="round") as bar:
        for start in bar:
            first = start + options.batch_size * process.rank
            mine = list(range(first, min(first + options.batch_size, options.count)))  # the last round may leave none
            drawn = None
            if mine:
                dtype = precision(options.dtype, process)
                drawn = draw(model, mine, options, objective, options.seed, process.device, dtype)
                if not drawn.isfinite().all():
                    raise UserError(
                        f"{options.run} draws images that are not finite: lower --guidance, or name a run "
                        "that has not diverged"
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
    """Bring all ranks' images to rank 0, in the order of the ranks; a rank may have none."""
    parts = [images]
    if dist.is_initialized():
        parts = [None] * process.world_size if process.is_main else []
        dist.gather_object(images, parts or None)
    return [part for part in parts if part is not None]


def preview(
    average: nn.Module, decode: Decode, settings: Any, process: launch.Process, folder: Path, step: int
) -> None:
    """Draw a few images into samples/ in the middle of training; all ranks draw the same, and under FSDP all must."""
    objective = {"path": settings.objective.path, "prediction": settings.objective.prediction}
    count, sampler = settings.eval.preview, Sampler(steps=settings.eval.preview_steps)
    dtype = precision(settings.dtype, process)  # training's: in shards the weights come in it
    drawn = draw(average, list(range(count)), sampler, objective, 0, process.device, dtype)
    if process.is_main:
        out = folder / "samples" / f"{step:08d}.png"
        out.parent.mkdir(exist_ok=True)
        picture(decode(drawn), columns=max(1, round(count**0.5))).save(out)
