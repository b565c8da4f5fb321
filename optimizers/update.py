"""The update of a route's parameters by their rule, in parts that the route calls."""

from collections.abc import Callable
from itertools import compress
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .checks import BadValue
from .elementwise import each
from .layout import local_of
from .matrices import row_dims, to_rms
from .rule import Tensors, UpdateRule, rule_now


class Update:
    """One step of the parameters of a route, which names them by their indices in it.

    A route calls, for parameters that it chooses: `prepare`, `direct` on their whole matrices, `finish`. If other
    ranks take part, a parameter without a gradient sends zeros; its own state and value do not change.

    Attributes:
        params, weights: the parameters, and this process's shards of them.
        has_grad: whether each has a gradient.
        direct_rms: the root mean square entry that whole directions are scaled to; None leaves them.
    """

    def __init__(
        self,
        group: dict,
        indices: list[int],
        state: dict[Tensor, dict[str, Tensor]],
        check_signs: bool = False,
        rule: UpdateRule | None = None,
    ):
        self.rule, self.group, self._state = rule or rule_now(group), group, state
        self._check_signs = check_signs and self.rule.signs
        self.params = [group["params"][i] for i in indices]
        self.weights = [local_of(param) for param in self.params]
        self.has_grad = [param.grad is not None for param in self.params]
        self.rms = group[self.rule.rms] if isinstance(self.rule.rms, str) else self.rule.rms
        self.direct_rms = self.rms if self.rule.scales_directions else None

    def prepare(self, members: list[int]) -> Tensors:
        """Read gradients and state, update the state; return new tensors, this process's shards."""
        assert self.rule.prepare
        grads = [gradient_of(self.params[i], self.group) for i in members]
        return self.rule.prepare(grads, self._buffers(members), self.group)

    def dtype_of(self, member: int) -> torch.dtype:
        """Return the dtype of a parameter's prepared tensor, also where the gradient is on another rank."""
        param = self.params[member]
        dtype = grad_dtype(param, self.group)
        return dtype if param.grad is None else torch.promote_types(param.grad.dtype, dtype)

    def direct(self, stack: Tensor) -> Tensor:
        """Return the directions of whole matrices, (b, m, n) -> (b, m, n)."""
        assert self.rule.direct
        directions = self.rule.direct(stack, self.group)
        if self._check_signs and not (directions.is_meta or torch.compiler.is_compiling()):
            _refuse_other_than_signs(directions, self.rule.name)
        return directions

    def directions(self, stack: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a stack's directions in `dtype` (None: its own), scaled unless the rule scales refined directions."""
        directions = to_rms(self.direct(stack), self.direct_rms, dtype or stack.dtype)
        factor = self.factor(*stack.shape[1:])
        return directions if factor == 1 else directions.mul_(factor)

    def factor(self, m: int = 0, n: int = 0) -> float:
        """Return the factor of the directions of (m, n) matrices; 1 where the rule has none."""
        return self.rule.factor(self.group, m, n) if self.rule.factor else 1

    def finish(
        self,
        members: list[int],
        directions: Tensors,
        rescale: Callable[[Tensors, float], Tensors],
        multiply: Callable[[Tensors], Tensors],
        sum_rows: Callable[[Tensors], Tensors] = lambda sums: sums,
    ) -> None:
        """Refine the shards of directions, and step the weights that have a gradient against them.

        rescale: scales refined shards, so that the whole matrices have a root mean square entry.
        multiply: multiplies refined shards by the numbers of a sized rule.
        sum_rows: sums numbers per row over the shards of that row.
        """
        if self.rule.refine:
            buffers = self._buffers(members)
            if self.rule.rows:
                buffers["row_squares"] = self._row_squares(members, directions, sum_rows)
            directions = list(self.rule.refine(directions, buffers, self.group))
        if self.rule.sized:
            directions = multiply(directions)
        if self.rule.scales_refined:
            assert self.rms is not None
            directions = rescale(directions, self.rms)
        has_grad = [self.has_grad[i] for i in members]
        members, directions = list(compress(members, has_grad)), list(compress(directions, has_grad))
        if not members:
            return
        self._step(members, directions)

    def _row_squares(self, members: list[int], directions: Tensors, sum_rows: Callable) -> Tensors:
        """Return the mean square entry of each row of whole matrices."""
        shapes = [self.params[i].shape for i in members]
        dims = [row_dims(shape, self.group) for shape in shapes]
        sums = [
            direction.square().sum(tuple(range(first, direction.ndim)), keepdim=True, dtype=torch.float64)
            for direction, first in zip(directions, dims, strict=True)
        ]
        columns = [prod(shape[first:]) for shape, first in zip(shapes, dims, strict=True)]
        means = [total / n for total, n in zip(sum_rows(sums), columns, strict=True)]
        return [mean.to(direction.dtype) for mean, direction in zip(means, directions, strict=True)]

    def _step(self, members: list[int], directions: Tensors) -> None:
        """Decay weights, and step against their directions."""
        weights, lr = [self.weights[i] for i in members], self.group["lr"]
        if self.group["weight_decay"]:
            each("mul_", weights, 1 - lr * self.group["weight_decay"])
        if isinstance(lr, Tensor):  # stays one, so that a step in a CUDA graph reads the schedule's
            each("mul_", directions, -lr)
            lr = -1
        each("add_", weights, directions, alpha=-lr)

    def whole_step(self) -> None:
        """Run a rule that does the whole update in one kernel."""
        members = [i for i, has_grad in enumerate(self.has_grad) if has_grad]
        if members and self.rule.whole_step:
            weights, grads = (
                [self.weights[i] for i in members],
                [gradient_of(self.params[i], self.group) for i in members],
            )
            self.rule.whole_step(weights, grads, self._buffers(members), self.group)

    def _buffers(self, members: list[int]) -> dict[str, Tensors]:
        """Return this process's shards of the state, by name; temporary zeros for parameters without gradient."""
        names = self.rule.state + self.rule.scalars + self.rule.rows
        return {name: [self._shard(i, name) for i in members] for name in names}

    def _shard(self, i: int, name: str) -> Tensor:
        shard = local_of(self._state[self.params[i]][name])
        return shard if self.has_grad[i] else torch.zeros_like(shard)


def _refuse_other_than_signs(directions: Tensor, rule: str) -> None:
    """Raise ValueError for an entry other than -1, 0, 1 and NaN, even if nothing is sent."""
    other = (directions != 0) & (directions.abs() != 1) & ~directions.isnan()
    if other.any():
        raise BadValue(
            f"rule {rule!r} has signs=True, so its direction must be -1, 0, 1 or NaN, got "
            f"{directions[other][0].item():g}; return signs, or register it with signs=False"
        )


# --- precisions


def state_dtype(param: Tensor, group: dict) -> torch.dtype:
    """Return the dtype of a parameter's state."""
    return group.get("state_dtype") or param.dtype


def grad_dtype(param: Tensor, group: dict) -> torch.dtype:
    """Return the dtype in which `prepare` gets a gradient of the parameter's own dtype."""
    return torch.promote_types(param.dtype, state_dtype(param, group))


def gradient_of(param: Tensor, group: dict) -> Tensor:
    """Return this process's shard of the gradient, in the wider of its own dtype and the state's; zeros for none."""
    grad = param.grad
    if grad is None:
        return torch.zeros_like(local_of(param), dtype=grad_dtype(param, group))
    if grad.is_sparse:
        raise BadValue(f"{group['rule']} needs dense gradients, got sparse ones; build the embedding with sparse=False")
    if isinstance(grad, DTensor) and isinstance(param, DTensor):
        if grad.placements != param.placements:  # tensor parallelism may leave it Partial
            grad = grad.redistribute(placements=param.placements)
    return local_of(grad).to(torch.promote_types(grad.dtype, state_dtype(param, group)))
