"""The [optimizer] section of a config: arguments of `optimizers.build_optimizer`.

optimizer = build_optimizer(model, settings.optimizer.name, **settings.optimizer.arguments())
"""

import math
from dataclasses import dataclass, field
from typing import Any

from common.config import ConfigError
from common.optimizer_help import option_names, options_help


def _list_options(config: type) -> None:
    """Add every rule's options to the docstring: --help shows no table without entries."""
    config.__doc__ = f"{config.__doc__ or config.__name__}\n\n{options_help()}"


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer; its options are checked when it is built."""

    name: str = "olion"
    """Rule of the hidden matrices: olion, muon, adamuon, lion, adamw, normuon, lionmuon, polargrad, curvature, signum
    or another registered one."""
    lr: float | None = None
    """Peak learning rate of the matrices; None takes this optimizer's from `tuned_lr`."""
    tuned_lr: dict[str, float] = field(default_factory=dict)
    """Learning rate per optimizer where `lr` is None: the best of a sweep (python -m scripts.sweep)."""
    adamw_lr: float | None = None
    """Peak learning rate of embeddings, head and vectors, which AdamW trains for every rule; None: the matrices'."""
    rest: str = "adamw"
    """Rule of embeddings and head: adamw, polarsgdm or another registered rule; vectors stay with AdamW."""
    rest_lr: float | None = None
    """Peak learning rate of `rest` if that is not adamw; None: `adamw_lr`."""
    weight_decay: float = 0.1
    """Decoupled weight decay of every tensor of two or more dimensions."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the rule by name (table [optimizer.options] in TOML)."""

    def __init_subclass__(cls):
        _list_options(cls)

    @classmethod
    def known_entries(cls) -> list[str]:
        """Return the keys of `options`, which the error of an unknown flag hints at."""
        return [f"options.{name}" for name in option_names()]

    def __post_init__(self):
        rates = {f"tuned_lr.{name}": rate for name, rate in self.tuned_lr.items()}
        rates |= {name: getattr(self, name) for name in ("lr", "adamw_lr", "rest_lr", "weight_decay")}
        for name, rate in rates.items():
            if rate is not None and not math.isfinite(rate):
                raise ConfigError(f"{name} must be finite; got {rate}")
            if rate is not None and rate < 0:
                raise ConfigError(f"{name} must be 0 or more; got {rate}")

    def peak_lr(self) -> float:
        """Return the matrices' peak learning rate: `lr`, or the optimizer's tuned one."""
        lr = self.tuned_lr.get(self.name) if self.lr is None else self.lr
        if lr is None:
            raise ConfigError(
                f"{self.name} needs a learning rate and optimizer.tuned_lr has none; set --optimizer.lr or that"
            )
        return lr

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `build_optimizer`."""
        rates = {"lr": self.peak_lr(), "adamw_lr": self.adamw_lr, "weight_decay": self.weight_decay}
        rates |= {"rest": self.rest, "rest_lr": self.rest_lr}
        if twice := rates.keys() & self.options.keys():
            name = min(twice)
            raise ConfigError(f"optimizer.options must hold a rule's other options, got {name}; set optimizer.{name}")
        return {**rates, **self.options}


_list_options(OptimizerConfig)
