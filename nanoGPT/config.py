"""Settings of a GPT run, with their defaults. torch is not imported, to keep --help fast."""

from dataclasses import dataclass, field

from common import BadValue
from common.config import at_least
from common.optimizer_config import OptimizerConfig
from common.run_config import RunConfig


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT; the defaults are GPT-2 small."""

    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Attention heads per block."""
    n_embd: int = 768
    """Width C, a multiple of n_head."""
    context: int = 1024
    """Longest sequence, in tokens."""
    vocab_size: int = 50304
    """GPT-2's 50,257 tokens, padded to a multiple of 64, a fast shape; 0: the corpus' vocabulary, padded likewise."""
    bias: bool = False
    """Biases in layers and norms: in OpenAI's weights, not in the paper's models."""
    dropout: float = 0.0
    """Fraction of the activations dropped in training."""

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "context"):
            if getattr(self, name) < 1:
                raise BadValue(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise BadValue(f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise BadValue(f"dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class DataConfig:
    """The corpus and its batches."""

    folder: str = "data/openwebtext"
    """Folder that `python -m nanoGPT.prepare` wrote."""
    batch_size: int = 480
    """Sequences per step, over all ranks and micro-batches: 480 x 1,024 tokens in the paper."""
    micro_batch: int = 40
    """Largest number of sequences per forward pass of a rank; lower it if memory runs out: the result is the same."""

    def __post_init__(self):
        at_least(1, self, "batch_size", "micro_batch")


@dataclass(frozen=True)
class GPTOptimizerConfig(OptimizerConfig):
    """The optimizer; its options are checked when it is built."""

    split_qkv: bool = False
    """Orthogonalize the query, key and value blocks of the fused weight separately; no effect on lion and adamw."""


@dataclass(frozen=True)
class EvalConfig:
    """Validation, always on the same windows."""

    every: int = 500
    """Steps between validations; two more are at step 0 and at the end."""
    windows: int = 1000
    """Windows of one context each, evenly spaced over val.bin."""

    def __post_init__(self):
        at_least(1, self, "every", "windows")


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run; the defaults are the paper's GPT-2 small on OpenWebText."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: GPTOptimizerConfig = field(default_factory=GPTOptimizerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    init_from: str = ""
    """A Hugging Face GPT-2 to start from ("gpt2", "gpt2-medium", a folder); empty: random weights."""
    out: str = "runs/nanogpt"
    """Folder of all runs."""
