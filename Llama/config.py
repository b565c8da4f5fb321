"""Every knob of a run: torchtitan's own sections, with those replaced that this repository reads differently.

    settings = parse_config(["Llama/train_configs/stdlib.toml", "--optimizer.name", "muon"])

An [optimizer] key is one that some rule here has; one that the chosen rule does not have is an error at once.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torchtitan.config.job_config as titan
from torch import nn

from common.config import ConfigError, at_least
from common.config import parse_config as parse
from common.optimizer_config import OptimizerConfig
from Llama.cpu import CPU, on_cpu
from Llama.model import FLAVORS, Llama, Shape
from Llama.templates import TEMPLATES
from Llama.weights import check_weights, find_weights
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
    """llama2 or llama3.1: a family of Llama/model.py."""
    flavor: str = "7B"
    """Of llama2 7B, 13B, 70B, or debug (2 million parameters); of llama3.1 8B, 70B."""
    hf_assets_path: str = "data/llama2"
    """Folder with tokenizer.json and tokenizer_config.json, as on the Hugging Face Hub."""


@dataclass
class Training(titan.Training):
    dataset: str = "c4"
    """To pretrain on, c4 (streamed from the Hugging Face Hub) or text (files of dataset_path); to fine-tune on,
    mathinstruct (from the Hub) or instructions (files of dataset_path)."""
    dataset_path: str | None = None
    """A folder or file: of text, .jsonl or .parquet with a column "text", or plain text; of instructions, .jsonl or
    .parquet with "instruction" and "output", or "messages"; of c4 and mathinstruct, a copy of the Hub's folder."""
    lanes: int = 64
    """Parts that a text's documents are dealt into; ranks share them evenly: any divisor of it resumes a run."""
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
    pretrain_dataset: str | None = None
    """While fine-tuning: c4 or text, whose loss (val/pretrain_loss) shows what is forgotten."""
    pretrain_path: str | None = None
    """Its dataset_path."""
    local_batch_size: int = 0
    """Sequences on one rank at once, at most; 0 is training's."""
    seq_len: int = 0
    """0 is training's."""

    def __post_init__(self):
        at_least(1, self, "freq", "windows")


@dataclass
class FineTuning:
    template: str = "alpaca"
    """How a conversation is written (Llama/templates.py): question, alpaca or llama3."""
    packing: bool = False
    """Several examples a row, which do not see each other; else one, padded to the longest of its micro-batch."""
    held_out: int = 1024
    """Examples of mathinstruct, which has no validation split, that are kept for validation."""


@dataclass
class Metrics(titan.Metrics):
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases: auto is online with a login, else offline (`wandb sync` uploads it later)."""


@dataclass
class Checkpoint(titan.Checkpoint):
    enable: bool = True
    """Save every `interval` steps and at the end."""
    initial_load_path: str | None = None
    """Weights to start from: a folder of Hugging Face's *.safetensors, of a run, or of one of its checkpoints."""
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
    fine_tuning: FineTuning = field(default_factory=FineTuning)
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
    "checkpoint.initial_load_in_hf": "checkpoint.initial_load_path tells by its files",
    "checkpoint.initial_load_in_hf_quantized": "quantized weights are not trained here",
    "checkpoint.last_save_in_hf": "export with python -m Llama.weights, and keep what can be resumed",
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
    if settings.fine_tuning.template not in TEMPLATES:
        names = ", ".join(TEMPLATES)
        raise ConfigError(f"fine_tuning.template must be one of {names}; got {settings.fine_tuning.template!r}")
    if settings.fine_tuning.packing and not is_fine_tuning(settings):
        raise ConfigError("fine_tuning.packing is for instructions; texts are always packed, leave it out")
    rule_named(settings.optimizer.name)
    # Refuses on a stand-in what it would refuse on the model.
    build_optimizer(nn.Linear(2, 2), settings.optimizer.name, **settings.optimizer.options())
    return with_weights(settings)


def with_weights(settings: JobConfig) -> JobConfig:
    """Find the weights to start from, and refuse those of another model."""
    path, model = settings.checkpoint.initial_load_path, settings.model
    if path is None and is_fine_tuning(settings):
        raise ConfigError(
            "fine-tuning needs weights to start from, and checkpoint.initial_load_path is not set; name a folder of "
            "Hugging Face's, or a run's"
        )
    if path is None:
        return settings
    if not settings.checkpoint.enable:
        raise ConfigError(
            "checkpoint.initial_load_path needs checkpoint.enable, got false: torchtitan's checkpoints load it; to "
            "save none, set checkpoint.load_only"
        )
    folder, is_hf = find_weights(Path(path))
    check_weights(folder, is_hf, shape_of(model), f"{model.name} {model.flavor}")
    checkpoint = replace(settings.checkpoint, initial_load_path=str(folder), initial_load_in_hf=is_hf)
    return replace(settings, checkpoint=checkpoint)


def is_fine_tuning(settings: JobConfig) -> bool:
    """Whether the data are instructions, and not text."""
    return settings.training.dataset in ("instructions", "mathinstruct")


def shape_of(model: Model) -> Shape:
    """Return the shape that a config names; ConfigError where it names none."""
    if model.name not in FLAVORS:
        raise ConfigError(f"model.name must be one of {', '.join(FLAVORS)}; got {model.name!r}")
    flavors = FLAVORS[model.name]
    if model.flavor not in flavors:
        raise ConfigError(f"model.flavor must be one of {', '.join(flavors)} for {model.name}; got {model.flavor!r}")
    return flavors[model.flavor]


def check_flavor(settings: JobConfig) -> None:
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


def data_ranks(settings: JobConfig, world_size: int) -> int:
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
    model_ranks = parallelism.tensor_parallel_degree
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
    return ranks


def check_batches(settings: JobConfig, world_size: int) -> None:
    """Refuse batches, lanes and validation windows that the ranks cannot share evenly."""
    ranks = data_ranks(settings, world_size)
    training = settings.training
    for name, value, unit in [
        ("training.global_batch_size", training.global_batch_size, ranks * training.local_batch_size),
        ("training.lanes", 0 if is_fine_tuning(settings) else training.lanes, ranks),
        ("validation.windows", settings.validation.windows, ranks),
    ]:
        if value % unit:
            micro = f" x local_batch_size {training.local_batch_size}" if unit != ranks else ""
            raise ConfigError(f"{name} must be a multiple of {unit} ({ranks} data-parallel ranks{micro}); got {value}")
