"""Checks of a Llama config: invalid combinations fail in one line, before any data is read."""

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from common import gpu
from common.config import ConfigError
from Llama.cpu import CPU, on_cpu
from Llama.model import FLAVORS, Llama, Shape
from Llama.templates import FINE_TUNING, TEMPLATES

if TYPE_CHECKING:
    from Llama.config import JobConfig, Model

TEXTS = ("c4", "c4_validation", "text")  # the second is torchtitan's name for C4's validation split
BYTES_PER_PARAMETER = 12  # on CPUs: weight, gradient and one momentum in float32; AdamW has a second one


def check_data(settings: "JobConfig") -> None:
    """Raise ConfigError for unknown data sets, and for those of the other task."""
    training, validation = settings.training, settings.validation
    kinds = FINE_TUNING if is_fine_tuning(settings) else TEXTS
    for name, value, names in [
        ("training.dataset", training.dataset, (*TEXTS, *FINE_TUNING)),
        ("validation.dataset", validation.dataset or training.dataset, kinds),
        ("validation.pretrain_dataset", validation.pretrain_dataset or "text", TEXTS),
    ]:
        if value not in names:
            raise ConfigError(f"{name} must be one of {', '.join(names)}; got {value!r}")
    if validation.pretrain_path and not validation.pretrain_dataset:
        raise ConfigError("validation.pretrain_path needs validation.pretrain_dataset, c4 or text; got the path alone")
    if validation.pretrain_dataset and not is_fine_tuning(settings):
        raise ConfigError(
            f"validation.pretrain_dataset needs fine-tuning; training.dataset is {training.dataset!r}: leave it out"
        )
    if settings.fine_tuning.template not in TEMPLATES:
        names = ", ".join(TEMPLATES)
        raise ConfigError(f"fine_tuning.template must be one of {names}; got {settings.fine_tuning.template!r}")
    if settings.fine_tuning.packing and not is_fine_tuning(settings):
        raise ConfigError("fine_tuning.packing needs instructions; texts are always packed: leave it out")


def is_fine_tuning(settings: "JobConfig") -> bool:
    """Return whether the data are instructions, not text."""
    return settings.training.dataset in FINE_TUNING


def shape_of(model: "Model") -> Shape:
    """Return the shape that a config names; raises ConfigError for an unknown name."""
    if model.name not in FLAVORS:
        raise ConfigError(f"model.name must be one of {', '.join(FLAVORS)}; got {model.name!r}")
    flavors = FLAVORS[model.name]
    if model.flavor not in flavors:
        raise ConfigError(f"model.flavor must be one of {', '.join(flavors)} for {model.name}; got {model.flavor!r}")
    return flavors[model.flavor]


def check_flavor(settings: "JobConfig") -> None:
    """Raise ConfigError for an unknown model, and for one too large for a machine without GPUs."""
    shape = shape_of(settings.model)
    if not on_cpu() or settings.comm.mode != "default":
        return
    with torch.device("meta"):
        count = sum(param.numel() for param in Llama(shape).parameters())
    needed, available = count * BYTES_PER_PARAMETER / 1e9, CPU.get_device_properties().total_memory / 1e9
    if needed > available:
        raise ConfigError(
            f"{settings.model.name} {settings.model.flavor} needs about {needed:,.0f} GB for weights, gradients and "
            f"momentum; this machine has no GPU and {available:,.0f} GB of memory: use GPUs, or run the small one, "
            "bash Llama/run.sh"
        )


def fit_precision(settings: "JobConfig") -> "JobConfig":
    """Switch to float32 on GPUs without bfloat16, with a warning: torchtitan has no loss scale for float16."""
    training = settings.training
    if training.mixed_precision_param != "bfloat16" or not torch.cuda.is_available():
        return settings
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if gpu.has_bfloat16(device):
        return settings
    if os.environ.get("RANK", "0") == "0":
        gpu.warn_without_bfloat16(device, "float32")
    return replace(settings, training=replace(training, mixed_precision_param="float32"))


def data_ranks(settings: "JobConfig", world_size: int) -> int:
    """Return the number of ranks with different sequences; raises ConfigError for an impossible parallelism."""
    parallelism = settings.parallelism
    if parallelism.pipeline_parallel_degree != 1:
        raise ConfigError(
            f"pipeline_parallel_degree must be 1, got {parallelism.pipeline_parallel_degree}: torchtitan 0.2.2's "
            "pipelines sum gradients over tokens, which breaks clipping; use FSDP and tensor degrees"
        )
    if parallelism.context_parallel_degree != 1:
        raise ConfigError(
            f"context_parallel_degree must be 1, got {parallelism.context_parallel_degree}: it is not tested here, and "
            "4,096 tokens fit on a GPU; use FSDP and tensor degrees"
        )
    model_ranks, shape = parallelism.tensor_parallel_degree, shape_of(settings.model)
    if model_ranks > 1 and shape.tied:
        raise ConfigError(
            f"tensor_parallel_degree must be 1 for {settings.model.name}, whose head is its embedding; got "
            f"{model_ranks}: use FSDP degrees"
        )
    heads = shape.n_kv_heads or shape.n_heads
    if heads % model_ranks:
        raise ConfigError(f"tensor_parallel_degree must divide the {heads} key and value heads; got {model_ranks}")
    if settings.training.seq_len % 2:
        raise ConfigError(f"training.seq_len must be even, for torchtitan; got {settings.training.seq_len}")
    for section in ("training", "validation"):
        length = getattr(settings, section).seq_len
        if model_ranks > 1 and length % (2 * model_ranks):
            raise ConfigError(
                f"tensor_parallel_degree must divide half of {section}.seq_len {length}; got {model_ranks}"
            )
    replicas, shards = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    if world_size % model_ranks:
        raise ConfigError(f"tensor_parallel_degree must divide the {world_size} ranks; got {model_ranks}")
    ranks = world_size // model_ranks
    wanted = replicas * shards if shards > 0 else ranks // replicas * replicas
    if wanted != ranks:
        raise ConfigError(
            f"[parallelism] must use the {world_size} ranks there are; data_parallel_replicate_degree {replicas} and "
            f"data_parallel_shard_degree {shards} make {wanted} of {ranks}; set NGPU or the degrees (-1: the rest)"
        )
    if model_ranks > 1 and replicas > 1 and replicas == ranks:
        raise ConfigError(
            f"data_parallel_shard_degree must be above 1 with tensor_parallel_degree {model_ranks}: torchtitan does "
            "not replicate tensor-parallel models without FSDP"
        )
    return ranks


def check_batches(settings: "JobConfig", ranks: int) -> None:
    """Raise ConfigError for batches, lanes and validation windows that the data-parallel ranks cannot share evenly."""
    training = settings.training
    for name, value in [
        ("training.global_batch_size", training.global_batch_size),
        ("training.lanes", 0 if is_fine_tuning(settings) else training.lanes),
        ("validation.windows", settings.validation.windows),
    ]:
        if value % ranks:
            raise ConfigError(f"{name} must be a multiple of the {ranks} data-parallel ranks; got {value}; or set NGPU")
