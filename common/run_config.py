"""Settings shared by the training loops; experiments add their own. torch is not imported, to keep --help fast."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.checkpoint_folder import CheckpointConfig
from common.config import ConfigError, at_least
from common.probe_config import ProbeConfig
from common.schedule import ScheduleConfig

MOST_SEEDS = 2**31  # numpy takes 32-bit seeds, and each rank adds its rank


@dataclass(frozen=True)
class ParallelConfig:
    """Layout over the ranks; results and checkpoints do not depend on it."""

    mode: Literal["ddp", "owners", "fsdp", "hsdp"] = "ddp"
    """ddp: one copy per rank, fastest if it fits; owners: ddp, but each matrix's gradient and momentum are on one rank
    (not for lion, signum and adamw); fsdp: one shard per rank; hsdp: fsdp in groups, ddp between them."""
    shard: int = 0
    """Number of neighbouring ranks that shard one copy (hsdp); 0: those of one machine, whose links are fastest."""

    @property
    def sharded(self) -> bool:
        """Whether no rank has a whole copy."""
        return self.mode in ("fsdp", "hsdp")

    def __post_init__(self):
        at_least(0, self, "shard")
        if self.shard and self.mode != "hsdp":
            raise ConfigError(f"parallel.shard needs mode hsdp; got {self.shard} with {self.mode}: leave it 0")


@dataclass(frozen=True)
class RunConfig:
    """Settings of every experiment, which adds [optimizer], [eval] and its own."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    steps: int = 20_000
    """Optimizer steps."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0 disables clipping."""
    seed: int = 1337
    """Seed of the weights and, with the step, of batches and their random draws."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward and backward pass, the weights staying float32; auto is bfloat16 on GPUs and float32
    elsewhere; GPUs without bfloat16 take float16. float64, of weights and all, is for comparing layouts: differences
    are then not rounding."""
    compile: bool = False
    """Run the model through torch.compile: a minute of compiling, then faster steps on a GPU."""
    log_every: int = 10
    """Steps between logged metrics."""
    group: str = "default"
    """Folder of the run below `out`, and its group in Weights & Biases."""
    out: str = "runs"
    """Folder of all runs."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases: auto is online with a login, else offline (`wandb sync` uploads it later)."""
    resume: bool = False
    """Continue from the newest checkpoint of this run; otherwise an earlier run's folder is moved aside."""

    def __post_init__(self):
        at_least(1, self, "steps", "log_every")
        at_least(0, self, "clip", "seed")
        if self.seed >= MOST_SEEDS:
            raise ConfigError(f"seed must be below 2**31; got {self.seed}")
        group = Path(self.group)
        if group.is_absolute() or not group.parts or ".." in group.parts or not self.group.isprintable():
            raise ConfigError(f"group must name a folder below `out`; got {self.group!r}")
        if "\0" in self.out:
            raise ConfigError(f"out must name a folder; got {self.out!r}")
