"""The section of a config that measures matrices while they train; the measuring is `optimizers.Probe`.

watch = Probe(optimizer, model=model, **settings.probe.options())
"""

from dataclasses import asdict, dataclass
from typing import Any

from common.config import ConfigError


@dataclass(frozen=True)
class ProbeConfig:
    """Norms of weights, isotropy and signs of directions: `probe/...` in metrics.jsonl and Weights & Biases."""

    every: int | None = None
    """Steps between measurements, the first step's being one more; None measures nothing."""
    matrices: tuple[str, ...] = ("*",)
    """Name patterns, of all matrices."""
    per_shape: int = 2
    """At most so many of each shape, evenly spaced over the depth; 0 for all. The cost grows with it."""
    quantities: tuple[str, ...] = ()
    """Of norms, isotropy, hadamard, flips, alignment, cosine and spectrum; () is all that the optimizer's rule has, but
    the spectrum."""
    mean: bool = True
    """Means over the matrices of one shape; else each by its name."""

    def __post_init__(self):
        if self.every is not None and self.every < 1:
            raise ConfigError(f"probe.every must be 1 step or more, or None for never; got {self.every}")

    def options(self) -> dict[str, Any]:
        """Return what `Probe` takes beside the optimizer and the model."""
        return asdict(self)
