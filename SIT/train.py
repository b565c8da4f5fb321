"""Train a SiT with representation alignment (REPA), on one device or, under torchrun, on several.

    python -m SIT.train SIT/configs/digits.toml --optimizer.name muon --optimizer.lr 4e-3
    torchrun --standalone --nproc-per-node 8 -m SIT.train SIT/configs/sit_b2_imagenet.toml
    torchrun ... -m SIT.train SIT/configs/sit_b2_imagenet.toml --parallel.mode fsdp
    python -m SIT.train SIT/configs/digits.toml --resume

The run's folder, runs/sit/GROUP/NAME, holds metrics.jsonl, config.json, samples/, checkpoints/ and wandb/. On a CPU a
resumed run matches an uninterrupted one bit for bit.
"""

from common.config import parse_config
from common.guard import main_guard
from SIT.config import Config, SiTOptimizerConfig

if __name__ == "__main__":  # --help and errors before the imports below, which take seconds
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
from common.parallel import clip_gradient, cut_batch, destination, distribute, move_or_shard, precision, synchronizing
from common.read_ahead import read_ahead
from common.run import Run, execute
from optimizers import Probe, RuleOptimizer, build_optimizer
from optimizers.build import Gradients, check_name
from optimizers.layout import local_of
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
    """Train until `settings.steps` or a stop request; returns whether all steps were taken."""
    for name in (settings.optimizer.name, *settings.optimizer.tuned_lr):
        check_name(name)  # an unknown one fails before any data is read
    settings.optimizer.peak_lr()
    items = open_items(settings, process)
    counts = {name: len(part) for name, part in items.items()}
    launch.refuse_differences({"config": config.to_dict(settings), "images": counts}, process)
    encoder = open_encoder(settings, process)
    vae = settings.data.vae or items["train"].vae
    settings = replace(settings, data=replace(settings.data, vae=vae))  # recorded for SIT.sample
    kind, channels, scaling = settings.data.kind, settings.model.channels, items["train"].scaling
    decode = open_decoder(kind, vae, channels, process.device, scaling) if settings.eval.preview else None
    launch.seed_all(settings.seed)  # last before the weights, which then depend only on the seed
    model, average, network = build_model(settings, items["train"], encoder, process)
    optimizer = build(settings.optimizer, model, network, destination(settings.parallel, process))
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
        # eval.images decides the training split; the rate is in the run's name; folders may have moved.
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

            metrics = watch(step + 1)  # measures the weights before this step; not timed
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
    """Open the training images, "train", and those held out for validation, "val"."""
    if settings.data.batch_size < process.world_size:
        raise UserError(
            f"data.batch_size must be an image per rank or more, for {process.world_size} ranks; "
            f"got {settings.data.batch_size}; raise it, or start fewer (NGPU)"
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
    """Load the frozen encoder for alignment; None without one."""
    if not settings.objective.encoder:
        return None
    folder = settings.objective.encoder_folder or None
    encoder = load_encoder(settings.objective.encoder, process.device, folder, settings.model.grid)
    return encoder.double() if precision(settings.dtype, process) == torch.float64 else encoder


def build_model(
    settings: Config, items: data.Items, encoder: Encoder | None, process: launch.Process
) -> tuple[SiT, SiT, nn.Module]:
    """Return the model, the moving average of its weights, and the network to train."""
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, for fp32 operations under autocast
    torch.set_flush_denormal(True)  # saturated attention is subnormal, which CPUs compute slowly
    wanted = (encoder.z_dim, encoder.grid) if encoder else (0, settings.model.grid)
    if (settings.model.z_dim, settings.model.grid) != wanted:
        raise UserError(
            f"[model] must have z_dim {wanted[0]} and {wanted[1]} tokens per side, those of objective.encoder "
            f"{settings.objective.encoder!r}; got z_dim {settings.model.z_dim} and {settings.model.grid}"
        )
    model, dtype = SiT(settings.model), precision(settings.dtype, process)
    model.recompute = settings.recompute
    if dtype == torch.float64:
        model = model.double()
    average = copy.deepcopy(model).requires_grad_(False).eval()
    network = distribute(model, settings.parallel, process, dtype, settings.compile)
    return model, move_or_shard(average, settings.parallel, process, dtype), network


def build(
    settings: SiTOptimizerConfig, model: SiT, network: nn.Module, gradients: Gradients = "all_reduced"
) -> RuleOptimizer:
    """Build the optimizer; the rule refuses unknown options."""
    blocks = {"*.attn.qkv.weight": 3} if settings.split_qkv else None
    roles = tensor_roles(model, settings.modulation)
    options = settings.arguments()
    return build_optimizer(network, settings.name, qkv_split=blocks, roles=roles, gradients=gradients, **options)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, keep: float) -> None:
    """Update the moving average of the weights; each rank its own shards."""
    averages, weights = ([local_of(param) for param in each.parameters()] for each in (average, model))
    get_ema_multi_avg_fn(keep)(averages, weights, None)


def read_batches(
    items: data.Items, steps: range, settings: Config, process: launch.Process
) -> Iterator[dict[str, Tensor]]:
    """Yield each step's micro-batches with noise, times and dropped labels; a thread reads ahead."""
    batch_size = settings.data.batch_size

    @lru_cache(maxsize=1)  # shared by the micro-batches of a step
    def drawn(step: int) -> Draws:
        return draw((TRAINING, settings.seed, step), batch_size, settings.model.input_shape, settings.objective)

    def read(step_and_piece: tuple[int, tuple[slice, int]]) -> dict[str, Tensor]:
        step, (rows, _) = step_and_piece
        batch = data.batch(items, seed=settings.seed, step=step, rows=rows, global_batch=batch_size)
        return batch | {name: each[rows] for name, each in drawn(step)._asdict().items()}

    pieces = itertools.product(steps, cut_batch(batch_size, settings.data.micro_batch, process))
    return read_ahead(read, pieces, settings.data.read_ahead, process.device)


def accumulate_gradient(
    network: nn.Module,
    scaler: torch.amp.GradScaler,
    batches: Iterator[dict[str, Tensor]],
    encoder: Encoder | None,
    settings: Config,
    process: launch.Process,
) -> Tensor:
    """Accumulate the gradient of the global batch's mean loss; returns this rank's share of its parts.

    These are (2,): the denoising and the projection loss.
    """
    network.train()
    batch_size, shares = settings.data.batch_size, process.world_size
    mine = cut_batch(batch_size, settings.data.micro_batch, process)
    totals = 0  # becomes (2,): the denoising and the projection loss
    for number, (_, count) in enumerate(mine, start=1):
        batch = data.move(next(batches), process.device)
        draws = Draws(*(batch[name] for name in Draws._fields))
        with synchronizing(network, number == len(mine)):  # gradients are reduced once per step
            losses = losses_of(network, batch, draws, encoder, settings, process)
            parts = torch.stack([each.mean() for each in losses]) * (count * shares / batch_size)
            loss = parts[0] + settings.objective.projection_weight * parts[1]
            scaler.scale(loss).backward()
        totals = totals + parts.detach()
    return totals / shares


if __name__ == "__main__":
    main_guard(main)
