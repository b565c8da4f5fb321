"""What of a Llama config cannot work, each refused in one line before any data is touched."""

import math
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from common import UserError
from common.config import ConfigError, at_least
from Llama.cpu import CPU, on_cpu
from Llama.model import FLAVORS, Llama, Shape
from Llama.templates import FINE_TUNING, TEMPLATES

if TYPE_CHECKING:
    from torchtitan.config.job_config import LRScheduler

    from Llama.config import JobConfig, Model

TEXTS = ("c4", "c4_validation", "text")  # the second is torchtitan's name for a part of the first
BYTES_A_PARAMETER = 12  # of a run on CPUs: weight, gradient and one momentum in float32; AdamW has another

# What torchtitan reads and this repository does not, with what stands in its place.
NOT_READ = {
    "job.config_file": "name the file itself, before the flags",
    "job.custom_config_module": "Llama/config.py is the config",
    "experimental.custom_args_module": "Llama/config.py is the config",
    "metrics.enable_wandb": "set metrics.wandb",
    "model.tokenizer_path": "set model.hf_assets_path",
    "training.dataloader": "batches are made in the training process",
    "validation.dataloader": "windows are read once, before training",
    "validation.steps": "set validation.windows",
    "fault_tolerance.enable": "checkpoints resume on another number of ranks",
    "memory_estimation.enable": "python -m scripts.plan counts bytes",
    "parallelism.expert_parallel_degree": "no Llama here has experts",
    "parallelism.expert_tensor_parallel_degree": "no Llama here has experts",
    "checkpoint.create_seed_checkpoint": "weights at the start do not depend on the layout",
    "checkpoint.folder": "checkpoints are in the run's folder, in checkpoint/",
    "checkpoint.initial_load_in_hf": "checkpoint.initial_load_path tells by its files",
    "checkpoint.initial_load_in_hf_quantized": "quantized weights are not trained here",
    "checkpoint.last_save_in_hf": "export with python -m Llama.weights, and keep what can be resumed",
}


def check_data(settings: "JobConfig") -> None:
    """Refuse data sets that do not exist, or not for this."""
    training, validation = settings.training, settings.validation
    kinds = FINE_TUNING if is_fine_tuning(settings) else TEXTS
    for name, value, names in [
        ("training.dataset", training.dataset, (*TEXTS, *FINE_TUNING)),
        ("validation.dataset", validation.dataset or training.dataset, kinds),
        ("validation.pretrain_dataset", validation.pretrain_dataset or "text", TEXTS),
    ]:
        if value not in names:
            raise ConfigError(f"{name} must be one of {', '.join(names)}; got {value!r}")
    if validation.pretrain_dataset and not is_fine_tuning(settings):
        raise ConfigError(
            f"validation.pretrain_dataset is for fine-tuning; training.dataset is {training.dataset!r}: leave it out"
        )
    if settings.fine_tuning.template not in TEMPLATES:
        names = ", ".join(TEMPLATES)
        raise ConfigError(f"fine_tuning.template must be one of {names}; got {settings.fine_tuning.template!r}")
    if settings.fine_tuning.packing and not is_fine_tuning(settings):
        raise ConfigError("fine_tuning.packing is for instructions; texts are always packed, leave it out")


def check_unread(settings: "JobConfig", defaults: "JobConfig") -> None:
    """Refuse what is set, and would be read by nothing."""
    for name, instead in NOT_READ.items():
        section, key = name.split(".")
        if getattr(getattr(settings, section), key) != getattr(getattr(defaults, section), key):
            raise ConfigError(f"{name} must be left out, since nothing here reads it; {instead}")


def check_steps(settings: "JobConfig") -> None:
    """Refuse numbers of steps that torchtitan would stumble over."""
    at_least(1, settings.checkpoint, "interval")
    at_least(1, settings.metrics, "log_freq")
    at_least(1, settings.training, "gc_freq")
    planned, steps = settings.lr_scheduler.total_steps, settings.training.steps
    if planned is not None and planned < steps:
        raise ConfigError(
            f"lr_scheduler.total_steps must be training.steps {steps} or more, or left out; got {planned}: the rate "
            "would fall below zero"
        )
    if settings.checkpoint.keep_latest_k < 0 or settings.checkpoint.keep_latest_k == 1:
        raise ConfigError(
            "checkpoint.keep_latest_k must be 0, which keeps all, or 2 and more; got "
            f"{settings.checkpoint.keep_latest_k}: one is being written"
        )
    if settings.checkpoint.load_step != -1 and not settings.job.resume:
        raise ConfigError(
            f"checkpoint.load_step needs job.resume, without which an earlier run is moved aside; got "
            f"{settings.checkpoint.load_step} alone"
        )
    if settings.comm.mode == "local_tensor":
        raise ConfigError("comm.mode must be default or fake_backend; got 'local_tensor', which does not train")
    check_schedule(settings.lr_scheduler, planned or steps)


def check_schedule(schedule: "LRScheduler", steps: int) -> None:
    """Refuse a schedule with rates outside zero and the peak, or with a warm-up that never ends."""
    if not 0 <= schedule.warmup_steps <= steps:
        raise ConfigError(f"lr_scheduler.warmup_steps must be between 0 and {steps} steps; got {schedule.warmup_steps}")
    for name in ("decay_ratio", "min_lr_factor"):
        value = getattr(schedule, name)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"lr_scheduler.{name} must be a fraction, between 0 and 1; got {value}")


def check_numbers(settings: "JobConfig") -> None:
    """Refuse numbers that are not finite, gradient norms below zero, and seeds that not every generator takes."""
    for section, values in asdict(settings).items():
        for key, value in values.items() if isinstance(values, dict) else ():
            numbers = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise ConfigError(f"{section}.{key} must be finite; got {value}")
    at_least(0, settings.training, "max_norm")
    if not 0 <= settings.debug.seed < 2**63:
        raise ConfigError(f"debug.seed must be between 0 and 2**63 - 1; got {settings.debug.seed}")


def check_device(settings: "JobConfig") -> None:
    """Refuse what torchtitan does on GPUs alone, or what is not tested here."""
    profiling, training = settings.profiling, settings.training
    if settings.checkpoint.async_mode not in ("disabled", "async"):
        raise ConfigError(
            f"checkpoint.async_mode must be disabled or async; got {settings.checkpoint.async_mode!r}, whose process "
            "of its own is not tested here"
        )
    if training.enable_cpu_offload:
        raise ConfigError("training.enable_cpu_offload must be false: the optimizers step where the model computes")
    for key in ("enable_profiling", "enable_memory_snapshot"):
        if getattr(profiling, key) and on_cpu():
            raise ConfigError(f"profiling.{key} needs a GPU, whose events torchtitan records; leave it out")
    at_least(1, profiling, "profile_freq", "profiler_active")
    at_least(0, profiling, "profiler_warmup")
    cycle = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < cycle:
        raise ConfigError(
            f"profiling.profile_freq must be profiler_warmup + profiler_active, {cycle} steps, or more; got "
            f"{profiling.profile_freq}"
        )


def environment() -> tuple[int, int]:
    """Return this process's rank and the number of ranks, as torchrun names them, or (0, 1) without any of the names.

    Raises UserError where one is missing, which would leave this process waiting for others, or is no number.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    there = {name: os.environ[name] for name in names if name in os.environ}
    if not there:
        return 0, 1
    for name in names:
        if not there.get(name, "").isdecimal():
            raise UserError(
                f"torchrun sets {', '.join(names)}, each a number; {name} is {there.get(name, 'missing')!r} and "
                f"{next(iter(there))} is set: start with torchrun (bash Llama/run.sh), or unset them all"
            )
    rank, ranks = int(there["RANK"]), int(there["WORLD_SIZE"])
    if rank >= ranks:
        raise UserError(f"RANK must be below WORLD_SIZE {ranks}; got {rank}: start with torchrun (bash Llama/run.sh)")
    return rank, ranks


def is_fine_tuning(settings: "JobConfig") -> bool:
    """Whether the data are instructions, and not text."""
    return settings.training.dataset in FINE_TUNING


def shape_of(model: "Model") -> Shape:
    """Return the shape that a config names; ConfigError where it names none."""
    if model.name not in FLAVORS:
        raise ConfigError(f"model.name must be one of {', '.join(FLAVORS)}; got {model.name!r}")
    flavors = FLAVORS[model.name]
    if model.flavor not in flavors:
        raise ConfigError(f"model.flavor must be one of {', '.join(flavors)} for {model.name}; got {model.flavor!r}")
    return flavors[model.flavor]


def check_flavor(settings: "JobConfig") -> None:
    """Refuse a model that does not exist, or that is too large for a machine without GPUs."""
    shape = shape_of(settings.model)
    if not on_cpu() or settings.comm.mode != "default":
        return
    with torch.device("meta"):
        count = sum(param.numel() for param in Llama(shape).parameters())
    needed, there = count * BYTES_A_PARAMETER / 1e9, CPU.get_device_properties().total_memory / 1e9
    if needed > there:
        raise ConfigError(
            f"{settings.model.name} {settings.model.flavor} needs about {needed:,.0f} GB for weights, gradients and "
            f"momentum; this machine has no GPU and {there:,.0f} GB of memory: use GPUs, or run the small one, bash "
            "Llama/run.sh"
        )


def data_ranks(settings: "JobConfig", world_size: int) -> int:
    """Return the number of ranks that see different sequences; ConfigError where the parallelism does not fit."""
    parallelism = settings.parallelism
    if parallelism.pipeline_parallel_degree > 1:
        raise ConfigError(
            f"pipeline_parallel_degree must be 1, got {parallelism.pipeline_parallel_degree}: torchtitan 0.2.2's "
            "pipelines leave gradients as sums over tokens, which clipping then cuts down; use FSDP and tensor degrees"
        )
    if parallelism.context_parallel_degree > 1:
        raise ConfigError(
            f"context_parallel_degree must be 1, got {parallelism.context_parallel_degree}: it is not tested here, and "
            "4,096 tokens fit a GPU; use FSDP and tensor degrees"
        )
    at_least(1, parallelism, "tensor_parallel_degree", "data_parallel_replicate_degree")
    model_ranks, shape = parallelism.tensor_parallel_degree, shape_of(settings.model)
    heads, length = shape.n_kv_heads or shape.n_heads, settings.training.seq_len
    if length % 2:
        raise ConfigError(f"training.seq_len must be even, as torchtitan cuts it; got {length}")
    if heads % model_ranks or (model_ranks > 1 and length % (2 * model_ranks)):
        raise ConfigError(
            f"tensor_parallel_degree must divide the {heads} key and value heads, and half of training.seq_len {length}"
            f"; got {model_ranks}"
        )
    replicas, shards = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    if world_size % model_ranks:
        raise ConfigError(f"tensor_parallel_degree must divide the {world_size} ranks; got {model_ranks}")
    ranks = world_size // model_ranks
    wanted = replicas * shards if shards > 0 else ranks // replicas * replicas
    if wanted != ranks:
        raise ConfigError(
            f"[parallelism] must use the {world_size} ranks there are; data_parallel_replicate_degree {replicas} and "
            f"data_parallel_shard_degree {shards} make {wanted} of {ranks}; set NGPU or the degrees (-1: what is left)"
        )
    if model_ranks > 1 and replicas > 1 and replicas == ranks:
        raise ConfigError(
            f"data_parallel_shard_degree must be above 1 beside tensor_parallel_degree {model_ranks}: torchtitan "
            "replicates no tensor-parallel model without FSDP"
        )
    return ranks


def check_batches(settings: "JobConfig", ranks: int) -> None:
    """Refuse batches, lanes and validation windows that the data-parallel ranks cannot share evenly."""
    training = settings.training
    for name, value in [
        ("training.global_batch_size", training.global_batch_size),
        ("training.lanes", 0 if is_fine_tuning(settings) else training.lanes),
        ("validation.windows", settings.validation.windows),
    ]:
        if value % ranks:
            raise ConfigError(f"{name} must be a multiple of the {ranks} data-parallel ranks; got {value}; or set NGPU")
