"""The update of some parameters of one param group by its rule, piece by piece, as a route asks for it."""

from functools import partial
from itertools import compress

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .elementwise import each
from .layout import local_of
from .precision import grad_dtype, state_dtype
from .routes import Factor
from .rule import Tensors, rule_named


class ParamsUpdate:
    """One step of parameters; see `routes.Update`.

    On a collective route a parameter without a gradient takes part with zeros, or other ranks would wait for it; its
    own state and value stay as they are.
    """

    def __init__(
        self,
        params: list[Tensor],
        group: dict,
        state: dict[Tensor, dict[str, Tensor]],
        check_signs: bool = False,
    ):
        self.rule, self.group, self._params, self._state = rule_named(group["rule"]), group, params, state
        self._check_signs = check_signs and self.rule.signs
        self.weights = [local_of(param) for param in params]
        self.has_grad = [param.grad is not None for param in params]
        self.rms = group[self.rule.rms] if self.rule.rms else None
        factor = self.rule.factor
        self.factor: Factor | None = partial(factor, group) if factor else None
        self.refines = self.rule.refine is not None

    def prepare(self, members: list[int]) -> Tensors:
        """Read gradients and state, move the state; returns new tensors."""
        assert self.rule.prepare
        return self.rule.prepare(self._grads(members), self.state(members), self.group)

    def direct(self, stack: Tensor) -> Tensor:
        """Return the directions of whole matrices, (b, m, n) -> (b, m, n)."""
        assert self.rule.direct
        directions = self.rule.direct(stack, self.group)
        if self._check_signs and not (directions.is_meta or torch.compiler.is_compiling()):
            _refuse_other_than_signs(directions, self.rule.name)
        return directions

    def refine(self, members: list[int], directions: Tensors) -> Tensors:
        """Return the shards of the directions, refined elementwise."""
        if self.rule.refine is None:
            return directions
        return self.rule.refine(directions, self.state(members), self.group)

    def apply(self, members: list[int], directions: Tensors) -> None:
        """Decay the weights that have a gradient, and step against their directions."""
        has_grad = [self.has_grad[i] for i in members]
        weights = list(compress((self.weights[i] for i in members), has_grad))
        directions = list(compress(directions, has_grad))
        if not weights:
            return
        lr = self.group["lr"]
        if self.group["weight_decay"]:
            each("mul_", weights, 1 - lr * self.group["weight_decay"])
        if isinstance(lr, Tensor):  # stays one, so that a step in a CUDA graph reads the schedule's
            each("mul_", directions, -lr)
            lr = -1
        each("add_", weights, directions, alpha=-lr)

    def whole_step(self) -> None:
        """Run a rule that does everything in a kernel of its own."""
        members = [i for i, has_grad in enumerate(self.has_grad) if has_grad]
        if members and self.rule.whole_step:
            weights = [self.weights[i] for i in members]
            self.rule.whole_step(weights, self._grads(members), self.state(members), self.group)

    def state(self, members: list[int]) -> dict[str, Tensors]:
        """Return this process's shards of the state, by name; zeros to throw away for parameters without gradient."""
        return {name: [self._shard(i, name) for i in members] for name in self.rule.state + self.rule.scalars}

    def _shard(self, i: int, name: str) -> Tensor:
        shard = local_of(self._state[self._params[i]][name])
        return shard if self.has_grad[i] else torch.zeros_like(shard)

    def _grads(self, members: list[int]) -> Tensors:
        return [gradient_of(self._params[i], self.group) for i in members]


def _refuse_other_than_signs(directions: Tensor, rule: str) -> None:
    """Raise ValueError for an entry that one bit cannot carry, also where nothing is sent."""
    other = (directions != 0) & (directions.abs() != 1) & ~directions.isnan()
    if other.any():
        raise ValueError(
            f"rule {rule!r} says signs=True, so its direction must be -1, 0, 1 or NaN, got "
            f"{directions[other][0].item():g}; return signs, or register it with signs=False"
        )


def gradient_of(param: Tensor, group: dict) -> Tensor:
    """Return this process's shard of the gradient, in the wider of its own dtype and the state's; zeros for none."""
    grad = param.grad
    if grad is None:
        return torch.zeros_like(local_of(param), dtype=grad_dtype(param, group))
    if grad.is_sparse:
        raise ValueError(
            f"{group['rule']} needs dense gradients, got sparse ones; build the embedding with sparse=False"
        )
    if isinstance(grad, DTensor) and isinstance(param, DTensor):
        if grad.placements != param.placements:  # tensor parallelism may leave it Partial
            grad = grad.redistribute(placements=param.placements)
    return local_of(grad).to(torch.promote_types(grad.dtype, state_dtype(param, group)))
