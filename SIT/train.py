"""Train a SiT with representation alignment (REPA) by one of the optimizers, on one device or, under torchrun, on many.

    python -m SIT.train SIT/configs/digits.toml --optimizer.name muon --optimizer.lr 4e-3
    torchrun --standalone --nproc-per-node 8 -m SIT.train SIT/configs/sit_b2_imagenet.toml
    torchrun ... -m SIT.train SIT/configs/sit_b2_imagenet.toml --parallel.mode fsdp
    python -m SIT.train SIT/configs/digits.toml --resume

The run's folder, runs/sit/GROUP/NAME, holds metrics.jsonl, config.json, samples/, checkpoints/ and wandb/. On a CPU a
resumed run repeats, bit for bit, what it would have done uninterrupted.
"""

from common.config import parse_config
from common.guard import main_guard
from SIT.config import Config, SiTOptimizerConfig

if __name__ == "__main__":  # --help and mistakes now: the imports below take seconds
    main_guard(lambda: parse_config(Config))

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common import UserError, config, launch
from common.parallel import clip_gradient, cut_batch, distribute, move_or_shard, precision, synchronizing
from common.read_ahead import read_ahead
from common.run import Run, execute
from optimizers import Probe, RuleOptimizer, build_optimizer
from optimizers.layout import local_of
from optimizers.rule import rule_named
from SIT import data
from SIT.encoders import Encoder, load_encoder
from SIT.latents import Latents
from SIT.model import SiT, tensor_roles
from SIT.objective import TRAINING, Draws, draw, evaluate, losses_of
from SIT.sampling import open_decoder, preview


def main() -> None:
    """Read the configuration and train."""
    execute(train, parse_config(Config))


def train(settings: Config, process: launch.Process) -> bool:
    """Train until `settings.steps`, or until asked to stop; returns whether the end was reached."""
    for name in (settings.optimizer.name, *settings.optimizer.tuned_lr):
        rule_named(name)  # an unknown one fails now, before any data is touched
    settings.optimizer.peak_lr()
    items = open_items(settings, process)
    counts = {name: len(part) for name, part in items.items()}
    launch.refuse_differences({"config": config.to_dict(settings), "images": counts}, process)
    encoder = open_encoder(settings, process)
    vae = settings.data.vae or items["train"].vae
    settings = replace(settings, data=replace(settings.data, vae=vae))  # for sampling from it
    kind, channels, scaling = settings.data.kind, settings.model.channels, items["train"].scaling
    decode = open_decoder(kind, vae, channels, process.device, scaling) if settings.eval.preview else None
    launch.seed_all(settings.seed)  # after all else that may draw: the weights depend on nothing but the seed
    model, average, network = build_model(settings, items["train"], encoder, process)
    optimizer = build(settings.optimizer, model, network)
    roles = tensor_roles(model, settings.optimizer.modulation)
    watch = Probe(optimizer, model=model, roles=roles, **settings.probe.options())
    scaler = torch.amp.GradScaler(process.device.type, enabled=precision(settings.dtype, process) == torch.float16)
    run = Run(
        settings,
        process,
        experiment="sit",
        model=nn.ModuleDict({"model": model, "average": average}),
        optimizer=optimizer,
        scaler=scaler,
        unit="images",
        units_per_step=settings.data.batch_size,
        # eval.images decides which are left to train on; the rate is in the run's name; folders may have been moved.
        fixed=("clip", "dtype", "ema", "eval.images", "model", "data", "objective", "optimizer", "schedule"),
        free=("data.folder", "data.micro_batch", "data.workers", "data.read_ahead", "data.on_corrupt", "data.vae")
        + ("objective.encoder_folder", "optimizer.lr", "optimizer.tuned_lr"),
    )
    with run:
        if run.step == 0:
            state = {"optimizer_state_mb": optimizer.state_size() / 1e6}
            run.log(state | evaluate(average, items["val"], encoder, settings, process))
            if decode:
                preview(average, decode, settings, process, run.folder, run.step)
        batches = read_batches(items["train"], range(run.step, settings.steps), settings, process)
        for step in run.steps():
            parts = accumulate_gradient(network, scaler, batches, encoder, settings, process)
            scaler.unscale_(optimizer)
            norm = clip_gradient(model, settings.clip or math.inf)
            (denoising, projection), norm = run.read(parts, norm)
            loss = denoising + settings.objective.projection_weight * projection

            metrics = watch(step + 1)  # of the weights before this step; not in its time
            run.timer.optimizer()
            if run.accepts(loss, norm):
                scaler.step(optimizer)
                update_average(average, model, settings.ema)
            scaler.update()
            optimizer.zero_grad()
            run.count_step()

            if run.is_due(settings.log_every):
                metrics |= {"train/loss": loss, "train/denoising_loss": denoising, "train/projection_loss": projection}
                metrics |= run.measurements()
            if run.is_due(settings.eval.every):
                metrics |= evaluate(average, items["val"], encoder, settings, process)
            run.log(metrics)
            run.save_if_due()
            if decode and "val/loss" in metrics:
                preview(average, decode, settings, process, run.folder, run.step)
    return run.finished


def open_items(settings: Config, process: launch.Process) -> dict[str, data.Items]:
    """Open the images of training, "train", and those held out for validation, "val"."""
    if settings.data.batch_size < process.world_size:
        raise UserError(
            f"data.batch_size must be an image per rank or more, for {process.world_size} ranks; "
            f"got {settings.data.batch_size}; raise it or set NGPU"
        )
    if settings.data.kind == "digits":
        items = data.digits()
    else:
        latents = Latents(
            settings.data.folder,
            n_class=settings.model.n_class,
            on_corrupt=settings.data.on_corrupt,
            flips=settings.data.flips,
            with_images=bool(settings.objective.encoder),
            workers=settings.data.workers,
        )
        parts = data.hold_out(len(latents), settings.eval.images)
        items = {name: latents.part(indices) for name, indices in parts.items()}
    model, source = settings.model, items["train"]
    if (source.shape, source.n_class) != (model.input_shape, model.n_class):
        raise UserError(
            f"[model] must have the channels, input_size and n_class of its data, {source.shape} and {source.n_class}; "
            f"got {model.input_shape} and {model.n_class}"
        )
    return items


def open_encoder(settings: Config, process: launch.Process) -> Encoder | None:
    """Load the frozen encoder that tokens are aligned with."""
    if not settings.objective.encoder:
        return None
    folder = settings.objective.encoder_folder or None
    encoder = load_encoder(settings.objective.encoder, process.device, folder, settings.model.grid)
    return encoder.double() if precision(settings.dtype, process) == torch.float64 else encoder


def build_model(
    settings: Config, items: data.Items, encoder: Encoder | None, process: launch.Process
) -> tuple[SiT, SiT, nn.Module]:
    """Return the model, the average of its weights over time, and the network that trains the model."""
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, for what autocast leaves in fp32
    torch.set_flush_denormal(True)  # saturated attention is subnormal, which CPUs compute slowly
    wanted = (encoder.z_dim, encoder.grid) if encoder else (0, settings.model.grid)
    if (settings.model.z_dim, settings.model.grid) != wanted:
        raise UserError(
            f"[model] must have z_dim {wanted[0]} and {wanted[1]} tokens a side, as objective.encoder "
            f"{settings.objective.encoder!r} has them; got z_dim {settings.model.z_dim} and {settings.model.grid}"
        )
    model, dtype = SiT(settings.model), precision(settings.dtype, process)
    model.recompute = settings.recompute
    if dtype == torch.float64:
        model = model.double()
    average = copy.deepcopy(model).requires_grad_(False).eval()
    network = distribute(model, settings.parallel, process, dtype, settings.compile)
    return model, move_or_shard(average, settings.parallel, process, dtype), network


def build(settings: SiTOptimizerConfig, model: SiT, network: nn.Module) -> RuleOptimizer:
    """Build the optimizer; every option that is set reaches the rule, which refuses what it does not have."""
    blocks = {"*.attn.qkv.weight": 3} if settings.split_qkv else None
    roles = tensor_roles(model, settings.modulation)
    return build_optimizer(network, settings.name, qkv_split=blocks, roles=roles, **settings.arguments())


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, keep: float) -> None:
    """Move the average of the weights towards the model's: each rank its own shards."""
    averages, weights = ([local_of(param) for param in each.parameters()] for each in (average, model))
    get_ema_multi_avg_fn(keep)(averages, weights, None)


def read_batches(
    items: data.Items, steps: range, settings: Config, process: launch.Process
) -> Iterator[dict[str, Tensor]]:
    """Give the batch of each piece of each step, with its noise, times and dropped labels; a thread reads ahead."""
    batch_size = settings.data.batch_size

    @lru_cache(maxsize=1)  # one step's pieces share it
    def drawn(step: int) -> Draws:
        return draw((TRAINING, settings.seed, step), batch_size, settings.model.input_shape, settings.objective)

    def read(place: tuple[int, tuple[slice, int]]) -> dict[str, Tensor]:
        step, (rows, _) = place
        batch = data.batch(items, seed=settings.seed, step=step, rows=rows, global_batch=batch_size)
        return batch | {name: each[rows] for name, each in drawn(step)._asdict().items()}

    places = itertools.product(steps, cut_batch(batch_size, settings.data.micro_batch, process))
    return read_ahead(read, places, settings.data.read_ahead, process.device)


def accumulate_gradient(
    network: nn.Module,
    scaler: torch.amp.GradScaler,
    batches: Iterator[dict[str, Tensor]],
    encoder: Encoder | None,
    settings: Config,
    process: launch.Process,
) -> Tensor:
    """Leave the gradient of the global batch's mean loss in the parameters, and return this rank's share of its parts.

    These are (2,), the denoising and the projection loss.
    """
    network.train()
    batch_size, shares = settings.data.batch_size, process.world_size
    mine = cut_batch(batch_size, settings.data.micro_batch, process)
    totals = 0  # then (2,): of the denoising and the projection loss
    for number, (_, count) in enumerate(mine, start=1):
        batch = data.move(next(batches), process.device)
        draws = Draws(*(batch[name] for name in Draws._fields))
        with synchronizing(network, number == len(mine)):  # the ranks' gradients meet once per step
            losses = losses_of(network, batch, draws, encoder, settings, process)
            parts = torch.stack([each.mean() for each in losses]) * (count * shares / batch_size)
            loss = parts[0] + settings.objective.projection_weight * parts[1]
            scaler.scale(loss).backward()
        totals = totals + parts.detach()
    return totals / shares


if __name__ == "__main__":
    main_guard(main)
