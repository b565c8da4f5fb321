"""Options of a run: torchtitan's sections, some of them replaced by this repository's. Imports no torch of its own.

`Llama.config` reads and checks them.
"""

from dataclasses import dataclass, field
from typing import Literal

import torchtitan.config.job_config as titan

from common.config import at_least
from common.optimizer_config import OptimizerConfig
from common.probe_config import ProbeConfig


@dataclass
class Job(titan.Job):
    dump_folder: str = "runs/llama"
    """Folder of all runs; a run's is GROUP/NAME in it."""
    group: str = "default"
    """Folder of the run below dump_folder, and its group in Weights & Biases."""
    resume: bool = False
    """Continue from the newest checkpoint of this run; otherwise an earlier run's folder is moved aside."""


@dataclass
class Model(titan.Model):
    name: str = "llama2"
    """llama2, llama3.1 or qwen2.5: a family of Llama/model.py."""
    flavor: str = "7B"
    """llama2: 7B, 13B, 70B or debug (2 million parameters); llama3.1: 8B, 70B; qwen2.5: 0.5B, debug."""
    hf_assets_path: str = "data/llama2"
    """Folder with tokenizer.json and tokenizer_config.json, as on the Hugging Face Hub."""


@dataclass
class Training(titan.Training):
    dataset: str = "c4"
    """Pretraining: c4 (streamed from the Hugging Face Hub) or text (files of dataset_path); fine-tuning: mathinstruct
    (from the Hub) or instructions (files of dataset_path)."""
    dataset_path: str | None = None
    """A folder or file. text: .jsonl or .parquet with a column "text", or plain text; instructions: .jsonl or .parquet
    with "instruction" and "output", or "messages"; c4, mathinstruct: a copy of the Hub's folder."""
    lanes: int = 64
    """Number of lanes that documents are dealt to; the number of ranks may be any divisor, also of a resumed run."""
    local_batch_size: int = 1
    """Largest number of sequences per forward pass of a rank; the result does not depend on it."""
    global_batch_size: int = 8
    """Sequences per step, over all ranks and micro-batches."""
    max_norm: float = 1.0
    """Largest norm of the gradient; 0 disables clipping."""
    gradient_sync: Literal["replicas", "step"] = "replicas"
    """Gradients are reduced over replicas (HSDP, DDP) once per step, and over shards (FSDP) after each micro-batch or,
    with "step", once per step too: less traffic, but full gradients on each rank, 4 bytes per parameter."""

    def __post_init__(self):
        at_least(1, self, "lanes", "local_batch_size", "global_batch_size", "seq_len", "steps")


@dataclass
class Validation(titan.Validation):
    enable: bool = True
    """Validate at step 0, every `freq` steps and at the end."""
    dataset: str | None = None
    """Like training.dataset; None: training's, with its path."""
    freq: int = 500
    """Steps between validations."""
    windows: int = 512
    """Number of sequences, over all ranks: always the first of the set."""
    pretrain_dataset: str | None = None
    """While fine-tuning: c4 or text, whose loss (val/pretrain_loss) measures forgetting."""
    pretrain_path: str | None = None
    """Its dataset_path."""
    local_batch_size: int = 0
    """Largest number of sequences per forward pass of a rank; 0: training's."""
    seq_len: int = 0
    """Tokens per sequence; 0: training's."""

    def __post_init__(self):
        at_least(1, self, "freq", "windows")


@dataclass
class FineTuning:
    template: str = "alpaca"
    """Text format of conversations (Llama/templates.py): question, alpaca or llama3."""
    packing: bool = False
    """Several examples per row, without attention between them; otherwise one, padded to its micro-batch's longest."""
    held_out: int = 1024
    """Validation examples of mathinstruct, which has no validation split."""


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
    """False: the last checkpoint can also be resumed, for more steps."""
    keep_latest_k: int = 2
    """Number of newest checkpoints to keep; 0 keeps all."""
    checksums: bool = True
    """Hash every saved file (SHA-256, about 1 GB/s per core) and verify it before loading; otherwise only its size."""


@dataclass
class Debug(titan.Debug):
    seed: int = 1337
    """Seed of the weights and of the order of local documents."""


@dataclass
class JobConfig(titan.JobConfig):
    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # instead of torchtitan's
    training: Training = field(default_factory=Training)
    validation: Validation = field(default_factory=Validation)
    fine_tuning: FineTuning = field(default_factory=FineTuning)
    metrics: Metrics = field(default_factory=Metrics)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    debug: Debug = field(default_factory=Debug)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
