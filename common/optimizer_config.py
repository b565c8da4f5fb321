"""The section of a config that chooses the optimizer; the choice is made by `optimizers.build_optimizer`.

optimizer = build_optimizer(model, settings.optimizer.name, **settings.optimizer.options())
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from common.config import ConfigError

RULE_OPTIONS = ("betas", "momentum", "ns_steps", "ns_coefficients", "ns_dtype", "state_dtype", "wire_dtype")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer; an option that the named rule does not have is an error when it is built."""

    name: str = "olion"
    """Rule of the hidden matrices: olion, muon, adamuon, lion, adamw or a registered rule of your own."""
    lr: float | None = None
    """Peak rate of the matrices; None takes this optimizer's from `tuned_lr`."""
    tuned_lr: dict[str, float] = field(default_factory=dict)
    """Rate of each optimizer where `lr` is not given: the best of a sweep (python -m scripts.sweep)."""
    adamw_lr: float | None = None
    """Peak rate of embeddings, head and norms, which AdamW trains for every rule; None is the matrices' rate."""
    weight_decay: float = 0.1
    """Decoupled, on every tensor of two or more dimensions."""
    betas: tuple[float, float] | None = None
    """Of olion, lion or adamw; None is the paper's."""
    momentum: float | None = None
    """Of muon or adamuon; None is the paper's 0.95."""
    ns_steps: int | None = None
    """Newton-Schulz steps; None is 5."""
    ns_coefficients: str | None = None
    """jordan, convergent or polar_express; None is jordan."""
    ns_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the orthogonalization; None is bfloat16 on GPUs and float32 on CPUs."""
    state_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the momentum; None is the parameters'."""
    wire_dtype: Literal["float32", "bfloat16"] | None = None
    """How directions travel between ranks; None is one bit an entry for olion, bfloat16 for muon and adamuon."""

    def __post_init__(self):
        rates = {f"tuned_lr.{name}": rate for name, rate in self.tuned_lr.items()}
        rates |= {name: getattr(self, name) for name in ("lr", "adamw_lr", "weight_decay")}
        for name, rate in rates.items():
            if rate is not None and not math.isfinite(rate):
                raise ConfigError(f"{name} must be finite; got {rate}")

    def peak_lr(self) -> float:
        """Return the peak rate of the matrices: the one asked for, or the optimizer's tuned one."""
        lr = self.tuned_lr.get(self.name) if self.lr is None else self.lr
        if lr is None:
            raise ConfigError(
                f"{self.name} needs a learning rate and optimizer.tuned_lr has none; set one with --optimizer.lr"
            )
        return lr

    def options(self) -> dict[str, Any]:
        """Return what `build_optimizer` takes beside model and name: the rates, and every option that is set."""
        import torch  # here: --help goes without

        options = {name: getattr(self, name) for name in RULE_OPTIONS if getattr(self, name) is not None}
        options |= {name: getattr(torch, value) for name, value in options.items() if name.endswith("_dtype")}
        return {"lr": self.peak_lr(), "adamw_lr": self.adamw_lr, "weight_decay": self.weight_decay, **options}
