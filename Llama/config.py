"""Every knob of a run: torchtitan's own sections, with those replaced that this repository reads differently.

    settings = parse_config(["Llama/train_configs/stdlib.toml", "--optimizer.name", "muon"])

An [optimizer] key is one that some rule here has; one that the chosen rule does not have is an error at once.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torchtitan.config.job_config as titan
from torch import nn

from common.config import ConfigError, at_least
from common.config import parse_config as parse
from common.optimizer_config import OptimizerConfig
from common.probe_config import ProbeConfig
from Llama.checks import (
    check_batches,
    check_data,
    check_flavor,
    data_ranks,
    is_fine_tuning,
    shape_of,
)
from Llama.sections import check_sections
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
    """Sequences that one rank takes through the model at once, at most; the result does not depend on it."""
    global_batch_size: int = 8
    """Sequences per step, over all ranks and micro-batches."""
    max_norm: float = 1.0
    """The norm that gradients are clipped to; 0 clips none."""
    gradient_sync: Literal["replicas", "step"] = "replicas"
    """Gradients of replicas (HSDP, DDP) meet once per step; those of shards (FSDP) after each micro-batch, or, with
    step, once per step too: less to send, and whole gradients in the memory of each rank, 4 bytes per parameter."""

    def __post_init__(self):
        at_least(1, self, "lanes", "local_batch_size", "global_batch_size", "seq_len", "steps")


@dataclass
class Validation(titan.Validation):
    enable: bool = True
    """Validate at step 0, every `freq` steps and at the end."""
    dataset: str | None = None
    """As training.dataset; None is training's, with its path."""
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
    checksums: bool = True
    """Hash every file (SHA-256, about 1 GB/s per core) once it is saved, and compare before loading; else its size."""


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
    probe: ProbeConfig = field(default_factory=ProbeConfig)


def parse_config(argv: list[str] | None = None) -> JobConfig:
    """Read `[CONFIG.toml ...] [--section.key value ...]`, checked in itself; see common.config.

    Raises ConfigError, one line, for what is unknown, unread, of a wrong type, or impossible with this many ranks.
    """
    settings = parse(JobConfig, argv)
    check_sections(settings, JobConfig())
    fake = settings.comm.mode == "fake_backend"  # torchtitan's dry run: one process, as if there were NGPU
    world_size = int(os.environ.get("NGPU" if fake else "WORLD_SIZE", 1))
    check_flavor(settings)
    check_data(settings)
    ranks = data_ranks(settings, world_size)
    check_batches(settings, ranks)
    settings = filled_in(settings, ranks)
    for name in (settings.optimizer.name, *settings.optimizer.tuned_lr):
        rule_named(name)
    # Refuses on a stand-in what it would refuse on the model.
    build_optimizer(nn.Linear(2, 2), settings.optimizer.name, **settings.optimizer.arguments())
    return with_weights(settings)


def filled_in(settings: JobConfig, ranks: int) -> JobConfig:
    """Put values where a config leaves them to others."""
    training, validation = settings.training, settings.validation
    share = training.global_batch_size // ranks
    most = min(training.local_batch_size, share)
    training = replace(training, local_batch_size=next(size for size in range(most, 0, -1) if share % size == 0))
    if validation.dataset is None:
        validation = replace(validation, dataset=training.dataset, dataset_path=training.dataset_path)
    validation = replace(
        validation,
        seq_len=validation.seq_len or training.seq_len,
        local_batch_size=validation.local_batch_size or training.local_batch_size,
    )
    return replace(settings, training=training, validation=validation)


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
