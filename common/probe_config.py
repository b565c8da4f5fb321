"""The [probe] section of a config: arguments of `optimizers.Probe`, which measures matrices while they train.

watch = Probe(optimizer, model=model, **settings.probe.options())
"""

from dataclasses import asdict, dataclass
from typing import Any

from common.config import ConfigError


@dataclass(frozen=True)
class ProbeConfig:
    """Norms of weights, isotropy and signs of directions: `probe/...` in metrics.jsonl and Weights & Biases."""

    every: int | None = None
    """Steps between measurements; the first step is measured too. None measures nothing."""
    matrices: tuple[str, ...] = ("*",)
    """Patterns of the names of matrices."""
    per_shape: int = 2
    """Number of matrices per shape, evenly spaced over the depth; 0 for all. The cost grows with it."""
    quantities: tuple[str, ...] = ()
    """Any of norms, isotropy, hadamard, flips, alignment, cosine and spectrum; () is all that the rule supports except
    spectrum; all by itself includes it."""
    mean: bool = True
    """Record means over the matrices of one shape; otherwise each matrix by name."""

    def __post_init__(self):
        if self.every is not None and self.every < 1:
            raise ConfigError(f"probe.every must be 1 step or more, or None for never; got {self.every}")

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `Probe` besides the model."""
        return asdict(self)
