"""Checks of torchtitan's sections of a config: invalid values, and settings that nothing here reads."""

import dataclasses
import math
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from common.config import ConfigError
from Llama.cpu import on_cpu

if TYPE_CHECKING:
    from torchtitan.config.job_config import LRScheduler

    from Llama.config import JobConfig

# Settings and sections of torchtitan that nothing here reads -> the reason, or the setting to use instead.
NOT_READ = {
    "job.config_file": "name the file itself, before the flags",
    "job.custom_config_module": "Llama/options.py is the config",
    "experimental.custom_args_module": "Llama/options.py is the config",
    "metrics.enable_wandb": "set metrics.wandb",
    "model.tokenizer_path": "set model.hf_assets_path",
    "model.converters": "weights are trained in float32 or bfloat16",
    "model.print_after_conversion": "weights are trained in float32 or bfloat16",
    "quantize": "weights are trained in float32 or bfloat16",
    "training.dataloader": "a thread of the training process reads the batches",
    "validation.dataloader": "windows are read once, before training",
    "validation.steps": "set validation.windows",
    "fault_tolerance": "checkpoints resume on another number of ranks",
    "memory_estimation": "python -m scripts.plan counts bytes",
    "parallelism.expert_parallel_degree": "no Llama here has experts",
    "parallelism.expert_tensor_parallel_degree": "no Llama here has experts",
    "parallelism.expert_parallel_comm_backend": "no Llama here has experts",
    "debug.moe_force_load_balance": "no Llama here has experts",
    "parallelism.module_fqns_per_model_part": "there are no pipelines here",
    "parallelism.pipeline_parallel_first_stage_less_layers": "there are no pipelines here",
    "parallelism.pipeline_parallel_last_stage_less_layers": "there are no pipelines here",
    "parallelism.pipeline_parallel_layers_per_stage": "there are no pipelines here",
    "parallelism.pipeline_parallel_schedule": "there are no pipelines here",
    "parallelism.pipeline_parallel_schedule_csv": "there are no pipelines here",
    "parallelism.pipeline_parallel_microbatch_size": "there are no pipelines here",
    "parallelism.pipeline_parallel_expert_parallel_overlap": "there are no pipelines here",
    "parallelism.context_parallel_load_balancer": "sequences are not sharded here",
    "parallelism.context_parallel_rotate_method": "sequences are not sharded here",
    "checkpoint.create_seed_checkpoint": "initial weights do not depend on the layout",
    "checkpoint.enable_ft_dataloader_checkpoints": "checkpoints resume on another number of ranks",
    "checkpoint.folder": "checkpoints are in the run's folder, in checkpoint/",
    "checkpoint.initial_load_in_hf": "the files of checkpoint.initial_load_path decide it",
    "checkpoint.initial_load_in_hf_quantized": "quantized weights are not trained here",
    "checkpoint.initial_load_model_only": "to continue a run, set job.resume",
    "checkpoint.last_save_in_hf": "export with python -m Llama.weights; the checkpoint can then be resumed",
}
LEAST = {
    "checkpoint.interval": 1,
    "checkpoint.keep_latest_k": 0,
    "checkpoint.load_step": -1,
    "comm.init_timeout_seconds": 1,
    "comm.train_timeout_seconds": 1,
    "comm.trace_buf_size": 0,
    "debug.seed": 0,
    "fine_tuning.held_out": 0,
    "metrics.log_freq": 1,
    "parallelism.data_parallel_replicate_degree": 1,
    "parallelism.tensor_parallel_degree": 1,
    "profiling.profile_freq": 1,
    "profiling.profiler_active": 1,
    "profiling.profiler_warmup": 0,
    "training.gc_freq": 1,
    "training.max_norm": 0,
    "validation.local_batch_size": 0,
    "validation.seq_len": 0,
}
MOST = {"training.lanes": 2**16, "debug.seed": 2**63 - 1}  # the seed: every generator's limit
MOST_OF_ALL = 2**31 - 1  # of whole numbers: torchtitan saves its step as an int32
# torchtitan's names of a checkpoint's parts.
SAVED = ("model", "optimizer", "lr_scheduler", "dataloader", "train_state")


def check_sections(settings: "JobConfig", defaults: "JobConfig") -> None:
    """Raise ConfigError for settings that nothing reads, and for values that torchtitan cannot use."""
    check_unread(settings, defaults)
    check_numbers(settings)
    check_folders(settings)
    check_steps(settings)
    check_device(settings)
    check_graph(settings)


def check_unread(settings: "JobConfig", defaults: "JobConfig") -> None:
    """Raise ConfigError for settings that nothing reads."""
    default = flat(defaults)
    for key, value in flat(settings).items():
        name = next((name for name in NOT_READ if f"{key}.".startswith(f"{name}.")), None)
        if name and value != default[key]:
            raise ConfigError(f"{name} must be left out, since nothing here reads it; {NOT_READ[name]}")


def check_numbers(settings: "JobConfig") -> None:
    """Raise ConfigError for numbers that are not finite, or out of range."""
    for key, value in flat(settings).items():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        numbers = [each for each in values if isinstance(each, int | float) and not isinstance(each, bool)]
        for number in numbers:
            most = MOST.get(key, MOST_OF_ALL if isinstance(number, int) else math.inf)
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"{key} must be finite; got {number}")
            if not number >= LEAST.get(key, -math.inf):
                raise ConfigError(f"{key} must be {LEAST[key]} or more; got {number}")
            if number > most:
                raise ConfigError(f"{key} must be at most {most}; got {str(number)[:40]}")
    shards = settings.parallelism.data_parallel_shard_degree
    if shards < 1 and shards != -1:
        raise ConfigError(f"data_parallel_shard_degree must be 1 or more, or -1, the remaining ranks; got {shards}")


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a config of dataclasses: each setting is named "section.key"."""
    found = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        found |= flat(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


def check_folders(settings: "JobConfig") -> None:
    """Raise ConfigError for folders outside the runs' folder, and for texts with NUL."""
    for key, value in flat(settings).items():
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"{key} must be text without NUL; got {value!r:.60}")
    for key in ("job.group", "profiling.save_traces_folder", "profiling.save_memory_snapshot_folder"):
        path = PurePath(flat(settings)[key])
        if path.is_absolute() or not path.parts or ".." in path.parts:
            raise ConfigError(f"{key} must name a folder below the runs'; got {str(path)!r:.100}")


def check_steps(settings: "JobConfig") -> None:
    """Raise ConfigError for inconsistent numbers of steps."""
    planned, steps = settings.lr_scheduler.total_steps, settings.training.steps
    if planned is not None and planned < steps:
        raise ConfigError(
            f"lr_scheduler.total_steps must be training.steps {steps} or more, or left out; got {planned}: the rate "
            "would fall below zero"
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
    """Raise ConfigError for a schedule with rates below 0 or above the peak, or a warm-up that never ends."""
    if not 0 <= schedule.warmup_steps <= steps:
        raise ConfigError(
            f"lr_scheduler.warmup_steps must be between 0 and {steps} steps; got {schedule.warmup_steps}; "
            "set --lr_scheduler.warmup_steps, for instance to a tenth of them"
        )
    for name in ("decay_ratio", "min_lr_factor"):
        value = getattr(schedule, name)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"lr_scheduler.{name} must be a fraction, between 0 and 1; got {value}")


def check_device(settings: "JobConfig") -> None:
    """Raise ConfigError for features that need a GPU, or are not tested here."""
    profiling, training = settings.profiling, settings.training
    if settings.checkpoint.async_mode not in ("disabled", "async"):
        raise ConfigError(
            f"checkpoint.async_mode must be disabled or async; got {settings.checkpoint.async_mode!r}, which is not "
            "tested here"
        )
    if training.enable_cpu_offload:
        raise ConfigError("training.enable_cpu_offload must be false: the optimizers step where the model computes")
    for key in ("enable_profiling", "enable_memory_snapshot"):
        if getattr(profiling, key) and on_cpu():
            raise ConfigError(f"profiling.{key} needs a GPU, whose events torchtitan records; leave it out")
    cycle = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < cycle:
        raise ConfigError(
            f"profiling.profile_freq must be profiler_warmup + profiler_active, {cycle} steps, or more; got "
            f"{profiling.profile_freq}"
        )


def check_graph(settings: "JobConfig") -> None:
    """Raise ConfigError for settings that torchtitan would refuse only after building the model."""
    recompute, compiled, tensor = settings.activation_checkpoint, settings.compile, settings.parallelism
    every = recompute.selective_ac_option
    if every != "op" and not (every.isdecimal() and int(every) > 0):
        raise ConfigError(f"activation_checkpoint.selective_ac_option must be op, or a number of layers; got {every!r}")
    if not 0 <= recompute.memory_budget <= 1:
        raise ConfigError(f"activation_checkpoint.memory_budget must be between 0 and 1; got {recompute.memory_budget}")
    if recompute.determinism_check not in ("default", "none"):
        raise ConfigError(
            f"activation_checkpoint.determinism_check must be default or none; got {recompute.determinism_check!r}"
        )
    compiles = compiled.enable and "model" in compiled.components
    if recompute.mode == "memory_budget" and not compiles:
        raise ConfigError("activation_checkpoint.mode memory_budget needs compile.enable, whose compiler reads it")
    if tensor.enable_async_tensor_parallel and not (compiles and tensor.tensor_parallel_degree > 1):
        raise ConfigError("enable_async_tensor_parallel needs compile.enable and a tensor_parallel_degree above 1")
    for key, found, known in [
        ("compile.components", compiled.components, ("model", "loss")),
        ("checkpoint.exclude_from_loading", settings.checkpoint.exclude_from_loading, SAVED),
    ]:
        if wrong := [name for name in found if name not in known]:
            raise ConfigError(f"{key} must be of {', '.join(known)}; got {wrong[0]!r}")
    if compiled.enable and compiled.backend != "inductor":
        from torch._dynamo import list_backends  # here: takes seconds

        if compiled.backend not in (known := list_backends(exclude_tags=())):
            raise ConfigError(f"compile.backend must be one of {', '.join(known)}; got {compiled.backend!r}")
