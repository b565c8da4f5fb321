"""Train a SiT with representation alignment (REPA) by one of the optimizers, on one device or, under torchrun, on many.

    python -m SIT.train SIT/configs/digits.toml --optimizer.name muon --optimizer.lr 4e-3
    torchrun --standalone --nproc-per-node 8 -m SIT.train SIT/configs/sit_b2_imagenet.toml
    torchrun ... -m SIT.train SIT/configs/sit_b2_imagenet.toml --parallel.mode fsdp
    python -m SIT.train SIT/configs/digits.toml --resume

The run's folder, runs/sit/GROUP/NAME, holds metrics.jsonl, config.json, samples/, checkpoints/ and wandb/. On a CPU a
resumed run repeats, bit for bit, what it would have done uninterrupted.
"""

import copy
import itertools
import math
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from common import UserError, checkpoint, config, launch, progress
from common.checkpoint_folder import CheckpointConfig
from common.config import at_least
from common.optimizer_config import OptimizerConfig
from common.parallel import (
    ParallelConfig,
    autocast,
    clip_gradient,
    cut_batch,
    distribute,
    place,
    precision,
    synchronizing,
)
from common.runlog import RunLog, end_if_diverged, move_aside, run_name, write_end
from common.schedule import ScheduleConfig, multiplier
from common.timer import Timer
from optimizers import RuleOptimizer, build_optimizer
from optimizers.layout import local_of
from optimizers.rule import rule_named
from SIT import data
from SIT.encoders import Encoder, load_encoder
from SIT.latents import Latents
from SIT.model import ModelConfig, SiT, tensor_roles
from SIT.sample import open_decoder, preview, seeded
from SIT.transport import Path as NoisePath
from SIT.transport import Prediction, denoising_loss, interpolate, projection_loss, times

TRAINING, VALIDATION = 1, 2  # what noise and times are drawn for: never the same ones for both


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how it is cut."""

    kind: Literal["digits", "latents"] = "latents"
    """digits: scikit-learn's, 8 x 8 pixels; latents: a folder that `python -m SIT.prepare` made."""
    folder: str = "data/imagenet256"
    """The folder of latents."""
    batch_size: int = 256
    """Images a step, over all ranks and micro-batches."""
    micro_batch: int = 64
    """Most images that one rank takes through the model at once; lower it if memory runs out, the result stays."""
    flips: bool = False
    """Mirror every second image, at random; needs `prepare encode --flip`."""
    vae: str = ""
    """Name on the Hugging Face Hub, or folder, of the VAE, for previews; empty: the one that made the latents."""
    on_corrupt: Literal["fail", "skip"] = "fail"
    """What to do with a file that cannot be read: end, or skip it with a warning."""

    def __post_init__(self):
        at_least(1, self, "batch_size", "micro_batch")
        if self.flips and self.kind == "digits":
            raise config.ConfigError("flips are for latents; mirrored digits are none: leave data.flips out")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learnt: the way from data to noise, what the network says of it, and the alignment."""

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
            raise config.ConfigError(f"label_dropout must be below 1, got {self.label_dropout}; 0.1 is SiT's")


@dataclass(frozen=True)
class Optimizer(OptimizerConfig):
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
class Config:
    """Every knob of a run; the defaults are the paper's SiT-B/2 on ImageNet latents."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: ScheduleConfig = field(default_factory=partial(ScheduleConfig, warmup=0, decay="constant"))  # as REPA
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    steps: int = 400_000
    """Optimizer steps."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0 leaves it as it is."""
    ema: float = 0.9999
    """Part that the average of the weights keeps in a step."""
    seed: int = 1337
    """Seeds the weights and, with the step, batches, noise and times."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """What the model computes in, its weights staying float32; auto is bfloat16 on GPUs and float32 elsewhere."""
    recompute: bool = False
    """Keep only the blocks' inputs, and compute them again in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Run the model through torch.compile: a minute of compiling, then faster steps on a GPU."""
    log_every: int = 50
    """Steps between lines of metrics."""
    group: str = "default"
    """Folder of the run under runs/sit, and its group in Weights & Biases."""
    out: str = "runs/sit"
    """Folder of all runs."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases: auto is online with a login, else offline (`wandb sync` uploads it later)."""
    resume: bool = False
    """Continue from the newest checkpoint of this run; without it, an earlier run's folder is moved aside."""

    def __post_init__(self):
        at_least(1, self, "steps", "log_every")
        at_least(0, self, "clip", "seed")
        if not 0 <= self.ema < 1:
            raise config.ConfigError(f"ema must be in [0, 1), got {self.ema}; 0.9999 is SiT's")


class Draws(NamedTuple):
    """What is random about the images of a batch, besides which they are; B images."""

    noise: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    dropped: Tensor  # (B,), whose labels are hidden


def main() -> None:
    """Read the configuration and train."""
    settings = config.parse_config(Config)
    ranks = launch.start(settings.device)
    finished = train(settings, ranks)
    launch.stop()  # not after a failure: it waits for ranks that may be waiting for this one
    if not finished:
        sys.exit(128 + signal.SIGTERM)


def train(settings: Config, ranks: launch.Launch) -> bool:
    """Train until `settings.steps`, or until asked to stop; returns whether the end was reached."""
    rule_named(settings.optimizer.name)  # an unknown one fails now, before any data is touched
    lr = settings.optimizer.peak_lr()
    name = run_name(settings.optimizer.name, lr, settings.seed, settings.optimizer.adamw_lr)
    folder = Path(settings.out, settings.group, name)
    items = open_items(settings, ranks)
    encoder = open_encoder(settings, ranks)
    vae = settings.data.vae or items["train"].vae
    settings = replace(settings, data=replace(settings.data, vae=vae))  # a run's record names what decodes its samples
    kind, channels, scaling = settings.data.kind, settings.model.channels, items["train"].scaling
    decode = open_decoder(kind, vae, channels, ranks.device, scaling) if settings.eval.preview else None
    launch.seed_all(settings.seed)  # after all else that may draw: the weights depend on nothing but the seed
    model, average, network = build_model(settings, items["train"], encoder, ranks)
    both = nn.ModuleDict({"model": model, "average": average})  # what a checkpoint holds
    optimizer = build(settings.optimizer, model, network)
    peaks = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=precision(settings.dtype, ranks) == torch.float16)

    step, skipped, in_a_row = 0, 0, 0
    if settings.resume:
        same_experiment(launch.on_main(lambda: checkpoint.read_extra(folder / "checkpoints")), settings)
        if saved := checkpoint.load(folder / "checkpoints", both, optimizer):
            step, skipped, in_a_row = saved["step"], saved["skipped"], saved["in_a_row"]
            scaler.load_state_dict(saved["scaler"])
        elif ranks.is_main:
            print(f"no checkpoint in {folder}: starting at step 0")
    if step == 0 and ranks.is_main:
        move_aside(folder)
    runlog = RunLog(
        folder,
        config=config.to_dict(settings),
        experiment="sit",
        name=name,
        group=settings.group,
        tags=[settings.optimizer.name],
        wandb_mode=settings.wandb,
        resume_step=step or None,
        is_main=ranks.is_main,
    )
    if step == 0:
        first = {"images": 0, "optimizer_state_mb": optimizer.state_size() / 1e6}
        runlog.log(0, first | evaluate(average, items["val"], encoder, settings, ranks))
        if decode:
            preview(average, decode, settings, ranks, folder, step)

    batches = read_batches(items["train"], range(step, settings.steps), settings, ranks)
    timer = Timer(ranks.device)
    bar = progress(total=settings.steps, initial=step, desc=name, is_main=ranks.is_main)
    with bar, launch.StopRequest() as stop:
        asked, shown = False, {}
        while step < settings.steps and not asked:
            timer.start()
            rate = multiplier(step, steps=settings.steps, **vars(settings.schedule))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate
            losses = accumulate_gradient(network, scaler, batches, encoder, step, settings, ranks)
            scaler.unscale_(optimizer)
            norm = clip_gradient(model, settings.clip or math.inf)

            timer.optimizer()
            if math.isfinite(norm) and math.isfinite(losses["train/loss"]):
                scaler.step(optimizer)
                follow(average, model, settings.ema)
                in_a_row = 0
            else:
                skipped, in_a_row = skipped + 1, in_a_row + 1
            scaler.update()
            optimizer.zero_grad()
            step += 1
            timer.stop()
            end_if_diverged(folder, step, in_a_row, ranks.is_main)

            last, metrics = step == settings.steps, {}
            if step % settings.log_every == 0 or last:
                metrics = {**losses, "lr": lr * rate, "grad_norm": norm, "skipped": skipped}
                metrics |= speed(timer.medians(), settings, ranks)
            if step % settings.eval.every == 0 or last:
                metrics |= evaluate(average, items["val"], encoder, settings, ranks)
            if metrics:
                runlog.log(step, {"images": step * settings.data.batch_size, **metrics})
                shown |= {key: f"{metrics[key]:.4f}" for key in ("train/loss", "val/loss") if key in metrics}
                bar.set_postfix(shown, refresh=False)
            asked = stop.agreed(ranks)
            if settings.checkpoint.every and (step % settings.checkpoint.every == 0 or last or asked):
                extra = {"config": config.to_dict(settings), "scaler": scaler.state_dict()}
                extra |= {"skipped": skipped, "in_a_row": in_a_row}
                checkpoint.save(folder / "checkpoints", step, both, optimizer, extra, settings.checkpoint.keep)
            if decode and "val/loss" in metrics:
                preview(average, decode, settings, ranks, folder, step)
            if last and ranks.is_main:
                write_end(folder, step, metrics)
            bar.update()
    runlog.finish()
    if step < settings.steps and ranks.is_main:
        after = "the same command with --resume continues" if settings.checkpoint.every else "checkpoints are off"
        print(f"stopped at step {step} of {settings.steps}; {after}")
    return step >= settings.steps


def open_items(settings: Config, ranks: launch.Launch) -> dict[str, data.Items]:
    """Open what is trained on, "train", and what is left out for validation, "val"."""
    if settings.data.batch_size < ranks.world_size:
        raise UserError(
            f"data.batch_size must be an image a rank or more, for {ranks.world_size} ranks; "
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


def open_encoder(settings: Config, ranks: launch.Launch) -> Encoder | None:
    """Load the frozen encoder that tokens are aligned with."""
    if not settings.objective.encoder:
        return None
    folder = settings.objective.encoder_folder or None
    encoder = load_encoder(settings.objective.encoder, ranks.device, folder, settings.model.grid)
    return encoder.double() if precision(settings.dtype, ranks) == torch.float64 else encoder


def build_model(
    settings: Config, items: data.Items, encoder: Encoder | None, ranks: launch.Launch
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
    model, dtype = SiT(settings.model), precision(settings.dtype, ranks)
    model.recompute = settings.recompute
    if dtype == torch.float64:
        model = model.double()
    average = copy.deepcopy(model).requires_grad_(False).eval()
    network = distribute(model, settings.parallel, ranks, dtype, settings.compile)
    return model, place(average, settings.parallel, ranks, dtype), network


def build(settings: Optimizer, model: SiT, network: nn.Module) -> RuleOptimizer:
    """Build the optimizer; every option that is set reaches the rule, which refuses what it does not have."""
    blocks = {"*.attn.qkv.weight": 3} if settings.split_qkv else None
    roles = tensor_roles(model, settings.modulation)
    return build_optimizer(network, settings.name, qkv_split=blocks, roles=roles, **settings.options())


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, keep: float) -> None:
    """Move the average of the weights towards the model's: each rank its own part."""
    averages, weights = ([local_of(param) for param in each.parameters()] for each in (average, model))
    torch._foreach_lerp_(averages, weights, 1 - keep)


def draw(place: tuple[int, ...], count: int, shape: tuple[int, ...], settings: ObjectiveConfig) -> Draws:
    """Draw for a whole global batch, the same on every rank, which takes its rows of it."""
    generator = seeded(*place)
    t = times(count, settings.times, generator, NoisePath(settings.path))
    dropped = torch.rand(count, generator=generator) < settings.label_dropout
    return Draws(torch.randn(count, *shape, generator=generator), t, dropped)


def losses_of(
    network: nn.Module,
    batch: dict[str, Tensor],
    draws: Draws,
    encoder: Encoder | None,
    settings: Config,
    ranks: launch.Launch,
) -> tuple[Tensor, Tensor]:
    """Return the denoising and the projection loss of each image, (B,) each; 0 without an encoder."""
    path, x, y = NoisePath(settings.objective.path), batch["x"], batch["y"]
    dtype = precision(settings.dtype, ranks)
    y = torch.where(draws.dropped, settings.model.n_class, y)  # n_class: none
    with autocast(network, dtype, ranks):
        prediction, projected = network(interpolate(x, draws.noise, draws.t, path), draws.t, y)
    denoising = denoising_loss(prediction, x, draws.noise, draws.t, path, settings.objective.prediction)
    if encoder is None:
        return denoising, torch.zeros_like(denoising)
    with autocast(encoder, dtype, ranks):  # beside a network in shards too, which does without
        features = encoder(batch["images"])  # (B, N, Z)
    return denoising, projection_loss(projected, features)


def read_batches(
    items: data.Items, steps: range, settings: Config, ranks: launch.Launch
) -> Iterator[dict[str, Tensor]]:
    """Give the batch of each piece of each step, the next one being read meanwhile."""

    def read(place: tuple[int, tuple[slice, int]]) -> dict[str, Tensor]:
        step, (rows, _) = place
        return data.batch(items, seed=settings.seed, step=step, rows=rows, global_batch=settings.data.batch_size)

    return data.read_ahead(
        read, itertools.product(steps, cut_batch(settings.data.batch_size, settings.data.micro_batch, ranks))
    )


def accumulate_gradient(
    network: nn.Module,
    scaler: torch.amp.GradScaler,
    batches: Iterator[dict[str, Tensor]],
    encoder: Encoder | None,
    step: int,
    settings: Config,
    ranks: launch.Launch,
) -> dict[str, float]:
    """Leave the gradient of the global batch's mean loss in the parameters, and return its parts."""
    network.train()
    batch_size, shares = settings.data.batch_size, ranks.world_size
    mine = cut_batch(batch_size, settings.data.micro_batch, ranks)
    drawn = draw((TRAINING, settings.seed, step), batch_size, settings.model.input_shape, settings.objective)
    totals = 0  # then (2,): of the denoising and the projection loss
    for number, (rows, count) in enumerate(mine, start=1):
        batch = data.move(next(batches), ranks.device)
        draws = Draws(*(each[rows].to(ranks.device) for each in drawn))
        with synchronizing(network, number == len(mine)):  # the ranks' gradients meet once a step
            losses = losses_of(network, batch, draws, encoder, settings, ranks)
            parts = torch.stack([each.mean() for each in losses]) * (count * shares / batch_size)
            loss = parts[0] + settings.objective.projection_weight * parts[1]
            scaler.scale(loss).backward()
        totals = totals + parts.detach()
    denoising, projection = launch.all_reduce_sum((totals / shares).tolist(), ranks)
    loss = denoising + settings.objective.projection_weight * projection
    return {"train/loss": loss, "train/denoising_loss": denoising, "train/projection_loss": projection}


@torch.no_grad()
def evaluate(
    average: nn.Module, items: data.Items, encoder: Encoder | None, settings: Config, ranks: launch.Launch
) -> dict[str, float]:
    """Return the losses of the averaged model on the validation images, with noise and times that stay the same."""
    count = min(settings.eval.images, len(items))
    drawn = draw((VALIDATION,), count, items.shape, settings.objective)
    drawn = drawn._replace(dropped=torch.zeros_like(drawn.dropped))
    together = settings.data.micro_batch * ranks.world_size
    totals = torch.zeros(2, dtype=torch.float64)
    for start in range(0, count, together):
        mine = list(range(start, min(start + together, count)))[ranks.rank :: ranks.world_size]
        rows = mine or [0]  # FSDP needs every rank in every pass
        batch = data.move(data.take(items, rows, seed=0), ranks.device)
        draws = Draws(*(each[rows].to(ranks.device) for each in drawn))
        losses = losses_of(average, batch, draws, encoder, settings, ranks)
        totals += torch.stack([each.mean() for each in losses]).double().cpu() * len(mine)
    denoising, projection = (total / count for total in launch.all_reduce_sum(totals.tolist(), ranks))
    loss = denoising + settings.objective.projection_weight * projection
    return {"val/loss": loss, "val/denoising_loss": denoising, "val/projection_loss": projection}


def speed(medians: tuple[float, float], settings: Config, ranks: launch.Launch) -> dict[str, float]:
    """Return what people watch: times, images a second, and memory."""
    step_ms, optimizer_ms = medians
    metrics = {"step_ms": step_ms, "optimizer_ms": optimizer_ms}
    metrics["images_per_second"] = settings.data.batch_size / step_ms * 1000
    return metrics | {"peak_memory_mb": launch.peak_memory_mb(ranks.device)}


def same_experiment(saved: dict | None, settings: Config) -> None:
    """Refuse to resume with another model, data or optimizer than the checkpoint's; length and logs may change."""
    if saved is None:
        return
    # eval.images decides what is left to train on; the rate is in the run's name; folders may have been moved.
    names = ("clip", "dtype", "ema", "eval.images", "model", "data", "objective", "optimizer", "schedule")
    but = ("data.folder", "data.micro_batch", "data.on_corrupt", "data.vae", "objective.encoder_folder")
    but += ("optimizer.lr", "optimizer.tuned_lr")
    config.refuse_changes(saved["config"], config.to_dict(settings), names, but)


if __name__ == "__main__":
    launch.main_guard(main)
