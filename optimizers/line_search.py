"""Armijo's backtracking: of the steps lr, lr shrink, lr shrink², ..., the first that lowers the loss enough.

    f(X - a D) <= f(X) - c a <G, D>

<G, D> is the slope along the direction; of Muon without momentum, with the exact polar factor, it is the nuclear norm
of G times the factor of its shape: f(X - a U) <= f(X) - c a ||G||_nuc. All matrices of the searched param groups step
together. Armijo, "Minimization of functions having Lipschitz continuous first partial derivatives" (1966).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Layout
from .rule import Tensors
from .update import Update, gradient_of

_MOST = 30  # backtracks; at a shrink of 1/2 the last step is 1e-9 of the first


@dataclass
class Search:
    """The result of a search. step: a, or 0 if none was good enough. slope: <G, D>. passes: extra losses."""

    step: float
    slope: float
    passes: int

    def metrics(self) -> dict[str, float]:
        """Return the metrics to log, with a / <G, D>, which theory keeps in a range."""
        found = {"step": self.step, "slope": self.slope, "passes": float(self.passes)}
        found |= {"step_over_slope": self.step / self.slope} if self.slope else {}
        return {f"line_search/{name}": value for name, value in found.items()}


class Trial(Update):
    """An update that keeps its directions instead of stepping."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []  # weight, its value before, direction
        self._slopes: Tensors = []

    def _step(self, members: list[int], directions: Tensors) -> None:
        for i, direction in zip(members, directions, strict=True):
            grad = gradient_of(self.params[i], self.group)
            self._slopes.append((grad * direction).sum(dtype=torch.float64))
            self.kept.append((self.weights[i], self.weights[i].clone(), direction))

    def slope(self, layout: Layout | None) -> float:
        """Return <G, D> of the whole matrices, the same on all ranks of their layout."""
        device = self.weights[0].device
        total = torch.stack(self._slopes).sum() if self._slopes else torch.zeros((), dtype=torch.float64, device=device)
        for group in layout.shard_groups if layout else ():
            dist.all_reduce(total, group=group)
        return total.item()

    def move(self, share: float, decay: bool = False) -> None:
        """Set the weights to a step of this fraction of the learning rate."""
        lr = share * float(self.group["lr"])
        for weight, before, direction in self.kept:
            weight.copy_(before * (1 - lr * self.group["weight_decay"]) if decay else before)
            weight.sub_(direction.to(weight.dtype), alpha=lr)


@contextmanager
def gradients_aside(params: list[Tensor]) -> Iterator[None]:
    """Detach gradients from their parameters and restore them: gradients that a closure makes are dropped."""
    grads = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        yield
    finally:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad


def backtrack(trials: list[Trial], layouts: list[Layout | None], loss: float, closure: Callable) -> Search:
    """Step along the directions of the trials, and return the search; a collective of the layouts' ranks.

    closure: evaluates the loss again, for the same batch.
    """
    slopes = [trial.slope(layout) for trial, layout in zip(trials, layouts, strict=True)]
    options, widest = trials[0].group, max(filter(None, layouts), key=lambda each: len(each.ranks), default=None)
    promised = sum(float(trial.group["lr"]) * max(slope, 0.0) for trial, slope in zip(trials, slopes, strict=True))
    device = trials[0].weights[0].device
    start, share, passes = _mean(loss, widest, device), 1.0, 0
    while passes < _MOST:
        for trial in trials:
            trial.move(share)
        with torch.enable_grad():
            found = closure()
        passes += 1
        if _mean(float(found), widest, device) <= start - options["armijo_c"] * share * promised:
            break
        share *= options["shrink"]
    else:
        share = 0.0
    for trial in trials:
        trial.move(share, decay=True)
    return Search(share * float(options["lr"]), sum(slopes), passes)


def _mean(loss: float, layout: Layout | None, device: torch.device) -> float:
    """Return the mean over the ranks of a layout, so that all of them decide equally."""
    if layout is None:
        return loss
    total = torch.tensor(loss, dtype=torch.float64, device=device)
    for group in layout.groups:
        dist.all_reduce(total, group=group)
        total /= dist.get_world_size(group)
    return total.item()
