"""The section of a config that chooses the optimizer; the choice is made by `optimizers.build_optimizer`.

optimizer = build_optimizer(model, settings.optimizer.name, **settings.optimizer.arguments())
"""

import math
from dataclasses import dataclass, field
from typing import Any

from common.config import ConfigError
from common.optimizer_help import options_help


def _list_options(config: type) -> None:
    """Describe every rule's options in --help, which shows a section's docstring but no table without entries."""
    config.__doc__ = f"{config.__doc__ or config.__name__}\n\n{options_help()}"


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
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the rule by name (a table [optimizer.options] in TOML), over the paper's."""

    def __init_subclass__(cls):
        _list_options(cls)

    def __post_init__(self):
        rates = {f"tuned_lr.{name}": rate for name, rate in self.tuned_lr.items()}
        rates |= {name: getattr(self, name) for name in ("lr", "adamw_lr", "weight_decay")}
        for name, rate in rates.items():
            if rate is not None and not math.isfinite(rate):
                raise ConfigError(f"{name} must be finite; got {rate}")
            if rate is not None and rate < 0:
                raise ConfigError(f"{name} must be 0 or more; got {rate}")

    def peak_lr(self) -> float:
        """Return the peak rate of the matrices: the one asked for, or the optimizer's tuned one."""
        lr = self.tuned_lr.get(self.name) if self.lr is None else self.lr
        if lr is None:
            raise ConfigError(
                f"{self.name} needs a learning rate and optimizer.tuned_lr has none; set one with --optimizer.lr"
            )
        return lr

    def arguments(self) -> dict[str, Any]:
        """Return what `build_optimizer` takes beside model and name: the rates, and every option that is set."""
        rates = {"lr": self.peak_lr(), "adamw_lr": self.adamw_lr, "weight_decay": self.weight_decay}
        if twice := rates.keys() & self.options.keys():
            name = min(twice)
            raise ConfigError(f"optimizer.options must hold a rule's other options, got {name}; set optimizer.{name}")
        return {**rates, **self.options}


_list_options(OptimizerConfig)
