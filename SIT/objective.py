"""The objective of a SiT: its random draws, its losses, and their validation."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import launch
from common.parallel import autocast, precision
from SIT import data
from SIT.config import Config, ObjectiveConfig
from SIT.encoders import Encoder
from SIT.sampling import seeded
from SIT.transport import Path, denoising_loss, interpolate, projection_loss, times

TRAINING, VALIDATION = 1, 2  # first part of a seed: training and validation never share noise and times


class Draws(NamedTuple):
    """Random numbers of a batch of B images."""

    noise: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    dropped: Tensor  # (B,), whose labels are hidden


def draw(seed_key: tuple[int, ...], count: int, shape: tuple[int, ...], settings: ObjectiveConfig) -> Draws:
    """Draw for the global batch, equally on every rank, which then takes its rows."""
    generator = seeded(*seed_key)
    t = times(count, settings.times, generator, Path(settings.path))
    dropped = torch.rand(count, generator=generator) < settings.label_dropout
    return Draws(torch.randn(count, *shape, generator=generator), t, dropped)


def losses_of(
    network: nn.Module,
    batch: dict[str, Tensor],
    draws: Draws,
    encoder: Encoder | None,
    settings: Config,
    process: launch.Process,
) -> tuple[Tensor, Tensor]:
    """Return the denoising and the projection loss (0 without an encoder) of each image, (B,) each."""
    path, x, y = Path(settings.objective.path), batch["x"], batch["y"]
    dtype = precision(settings.dtype, process)
    y = torch.where(draws.dropped, settings.model.n_class, y)  # n_class: no class
    with autocast(dtype, process):
        prediction, projected = network(interpolate(x, draws.noise, draws.t, path), draws.t, y)
    denoising = denoising_loss(prediction, x, draws.noise, draws.t, path, settings.objective.prediction)
    if encoder is None:
        return denoising, torch.zeros_like(denoising)
    with autocast(dtype, process):
        features = encoder(batch["images"])  # (B, N, Z)
    return denoising, projection_loss(projected, features)


@torch.no_grad()
def evaluate(
    average: nn.Module, items: data.Items, encoder: Encoder | None, settings: Config, process: launch.Process
) -> dict[str, float]:
    """Return the losses of the averaged model on the validation images, with fixed noise and times."""
    count = min(settings.eval.images, len(items))
    drawn = draw((VALIDATION,), count, items.shape, settings.objective)
    drawn = drawn._replace(dropped=torch.zeros_like(drawn.dropped))
    together = settings.data.micro_batch * process.world_size
    totals = torch.zeros(2, dtype=torch.float64)
    for start in range(0, count, together):
        mine = list(range(start, min(start + together, count)))[process.rank :: process.world_size]
        rows = mine or [0]  # FSDP needs every rank in every pass
        batch = data.move(data.take(items, rows, seed=0), process.device)
        draws = Draws(*(each[rows].to(process.device) for each in drawn))
        losses = losses_of(average, batch, draws, encoder, settings, process)
        totals += torch.stack([each.mean() for each in losses]).double().cpu() * len(mine)
    denoising, projection = (total / count for total in launch.all_reduce_sum(totals.tolist(), process))
    loss = denoising + settings.objective.projection_weight * projection
    return {"val/loss": loss, "val/denoising_loss": denoising, "val/projection_loss": projection}
