"""Train a GPT-2 with one of the optimizers, on one device or, under torchrun, on many with DDP, FSDP or HSDP.

    python -m nanoGPT.train nanoGPT/configs/stdlib.toml --optimizer.name muon --optimizer.lr 8e-3
    torchrun --standalone --nproc-per-node 8 -m nanoGPT.train nanoGPT/configs/gpt2_small.toml
    torchrun ... -m nanoGPT.train nanoGPT/configs/gpt2_xl.toml --parallel.mode fsdp    (or hsdp, --parallel.shard 4)
    python -m nanoGPT.train nanoGPT/configs/stdlib.toml --resume

The run's folder, runs/nanogpt/GROUP/NAME, holds metrics.jsonl, config.json, checkpoints/ and wandb/. On a CPU a resumed
run repeats, bit for bit, what it would have done uninterrupted.
"""

import math
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from common import UserError, checkpoint, config, launch, progress
from common.checkpoint_folder import CheckpointConfig
from common.config import at_least
from common.optimizer_config import OptimizerConfig
from common.parallel import ParallelConfig, autocast, clip_gradient, cut_batch, distribute, precision, synchronizing
from common.runlog import RunLog, end_if_diverged, move_aside, run_name, write_end
from common.schedule import ScheduleConfig, multiplier
from common.timer import Timer
from nanoGPT import data
from nanoGPT.model import GPT, GPTConfig
from optimizers import RuleOptimizer, build_optimizer, count_bytes
from optimizers.rule import rule_named

# Dense bf16 peaks of NVIDIA's data sheets, for MFU.
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}


@dataclass(frozen=True)
class DataConfig:
    """The corpus and how it is cut."""

    folder: str = "data/openwebtext"
    """Folder that `python -m nanoGPT.prepare` wrote."""
    batch_size: int = 480
    """Sequences a step, over all ranks and micro-batches: 480 x 1,024 tokens in the paper."""
    micro_batch: int = 40
    """Most sequences that one rank takes through the model at once; lower it if memory runs out, the result stays."""

    def __post_init__(self):
        at_least(1, self, "batch_size", "micro_batch")


@dataclass(frozen=True)
class Optimizer(OptimizerConfig):
    """The optimizer, and what it is told about a GPT-2."""

    split_qkv: bool = False
    """Orthogonalize the query, key and value blocks of the fused weight apart; lion and adamw have nothing to split."""


@dataclass(frozen=True)
class EvalConfig:
    """Validation, always on the same windows."""

    every: int = 500
    """Steps between validations; there is one at step 0 and one at the end."""
    windows: int = 1000
    """Windows of one context each, evenly spaced over val.bin."""

    def __post_init__(self):
        at_least(1, self, "every", "windows")


@dataclass(frozen=True)
class Config:
    """Every knob of a run; the defaults are the paper's GPT-2 small on OpenWebText."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    steps: int = 20_000
    """Optimizer steps."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0 leaves it as it is."""
    init_from: str = ""
    """A Hugging Face GPT-2 to start from ("gpt2", "gpt2-medium", a folder); empty is a random start."""
    seed: int = 1337
    """Seeds the weights and, with the step, the batches."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """What the model computes in, its weights staying float32; auto is bfloat16 on GPUs and float32 elsewhere. float64
    is for comparing layouts: weights and all are in it, and what then differs between two runs is no rounding."""
    compile: bool = False
    """Run the model through torch.compile: a minute of compiling, then faster steps on a GPU."""
    log_every: int = 10
    """Steps between lines of metrics."""
    group: str = "default"
    """Folder of the run under runs/nanogpt, and its group in Weights & Biases."""
    out: str = "runs/nanogpt"
    """Folder of all runs."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases: auto is online with a login, else offline (`wandb sync` uploads it later)."""
    resume: bool = False
    """Continue from the newest checkpoint of this run; without it, an earlier run's folder is moved aside."""

    def __post_init__(self):
        at_least(1, self, "steps", "log_every")
        at_least(0, self, "clip")


def main() -> None:
    """Read the configuration and train."""
    settings = fit_vocabulary(config.parse_config(Config))
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
    launch.seed_all(settings.seed)
    corpus = open_corpus(settings, ranks)
    model, network = build_model(settings, ranks)
    optimizer = build(settings.optimizer, network)
    peaks = [group["lr"] for group in optimizer.param_groups]
    launch.seed_all(settings.seed + ranks.rank)  # the weights are drawn; dropout differs from rank to rank
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=precision(settings.dtype, ranks) == torch.float16)

    step, skipped, in_a_row = 0, 0, 0
    if settings.resume:
        same_experiment(launch.on_main(lambda: checkpoint.read_extra(folder / "checkpoints")), settings)
        if saved := checkpoint.load(folder / "checkpoints", model, optimizer):
            step, skipped, in_a_row = saved["step"], saved["skipped"], saved["in_a_row"]
            scaler.load_state_dict(saved["scaler"])
        elif ranks.is_main:
            print(f"no checkpoint in {folder}: starting at step 0")
    if step == 0 and ranks.is_main:
        move_aside(folder)
    runlog = RunLog(
        folder,
        config=config.to_dict(settings),
        experiment="nanogpt",
        name=name,
        group=settings.group,
        tags=[settings.optimizer.name],
        wandb_mode=settings.wandb,
        resume_step=step or None,
        is_main=ranks.is_main,
    )
    if step == 0:
        first = {"tokens": 0, "optimizer_state_mb": optimizer.state_size() / 1e6}
        runlog.log(0, first | evaluate(network, corpus["val"], settings, ranks))

    timer = Timer(ranks.device)
    bar = progress(total=settings.steps, initial=step, desc=name, is_main=ranks.is_main)
    with bar, launch.StopRequest() as stop:
        asked, shown = False, {}
        while step < settings.steps and not asked:
            timer.start()
            rate = multiplier(step, steps=settings.steps, **vars(settings.schedule))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate
            loss = accumulate_gradient(network, scaler, corpus["train"], step, settings, ranks)
            scaler.unscale_(optimizer)
            norm = clip_gradient(model, settings.clip or math.inf)

            timer.optimizer()
            with count_bytes() as traffic:
                if math.isfinite(norm) and math.isfinite(loss):
                    scaler.step(optimizer)
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
                metrics = {"train/loss": loss, "lr": lr * rate, "grad_norm": norm, "skipped": skipped}
                metrics |= speed(timer.medians(), model, settings, ranks)
                if ranks.world_size > 1:
                    metrics["optimizer_mb_received"] = traffic.total_received / 1e6
            if step % settings.eval.every == 0 or last:
                metrics |= evaluate(network, corpus["val"], settings, ranks)
            if metrics:
                runlog.log(step, {"tokens": step * settings.data.batch_size * settings.model.context, **metrics})
                shown |= {key: f"{metrics[key]:.4f}" for key in ("train/loss", "val/loss") if key in metrics}
                bar.set_postfix(shown, refresh=False)
            asked = stop.agreed(ranks)
            if settings.checkpoint.every and (step % settings.checkpoint.every == 0 or last or asked):
                extra = {"config": config.to_dict(settings), "scaler": scaler.state_dict()}
                extra |= {"skipped": skipped, "in_a_row": in_a_row}
                checkpoint.save(folder / "checkpoints", step, model, optimizer, extra, settings.checkpoint.keep)
            if last and ranks.is_main:
                write_end(folder, step, metrics)
            bar.update()
    runlog.finish()
    if step < settings.steps and ranks.is_main:
        after = "the same command with --resume continues" if settings.checkpoint.every else "checkpoints are off"
        print(f"stopped at step {step} of {settings.steps}; {after}")
    return step >= settings.steps


def fit_vocabulary(settings: Config) -> Config:
    """Give a model of vocabulary 0 the corpus', padded."""
    meta = data.read_meta(settings.data.folder)
    return replace(settings, model=data.fit_vocabulary(settings.model, meta))


def open_corpus(settings: Config, ranks: launch.Launch) -> dict[str, data.TokenFile]:
    """Open both splits, checked against the model and the batch."""
    if settings.data.batch_size < ranks.world_size:
        raise UserError(
            f"data.batch_size must be a sequence a rank or more, for {ranks.world_size} ranks; "
            f"got {settings.data.batch_size}; raise it or set NGPU"
        )
    verify = ranks.local_rank == 0  # one a machine: each may have its own copy
    corpus = {split: data.load(settings.data.folder, split, verify=verify) for split in ("train", "val")}
    for tokens in corpus.values():
        data.check_length(tokens, settings.model.context)
    data.check_vocabulary(data.read_meta(settings.data.folder), settings.model.vocab_size)
    return corpus


def build_model(settings: Config, ranks: launch.Launch) -> tuple[GPT, nn.Module]:
    """Return the model, and the network that trains it: the model compiled and distributed, as asked."""
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, for what autocast leaves in fp32
    torch.set_flush_denormal(True)  # saturated attention is subnormal: at too high a rate CPU steps took twice as long
    if settings.init_from:  # the weights may be stored in half precision
        model = GPT.from_huggingface(settings.init_from, dropout=settings.model.dropout).float()
    else:
        model = GPT(settings.model)
    if settings.init_from and model.config != settings.model:
        raise UserError(f"[model] must describe {settings.init_from}: {model.config}; got {settings.model}")
    dtype = precision(settings.dtype, ranks)
    if dtype == torch.float64:
        model = model.double()
    return model, distribute(model, settings.parallel, ranks, dtype, settings.compile)


def build(settings: Optimizer, network: nn.Module) -> RuleOptimizer:
    """Build the optimizer; every option that is set reaches the rule, which refuses what it does not have."""
    blocks = {"*.c_attn.weight": 3} if settings.split_qkv else None
    return build_optimizer(network, settings.name, qkv_split=blocks, **settings.options())


def accumulate_gradient(
    network: nn.Module,
    scaler: torch.amp.GradScaler,
    tokens: data.TokenFile,
    step: int,
    settings: Config,
    ranks: launch.Launch,
) -> float:
    """Leave the gradient of the global batch's mean loss in the parameters, and return that loss."""
    network.train()
    batch_size, shares = settings.data.batch_size, ranks.world_size
    mine = cut_batch(batch_size, settings.data.micro_batch, ranks)
    total = 0.0  # becomes a tensor of the loss's own dtype: a float32 zero would round the losses of a float64 run
    for number, (sequences, count) in enumerate(mine, start=1):
        inputs, targets = data.batch(  # (b, T) each
            tokens,
            seed=settings.seed,
            step=step,
            sequences=sequences,
            global_batch=batch_size,
            context=settings.model.context,
            device=ranks.device,
        )
        with synchronizing(network, number == len(mine)):  # the ranks' gradients meet once a step
            with autocast(network, precision(settings.dtype, ranks), ranks):
                _, loss = network(inputs, targets)
            loss = loss * (count * shares / batch_size)  # the gradients' mean over the ranks is taken
            scaler.scale(loss).backward()
        total += loss.detach()
    return launch.all_reduce_sum([float(total) / shares], ranks)[0]


@torch.no_grad()
def evaluate(network: nn.Module, tokens: data.TokenFile, settings: Config, ranks: launch.Launch) -> dict[str, float]:
    """Return the mean loss in nats a token over the validation windows, which the ranks share, and in bits a byte."""
    network.eval()
    context = settings.model.context
    offsets = data.validation_windows(tokens, count=settings.eval.windows, context=context)
    together = settings.data.micro_batch * ranks.world_size
    total = 0.0
    for start in range(0, len(offsets), together):
        mine = offsets[start : start + together][ranks.rank :: ranks.world_size]
        taken = mine if len(mine) else offsets[:1]  # FSDP needs every rank in every pass
        inputs, targets = data.windows(tokens, taken, context, ranks.device)
        with autocast(network, precision(settings.dtype, ranks), ranks):
            _, loss = network(inputs, targets)
        total += loss.item() * len(mine)
    loss = launch.all_reduce_sum([total], ranks)[0] / len(offsets)
    return {"val/loss": loss, "val/bits_per_byte": loss / math.log(2) / tokens.bytes_per_token}


def speed(medians: tuple[float, float], model: GPT, settings: Config, ranks: launch.Launch) -> dict[str, float]:
    """Return what people watch: times, tokens a second, memory, and MFU where the device's peak is known."""
    step_ms, optimizer_ms = medians
    tokens_per_second = settings.data.batch_size * settings.model.context / step_ms * 1000
    metrics = {"step_ms": step_ms, "optimizer_ms": optimizer_ms, "tokens_per_second": tokens_per_second}
    metrics["peak_memory_mb"] = launch.peak_memory_mb(ranks.device)
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ""
    if peak := next((peak for name, peak in PEAK_TFLOPS.items() if name in device), None):
        metrics["mfu"] = tokens_per_second * model.flops_per_token() / (1e12 * peak * ranks.world_size)
    return metrics


def same_experiment(saved: dict | None, settings: Config) -> None:
    """Refuse to resume with another model, corpus or optimizer than the checkpoint's; length and logs may change."""
    if saved is None:
        return
    names = ("clip", "dtype", "init_from", "model", "data", "optimizer", "schedule")
    but = ("data.micro_batch", "optimizer.lr", "optimizer.tuned_lr")  # the rate is in the run's name
    config.refuse_changes(saved["config"], config.to_dict(settings), names, but)


if __name__ == "__main__":
    launch.main_guard(main)
