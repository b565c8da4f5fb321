"""SOAP, Shampoo and Adafactor of the package pytorch_optimizer, version 4, which need not be installed.

    optimizer = build_optimizer(model, "soap", lr=3e-3)      # pip install pytorch_optimizer

References to compare with, on one process or DDP, where each rank steps all matrices by itself. Their mathematics is
the package's; weight decay is decoupled, and Adafactor keeps the learning rate it is given. (The package's Sophia needs
gradients of gradients, which no training loop here makes.)
"""

from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .checks import BadValue
from .engine import RuleOptimizer, refuse_unknown

GUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "soap": ("SOAP", {}),
    "shampoo": ("Shampoo", {"weight_decouple": True}),
    "adafactor": ("AdaFactor", {"relative_step": False, "scale_parameter": False}),
}


class Guest(torch.optim.Optimizer):
    """An optimizer of pytorch_optimizer on the matrices, and AdamW, or the rule of `rest`, on the other parameters.

    The param groups are those of both, and so is the state, as tensors alone: a list of tensors "GG" is saved as
    "GG.0", "GG.1", ...

    Raises ValueError without the package, for an option that its optimizer does not have, and for DTensors.
    """

    line_search, searches = None, False

    def __init__(self, name: str, matrices: Sequence[tuple[str, Tensor]], rest: RuleOptimizer | None, options: dict):
        for matrix, param in matrices:
            if isinstance(param, DTensor):
                raise BadValue(f"{name} needs plain tensors (one process or DDP), got a DTensor: {matrix}; use DDP")
        kind, defaults = GUESTS[name]
        constructor = getattr(package(name), kind)
        refuse_unknown(options, list(signature(constructor).parameters)[1:], name)
        self.guest = constructor(list(matrices), **{**defaults, **options})
        self.rest = rest
        super().__init__(self.guest.param_groups + (rest.param_groups if rest else []), {})

    @property
    def state(self) -> Any:
        """The state of both; empty until the guest has made its own, in its first step."""
        return {**self.guest.state, **(self.rest.state if self.rest else {})} if self.guest.state else {}

    @state.setter
    def state(self, value: dict[Tensor, dict]) -> None:
        for param, buffers in value.items():
            own = _flat(self.state[param])
            for key, buffer in buffers.items():
                own[key].copy_(buffer)  # in its own dtype and memory

    @torch.no_grad()
    def step(self, closure=None):
        """Step both; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.guest.step()
        if self.rest:
            self.rest.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return state and param groups of both, as any torch optimizer does."""
        saved = super().state_dict()
        return saved | {"state": {key: _flat(buffers) for key, buffers in saved["state"].items()}}

    def __setstate__(self, state: dict) -> None:
        """Take a loaded state; torch calls this."""
        for group, loaded in zip(self.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in loaded.items() if key != "params"})
        if not self.guest.state:
            self._make_state()
        self.state = state["state"]

    def state_size(self) -> int:
        """Return the bytes of state that this process holds."""
        tensors = [tensor for buffers in self.state.values() for tensor in _flat(buffers).values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _make_state(self) -> None:
        """Let the guest make its state, by a step of zero length, which leaves its count as it is."""
        before = [(dict(group), [param.grad for param in group["params"]]) for group in self.guest.param_groups]
        for group in self.guest.param_groups:
            group["lr"] = 0.0
            for param in group["params"]:
                param.grad = torch.zeros_like(param)
        self.guest.step()
        for group, (options, grads) in zip(self.guest.param_groups, before, strict=True):
            group.update(options)
            for param, grad in zip(group["params"], grads, strict=True):
                param.grad = grad


def package(name: str) -> Any:
    """Return the module pytorch_optimizer; ValueError, in one line, without it."""
    try:
        return import_module("pytorch_optimizer")
    except ImportError:
        raise BadValue(f"{name} needs the package pytorch_optimizer, got none; install it with pip") from None


def _flat(buffers: dict) -> dict[str, Tensor]:
    """Return the tensors of a guest's state; its numbers are constants, or made anew at every step."""
    found = {}
    for key, value in buffers.items():
        parts = enumerate(value) if isinstance(value, list) else ()
        found |= {f"{key}.{i}": part for i, part in parts if isinstance(part, Tensor)}
        found |= {key: value} if isinstance(value, Tensor) else {}
    return found
