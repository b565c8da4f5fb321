"""Every knob of a run: torchtitan's own sections, with those replaced that this repository reads differently.

    settings = parse_config(["Llama/train_configs/stdlib.toml", "--optimizer.name", "muon"])

An [optimizer] key is one that some rule here has; one that the chosen rule does not have is an error at once.
"""

import os
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torchtitan.config.job_config as titan
from torch import nn

from common.config import ConfigError, at_least
from common.config import parse_config as parse
from common.optimizer_config import OptimizerConfig
from Llama.cpu import CPU, on_cpu
from Llama.model import FLAVORS, Llama
from optimizers import build_optimizer
from optimizers.rule import rule_named


@dataclass
class Job(titan.Job):
    dump_folder: str = "runs/llama"
    """Folder of all runs; a run's own is GROUP/NAME in it."""
    group: str = "default"
    """Folder of the run below dump_folder, and its group in Weights & Biases."""
    resume: bool = False
    """Continue from the newest checkpoint of this run; without it, an earlier run's folder is moved aside."""


@dataclass
class Model(titan.Model):
    name: str = "llama2"
    """The TrainSpec of Llama/spec.py."""
    flavor: str = "7B"
    """7B, 13B, 70B, or debug (2 million parameters)."""
    hf_assets_path: str = "data/llama2"
    """Folder with tokenizer.json and tokenizer_config.json, as on the Hugging Face Hub."""


@dataclass
class Training(titan.Training):
    dataset: str = "c4"
    """c4 (streamed from the Hugging Face Hub), or text: files of dataset_path."""
    dataset_path: str | None = None
    """A folder or file: .jsonl or .parquet with a column "text", or plain text; of c4, a copy of allenai/c4."""
    lanes: int = 64
    """Parts that the documents are dealt into; ranks share them evenly, so that any divisor of it resumes a run."""
    local_batch_size: int = 1
    """Sequences that one rank takes through the model at once; the result does not depend on it."""
    global_batch_size: int = 8
    """Sequences a step, over all ranks and micro-batches."""

    def __post_init__(self):
        at_least(1, self, "lanes", "local_batch_size", "global_batch_size", "seq_len", "steps")


@dataclass
class Validation(titan.Validation):
    enable: bool = True
    """Validate at step 0, every `freq` steps and at the end."""
    freq: int = 500
    """Steps between validations."""
    windows: int = 512
    """Sequences, over all ranks: the first of the set, and the same at every validation."""
    local_batch_size: int = 0
    """Sequences on one rank at once, at most; 0 is training's."""
    seq_len: int = 0
    """0 is training's."""

    def __post_init__(self):
        at_least(1, self, "freq", "windows")


@dataclass
class Metrics(titan.Metrics):
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases: auto is online with a login, else offline (`wandb sync` uploads it later)."""


@dataclass
class Checkpoint(titan.Checkpoint):
    enable: bool = True
    """Save every `interval` steps and at the end."""
    last_save_model_only: bool = False
    """The last one can be resumed, too, with more steps."""
    keep_latest_k: int = 2
    """Newest checkpoints that are kept; 0 keeps all."""


@dataclass
class Debug(titan.Debug):
    seed: int = 1337
    """Seeds the weights and the order of local documents."""


@dataclass
class JobConfig(titan.JobConfig):
    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # torchtitan's would mostly be left unread
    training: Training = field(default_factory=Training)
    validation: Validation = field(default_factory=Validation)
    metrics: Metrics = field(default_factory=Metrics)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    debug: Debug = field(default_factory=Debug)


BYTES_A_PARAMETER = 12  # of a run on CPUs: weight, gradient and one momentum in float32; AdamW has another

# What torchtitan reads and this repository does not, with what stands in its place.
NOT_READ = {
    "job.custom_config_module": "Llama/config.py is the config",
    "experimental.custom_args_module": "Llama/config.py is the config",
    "metrics.enable_wandb": "set metrics.wandb",
    "model.tokenizer_path": "set model.hf_assets_path",
    "training.dataloader": "batches are made in the training process",
    "validation.dataloader": "windows are read once, before training",
    "validation.steps": "set validation.windows",
    "fault_tolerance.enable": "checkpoints resume on another number of ranks",
}


def parse_config(argv: list[str] | None = None) -> JobConfig:
    """Read `[CONFIG.toml ...] [--section.key value ...]`, checked in itself; see common.config.

    Raises ConfigError, one line, for what is unknown, unread, of a wrong type, or impossible with this many ranks.
    """
    settings = parse(JobConfig, argv)
    defaults = JobConfig()
    for name, instead in NOT_READ.items():
        section, key = name.split(".")
        if getattr(getattr(settings, section), key) != getattr(getattr(defaults, section), key):
            raise ConfigError(f"{name} must be left out, since nothing here reads it; {instead}")
    validation = replace(
        settings.validation,
        seq_len=settings.validation.seq_len or settings.training.seq_len,
        local_batch_size=settings.validation.local_batch_size or settings.training.local_batch_size,
    )
    settings = replace(settings, validation=validation)
    fake = settings.comm.mode != "default"  # torchtitan's dry runs: one process, as if there were NGPU
    ranks = int(os.environ.get("NGPU" if fake else "WORLD_SIZE", 1))
    check_flavor(settings)
    check_batches(settings, ranks)
    rule_named(settings.optimizer.name)
    # Refuses on a stand-in what it would refuse on the model.
    build_optimizer(nn.Linear(2, 2), settings.optimizer.name, **settings.optimizer.options())
    return settings


def check_flavor(settings: JobConfig) -> None:
    """Refuse a model that does not exist, or that is too large for a machine without GPUs."""
    flavor = settings.model.flavor
    if flavor not in FLAVORS:
        raise ConfigError(f"model.flavor must be one of {', '.join(FLAVORS)}; got {flavor!r}")
    if not on_cpu() or settings.comm.mode != "default":
        return
    with torch.device("meta"):
        count = sum(param.numel() for param in Llama(FLAVORS[flavor]).parameters())
    needed, there = count * BYTES_A_PARAMETER / 1e9, CPU.get_device_properties().total_memory / 1e9
    if needed > there:
        raise ConfigError(
            f"Llama-2 {flavor} needs about {needed:,.0f} GB for weights, gradients and momentum; this machine has no "
            f"GPU and {there:,.0f} GB of memory: use GPUs, or run the small one, bash Llama/run.sh"
        )


def data_ranks(settings: JobConfig, world_size: int) -> int:
    """Return the number of ranks that see different sequences; ConfigError where the parallelism does not fit."""
    parallelism = settings.parallelism
    if parallelism.pipeline_parallel_degree > 1:
        raise ConfigError(
            f"pipeline_parallel_degree must be 1, got {parallelism.pipeline_parallel_degree}: torchtitan 0.2.2's "
            "pipelines leave gradients as sums over tokens, which clipping then cuts down; use FSDP and tensor degrees"
        )
    if parallelism.context_parallel_degree > 1 and on_cpu():
        raise ConfigError("context_parallel_degree must be 1 without GPUs: torch cannot shard their attention")
    model_ranks = parallelism.tensor_parallel_degree * parallelism.context_parallel_degree
    replicas, shards = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    if world_size % model_ranks:
        raise ConfigError(f"tensor and context degrees make {model_ranks}, which must divide {world_size}")
    ranks = world_size // model_ranks
    wanted = replicas * shards if shards > 0 else ranks // replicas * replicas
    if wanted != ranks:
        raise ConfigError(
            f"[parallelism] must use the {world_size} ranks there are; data_parallel_replicate_degree {replicas} and "
            f"data_parallel_shard_degree {shards} make {wanted} of {ranks}; set NGPU or the degrees (-1: what is left)"
        )
    return ranks


def check_batches(settings: JobConfig, world_size: int) -> None:
    """Refuse batches, lanes and validation windows that the ranks cannot share evenly."""
    ranks = data_ranks(settings, world_size)
    training = settings.training
    for name, value, unit in [
        ("training.global_batch_size", training.global_batch_size, ranks * training.local_batch_size),
        ("training.lanes", training.lanes, ranks),
        ("validation.windows", settings.validation.windows, ranks),
    ]:
        if value % unit:
            micro = f" x local_batch_size {training.local_batch_size}" if unit != ranks else ""
            raise ConfigError(f"{name} must be a multiple of {unit} ({ranks} data-parallel ranks{micro}); got {value}")
