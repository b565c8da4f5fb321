"""Train a GPT-2 with one of the optimizers, on one device or, under torchrun, on several with DDP, FSDP or HSDP.

    python -m nanoGPT.train nanoGPT/configs/stdlib.toml --optimizer.name muon --optimizer.lr 8e-3
    torchrun --standalone --nproc-per-node 8 -m nanoGPT.train nanoGPT/configs/gpt2_small.toml
    torchrun ... -m nanoGPT.train nanoGPT/configs/gpt2_xl.toml --parallel.mode fsdp    (or hsdp, --parallel.shard 4)
    torchrun ... -m nanoGPT.train nanoGPT/configs/gpt2_small.toml --parallel.mode owners    (half of DDP's bytes)
    python -m nanoGPT.train nanoGPT/configs/stdlib.toml --resume

The run's folder, runs/nanogpt/GROUP/NAME, holds metrics.jsonl, config.json, checkpoints/ and wandb/. On a CPU a resumed
run matches an uninterrupted one bit for bit.
"""

from common.config import parse_config
from common.guard import main_guard
from nanoGPT.config import Config, GPTOptimizerConfig

if __name__ == "__main__":  # --help and errors before the imports below, which take seconds
    main_guard(lambda: parse_config(Config))

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from common import UserError, config, gpu, launch
from common.parallel import autocast, clip_gradient, cut_batch, destination, distribute, precision, synchronizing
from common.run import Run, execute
from nanoGPT import data
from nanoGPT.model import GPT
from optimizers import Probe, RuleOptimizer, build_optimizer, count_bytes
from optimizers.build import Gradients, check_name


def main() -> None:
    """Read the configuration and train."""
    execute(train, fit_vocabulary(parse_config(Config)))


def train(settings: Config, process: launch.Process) -> bool:
    """Train until `settings.steps` or a stop request; returns whether all steps were taken."""
    for name in (settings.optimizer.name, *settings.optimizer.tuned_lr):
        check_name(name)  # an unknown one fails before any data is read
    settings.optimizer.peak_lr()
    corpus = open_corpus(settings, process)
    launch.refuse_differences(
        {"config": config.to_dict(settings), "corpus": data.read_meta(settings.data.folder)}, process
    )
    launch.seed_all(settings.seed)
    model, network = build_model(settings, process)
    optimizer = build(settings.optimizer, network, destination(settings.parallel, process))
    watch = Probe(optimizer, model=model, **settings.probe.options())
    launch.seed_all(settings.seed + process.rank)  # after the weights: dropout differs between ranks
    if optimizer.searches and precision(settings.dtype, process) == torch.float16:
        raise UserError(
            "line_search needs float32 or bfloat16, got float16, whose GradScaler takes no closure; set dtype"
        )
    scaler = torch.amp.GradScaler(process.device.type, enabled=precision(settings.dtype, process) == torch.float16)
    run = Run(
        settings,
        process,
        experiment="nanogpt",
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        unit="tokens",
        units_per_step=settings.data.batch_size * settings.model.context,
        fixed=("clip", "dtype", "init_from", "model", "data", "optimizer", "schedule"),
        free=("data.micro_batch", "optimizer.lr", "optimizer.tuned_lr"),  # the rate is in the run's name
    )
    with run:
        if run.step == 0:
            state = {"optimizer_state_mb": optimizer.state_size() / 1e6}
            run.log(state | evaluate(network, corpus["val"], settings, process))
        batches = read_batches(corpus["train"], range(run.step, settings.steps), settings, process)
        for step in run.steps():
            batch = list(islice(batches, len(cut_batch(settings.data.batch_size, settings.data.micro_batch, process))))
            loss = accumulate_gradient(network, scaler, batch, settings, process)
            scaler.unscale_(optimizer)
            norm = clip_gradient(model, settings.clip or math.inf)
            (loss,), norm = run.read(loss, norm)

            metrics = watch(step + 1)  # measures the weights before this step; not timed
            run.timer.optimizer()
            with count_bytes() as traffic:
                if run.accepts(loss, norm):
                    again = evaluations(loss, network, batch, settings, process)
                    scaler.step(optimizer, *([again.__next__] if optimizer.searches else []))
            scaler.update()
            optimizer.zero_grad()
            run.count_step()

            if run.is_due(settings.log_every):
                metrics |= {"train/loss": loss, **run.measurements()}
                metrics |= optimizer.line_search.metrics() if optimizer.line_search else {}
                metrics |= utilization(metrics["tokens_per_second"], model, process)
                if process.world_size > 1:
                    metrics["optimizer_mb_received"] = traffic.total_received / 1e6
            if run.is_due(settings.eval.every):
                metrics |= evaluate(network, corpus["val"], settings, process)
            run.log(metrics)
            run.save_if_due()
    return run.finished


def fit_vocabulary(settings: Config) -> Config:
    """Replace a vocabulary of 0 by the corpus', padded."""
    meta = data.read_meta(settings.data.folder)
    return replace(settings, model=data.fit_vocabulary(settings.model, meta))


def open_corpus(settings: Config, process: launch.Process) -> dict[str, data.TokenFile]:
    """Open both splits, checked against the model and the batch."""
    if settings.data.batch_size < process.world_size:
        raise UserError(
            f"data.batch_size must be a sequence per rank or more, for {process.world_size} ranks; "
            f"got {settings.data.batch_size}; raise it, or start fewer (NGPU)"
        )
    verify = process.local_rank == 0  # once per machine: each may have its own copy
    corpus = {split: data.load(settings.data.folder, split, verify=verify) for split in ("train", "val")}
    for tokens in corpus.values():
        data.check_length(tokens, settings.model.context)
    data.check_vocabulary(data.read_meta(settings.data.folder), settings.model.vocab_size)
    return corpus


def build_model(settings: Config, process: launch.Process) -> tuple[GPT, nn.Module]:
    """Return the model, and the network to train: the model, compiled and distributed as configured."""
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, for fp32 operations under autocast
    torch.set_flush_denormal(True)  # saturated attention is subnormal: at too high a rate CPU steps took twice as long
    if settings.init_from:  # its weights may be stored in half precision
        model = GPT.from_huggingface(settings.init_from, dropout=settings.model.dropout).float()
    else:
        model = GPT(settings.model)
    if settings.init_from and model.config != settings.model:
        raise UserError(f"[model] must describe {settings.init_from}: {model.config}; got {settings.model}")
    dtype = precision(settings.dtype, process)
    if dtype == torch.float64:
        model = model.double()
    return model, distribute(model, settings.parallel, process, dtype, settings.compile)


def build(settings: GPTOptimizerConfig, network: nn.Module, gradients: Gradients = "all_reduced") -> RuleOptimizer:
    """Build the optimizer; the rule refuses unknown options."""
    blocks = {"*.c_attn.weight": 3} if settings.split_qkv else None
    return build_optimizer(network, settings.name, qkv_split=blocks, gradients=gradients, **settings.arguments())


def read_batches(
    tokens: data.TokenFile, steps: range, settings: Config, process: launch.Process
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets (b, T) of each micro-batch of each step; a thread reads ahead."""
    batch_size = settings.data.batch_size
    return data.read_batches(
        tokens,
        steps,
        [sequences for sequences, _ in cut_batch(batch_size, settings.data.micro_batch, process)],
        seed=settings.seed,
        global_batch=batch_size,
        context=settings.model.context,
        device=process.device,
    )


def accumulate_gradient(
    network: nn.Module,
    scaler: torch.amp.GradScaler,
    batch: list[tuple[Tensor, Tensor]],
    settings: Config,
    process: launch.Process,
) -> Tensor:
    """Accumulate the gradient of the global batch's mean loss; returns this rank's share of that loss, ().

    batch: inputs and targets (b, T) of each micro-batch of this rank.
    """
    network.train()
    batch_size, shares = settings.data.batch_size, process.world_size
    mine = cut_batch(batch_size, settings.data.micro_batch, process)
    total = 0.0  # becomes a tensor of the loss's dtype: a float32 zero would round the losses of a float64 run
    for number, ((_, count), (inputs, targets)) in enumerate(zip(mine, batch, strict=True), start=1):
        with synchronizing(network, number == len(mine)):  # gradients are reduced once per step
            with autocast(precision(settings.dtype, process), process):
                _, loss = network(inputs, targets)
            loss = loss * (count * shares / batch_size)  # DDP and FSDP average gradients over ranks
            scaler.scale(loss).backward()
        total += loss.detach()
    return total / shares


def evaluations(
    loss: float, network: nn.Module, batch: list[tuple[Tensor, Tensor]], settings: Config, process: launch.Process
) -> Iterator[float]:
    """Yield a known loss, then, for a search, this rank's mean loss of the batch at the weights of the moment."""
    yield loss
    counts = [count for _, count in cut_batch(settings.data.batch_size, settings.data.micro_batch, process)]
    while True:
        total = 0.0
        for count, (inputs, targets) in zip(counts, batch, strict=True):
            with torch.no_grad(), autocast(precision(settings.dtype, process), process):
                total += network(inputs, targets)[1].item() * count
        yield total * process.world_size / settings.data.batch_size


@torch.no_grad()
def evaluate(network: nn.Module, tokens: data.TokenFile, settings: Config, process: launch.Process) -> dict[str, float]:
    """Return the mean loss over the validation windows, divided among ranks, in nats per token and in bits per byte."""
    network.eval()
    context = settings.model.context
    offsets = data.validation_windows(tokens, count=settings.eval.windows, context=context)
    together = settings.data.micro_batch * process.world_size
    total = 0.0
    for start in range(0, len(offsets), together):
        mine = offsets[start : start + together][process.rank :: process.world_size]
        taken = mine if len(mine) else offsets[:1]  # FSDP needs every rank in every pass
        inputs, targets = data.windows(tokens, taken, context, process.device)
        with autocast(precision(settings.dtype, process), process):
            _, loss = network(inputs, targets)
        total += loss.item() * len(mine)
    loss = launch.all_reduce_sum([total], process)[0] / len(offsets)
    return {"val/loss": loss, "val/bits_per_byte": loss / math.log(2) / tokens.bytes_per_token}


def utilization(tokens_per_second: float, model: GPT, process: launch.Process) -> dict[str, float]:
    """Return the model's share of the devices' peak FLOPS (MFU), if that peak is known."""
    peak = gpu.peak_flops(torch.cuda.get_device_name(process.device)) if process.device.type == "cuda" else None
    return {"mfu": tokens_per_second * model.flops_per_token() / (peak * process.world_size)} if peak else {}


if __name__ == "__main__":
    main_guard(main)
