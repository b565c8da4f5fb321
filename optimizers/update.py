"""The update of a route's parameters by their rule, in parts that the route calls."""

from collections.abc import Callable
from itertools import compress
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .checks import BadValue, name_of
from .elementwise import each
from .layout import local_of
from .matrices import row_dims, to_rms
from .quantized import SCALE, decoded, encode, groups_of_rows, in_int8, peaks_of
from .rounding import REMAINDER, is_compensated, is_rounded, joined, parted, random_bits, stochastic, uniform
from .rule import Tensors, UpdateRule
from .wire import all_reduce


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
        rule: UpdateRule,
        group: dict,
        indices: list[int],
        state: dict[Tensor, dict[str, Tensor]],
        check_signs: bool = False,
    ):
        self.rule, self.group, self._state = rule, group, state
        self._check_signs = check_signs and self.rule.signs
        # The group's own count moves on before the last directions have come.
        self._indices, self._step_number = indices, group.get("steps", 0)
        self.params = [group["params"][i] for i in indices]
        self.weights = [local_of(param) for param in self.params]
        self.has_grad = [param.grad is not None for param in self.params]
        self.rms = group[self.rule.rms] if isinstance(self.rule.rms, str) else self.rule.rms
        self.direct_rms = self.rms if self.rule.scales_directions else None

    def prepare(self, members: list[int]) -> Tensors:
        """Read gradients and state, update the state; return new tensors, this process's shards."""
        assert self.rule.prepare
        grads, buffers = [gradient_of(self.params[i], self.group) for i in members], self._buffers(members)
        prepared = self.rule.prepare(grads, buffers, self.group)
        self._keep(members, buffers)
        return prepared

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
            buffers = self._buffers(members, refining=True)
            if self.rule.rows:
                buffers["row_squares"] = self._row_squares(members, directions, sum_rows)
            directions = list(self.rule.refine(directions, buffers, self.group))
            self._keep(members, buffers)
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
        weights, lr = [self._opened(i) for i in members], self.group["lr"]
        if self.group["weight_decay"]:
            each("mul_", weights, 1 - lr * self.group["weight_decay"])
        if isinstance(lr, Tensor):  # stays one, so that a step in a CUDA graph reads the schedule's
            each("mul_", directions, -lr)
            lr = -1
        if any(map(self._is_rounded, members)):  # in the dtypes of the weights
            directions = [each.to(weight.dtype) for each, weight in zip(directions, weights, strict=True)]
        each("add_", weights, directions, alpha=-lr)
        self._close(members, weights)

    def _is_rounded(self, i: int) -> bool:
        return is_rounded(self.params[i], self.group)

    def _opened(self, i: int) -> Tensor:
        """Return a weight to be stepped: itself or, if it will be rounded, in float32."""
        if not self._is_rounded(i):
            return self.weights[i]
        if is_compensated(self.params[i], self.group):
            return joined(self.weights[i], local_of(self._state[self.params[i]][REMAINDER]))
        return self.weights[i].float()

    def _close(self, members: list[int], stepped: Tensors) -> None:
        """Round stepped weights into their own memory."""
        for i, wide in zip(members, stepped, strict=True):
            weight, param = self.weights[i], self.params[i]
            if wide is weight:
                continue
            if is_compensated(param, self.group):
                parted(wide, weight, local_of(self._state[param][REMAINDER]))
            elif self._is_rounded(i):
                stochastic(wide, weight, random_bits(param, self._key(i, "weight")))
            else:
                weight.copy_(wide)

    def whole_step(self) -> None:
        """Run a rule that does the whole update in one kernel, on tensors of one dtype."""
        members = [i for i, has_grad in enumerate(self.has_grad) if has_grad]
        if not members or not self.rule.whole_step:
            return
        weights, buffers = [self._opened(i) for i in members], self._buffers(members)
        grads = [gradient_of(self.params[i], self.group) for i in members]
        if in_int8(self.group) or any(map(self._is_rounded, members)):
            dtypes = [torch.promote_types(weight.dtype, torch.float32) for weight in weights]
            weights, grads = _in_dtypes(weights, dtypes), _in_dtypes(grads, dtypes)
            wide = {name: _in_dtypes(buffers[name], dtypes) for name in self.rule.state}
            self.rule.whole_step(weights, grads, {**buffers, **wide}, self.group)
            for name in wide:
                for buffer, stepped in zip(buffers[name], wide[name], strict=True):
                    if stepped is not buffer:
                        buffer.copy_(stepped)
        else:
            self.rule.whole_step(weights, grads, buffers, self.group)
        self._keep(members, buffers)
        self._close(members, weights)

    def _buffers(self, members: list[int], refining: bool = False) -> dict[str, Tensors]:
        """Return this process's shards of the state, by name; temporary zeros for parameters without gradient.

        Those in int8 are decoded, for `prepare` or for `refine`.
        """
        rule = self.rule
        names = rule.state + rule.scalars + rule.rows
        if in_int8(self.group):
            coded = set(rule.state) - set(rule.squares)
            names = [name for name in names if name not in coded or (name in rule.refined) == refining]
        return {name: [self._shard(i, name) for i in members] for name in names}

    def _shard(self, i: int, name: str) -> Tensor:
        state = self._state[self.params[i]]
        shard = local_of(state[name])
        if name + SCALE not in state:
            return shard if self.has_grad[i] else torch.zeros_like(shard)
        dtype = state_dtype(self.params[i], self.group)
        if not self.has_grad[i]:
            return torch.zeros_like(shard, dtype=dtype)
        return decoded(shard, local_of(state[name + SCALE]), dtype)

    def _keep(self, members: list[int], buffers: dict[str, Tensors]) -> None:
        """Encode the decoded buffers again, after a rule has written to them."""
        if not in_int8(self.group):
            return
        for name, tensors in buffers.items():
            kept = [(i, each) for i, each in zip(members, tensors, strict=True) if self._is_coded(i, name)]
            if not kept:
                continue
            peaks = [peaks_of(each, row_dims(self.params[i].shape, self.group)) for i, each in kept]
            for (i, values), peak in zip(kept, self._over_rows([i for i, _ in kept], peaks), strict=True):
                if self.has_grad[i]:
                    self._encode(i, name, values, peak)

    def _encode(self, i: int, name: str, values: Tensor, peaks: Tensor) -> None:
        param = self.params[i]
        at_random = self.group["state_dtype"] == "int8_stochastic"
        numbers = uniform(param, self._key(i, name)) if at_random else None
        codes, scales = (local_of(self._state[param][each]) for each in (name, name + SCALE))
        encode(codes, scales, values, peaks, numbers)

    def _key(self, i: int, purpose: str) -> str:
        """Return the key of the random numbers of a parameter at this step."""
        return f"{purpose} of {name_of(self.group, self._indices[i])} at step {self._step_number}"

    def _is_coded(self, i: int, name: str) -> bool:
        return name + SCALE in self._state[self.params[i]]

    def _over_rows(self, members: list[int], peaks: Tensors) -> Tensors:
        """Return the peaks of whole rows, of the peaks of their parts on this rank."""
        groups = [groups_of_rows(self.params[i], self.group) for i in members]
        if self.rule.direct and groups[0]:  # a bucket's matrices are alike
            return list(all_reduce(torch.stack(peaks), groups[0], "scales", dist.ReduceOp.MAX))
        # One by one: the chunks of an elementwise rule have their own lengths on each rank.
        return [all_reduce(peak, of, "scales", dist.ReduceOp.MAX) for peak, of in zip(peaks, groups, strict=True)]


def _in_dtypes(tensors: Tensors, dtypes: list[torch.dtype]) -> Tensors:
    return [tensor.to(dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]


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
    """Return the dtype of a parameter's state; if it is kept in int8, that of the rule's arithmetic."""
    if in_int8(group):
        return torch.promote_types(param.dtype, torch.float32)
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
