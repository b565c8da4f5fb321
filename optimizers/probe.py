"""Measures of matrices while they train: norms of weights, isotropy and signs of directions, spectra.

    optimizer = build_optimizer(model, "olion", lr=1e-3)
    metrics = probe(optimizer)          # between backward() and step(); {"probe/512x128/isotropy": 0.02, ...}

    watch = Probe(optimizer, every=100, matrices=("*.c_fc.weight",))
    for step in range(1, steps + 1):
        ...
        log(watch(step))                # {} but for the first step and every hundredth

A probe changes nothing: directions are computed on copies of the momentum, by a temporary optimizer.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import measures
from .checks import BadValue, closest
from .elsewhere import Elsewhere
from .engine import RuleOptimizer
from .measures import POINTS
from .owned import here
from .quantized import floating, in_int8
from .rule import UpdateRule
from .watched import Matrix, choose

NORMS = ("spectral", "max_abs", "frobenius", "stable_rank", "kurtosis")
QUANTITIES: dict[str, dict[str, int]] = {  # by name: the returned quantities, and the numbers of each
    "norms": {f"weight_{norm}": 1 for norm in NORMS},
    "isotropy": {"isotropy": 1, "isotropy_haar": 1},
    "hadamard": {"flatness": 1, "sign_spectral": 1},
    "flips": {"flipped_signs": 1},
    "alignment": {"alignment": 1},
    "cosine": {"cosine": 1},
    "spectrum": {"weight_entries": POINTS, "weight_singular_values": POINTS, "momentum_singular_values": POINTS},
}
OF_DIRECTIONS = ("isotropy", "hadamard", "flips", "alignment")
OF_GRADIENTS = (*OF_DIRECTIONS, "cosine")
DEFAULT = tuple(each for each in QUANTITIES if each != "spectrum")  # slow, and many numbers
_MOMENTA = ("momentum", "momentum_buffer", "exp_avg")  # of the rules here and of torch's optimizers


class Probe:
    """Measures an optimizer's matrices at the first step and every so many steps; see `probe` for the arguments.

    every: steps between measurements; None for never.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, every: int | None = 100, **chosen: Any):
        if every is not None and (not isinstance(every, int) or every < 1):
            raise BadValue(f"a probe's interval must be 1 step or more, or None for never; got {every!r}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise BadValue(f"a probe must have an optimizer to watch; got {type(optimizer).__name__}")
        self.every, self._optimizer = every, optimizer
        self._mean, quantities = chosen.pop("mean", True), chosen.pop("quantities", None)
        self._chosen = chosen
        if every is not None:
            self._quantities = _possible(quantities, [matrix.rule for matrix in choose(optimizer, **chosen)])

    def __call__(self, step: int) -> dict[str, float | list[float]]:
        """Measure if due before this step, counted from 1; a collective of the matrices' ranks."""
        due = self.every is not None and (step == 1 or step % self.every == 0)
        return self.measure() if due else {}

    @torch.no_grad()
    def measure(self) -> dict[str, float | list[float]]:
        """Measure now, between backward and step; also {"probe/ms": duration}. NaN and infinities are left out."""
        matrices = choose(self._optimizer, **self._chosen)  # parameters may have been moved or replaced
        if set(self._quantities) & set(OF_GRADIENTS) and all(each.param.grad is None for each in matrices):
            raise BadValue(
                "a probe of directions needs gradients, got none on any of its matrices; call it after backward() and "
                "before zero_grad()"
            )
        start = _now(matrices[0].param)
        rows: dict[str, list[Tensor]] = defaultdict(list)
        for turn, matrix in enumerate(matrices):
            label = matrix.label if self._mean else matrix.name
            rows[label].append(_measured(matrix, self._optimizer.state.get(matrix.param, {}), turn, self._quantities))
        found = {}
        for label, measured in rows.items():
            means = torch.stack(measured).nanmean(0).split(list(_sizes(self._quantities).values()))
            for name, mean in zip(_sizes(self._quantities), means, strict=True):
                if mean.isfinite().all():
                    found[f"probe/{label}/{name}"] = mean.tolist() if len(mean) > 1 else mean.item()
        return {**found, "probe/ms": (_now(matrices[0].param) - start) * 1e3}


def probe(optimizer: torch.optim.Optimizer, **chosen: Any) -> dict[str, float | list[float]]:
    """Measure an optimizer's matrices once, between backward() and step().

    Args:
        optimizer: of this package; of any other torch.optim, with `model`, weights and momentum are measured.
        model: needed if no rule here trains matrices (lion, adamw), to distinguish them from embeddings.
        roles: the `roles` that the optimizer was built with, if any.
        matrices: name patterns, of all matrices by default.
        per_shape: at most so many of each shape, evenly spaced over the depth (2); 0 for all.
        quantities: some of `QUANTITIES`; by default all that the optimizer's rule has except the spectrum;
            ("all",) includes it.
        mean: means over the matrices of one shape, "probe/512x128/..."; else by name.

    On any layout: every rank of a matrix must call it; the ranks share the matrices, and all get the result.
    Raises ValueError for a pattern that fits nothing, a quantity that the rule does not have, and missing gradients.
    """
    return Probe(optimizer, every=1, **chosen).measure()


# --- quantities


def _possible(quantities: Sequence[str] | None, rules: Sequence[UpdateRule | None]) -> tuple[str, ...]:
    """Return the quantities to measure; raise ValueError for one that a rule does not have."""
    wanted = DEFAULT
    if quantities and tuple(quantities) == ("all",):
        quantities, wanted = (), tuple(QUANTITIES)
    for each in quantities or ():
        if each not in QUANTITIES:
            names = f"{', '.join(QUANTITIES)}, or all by itself"
            raise BadValue(f"a probe measures {names}; got {each!r}{closest(each, QUANTITIES)}")
    barred: dict[str, str] = {}
    for rule in rules:
        if rule is None:
            barred |= dict.fromkeys(OF_GRADIENTS, "an optimizer that is not of this package has no rule to ask")
        elif rule.direct is None:
            barred |= dict.fromkeys(OF_DIRECTIONS, f"{rule.name} orthogonalizes nothing, so it has no directions")
    for each in quantities or ():
        if each in barred:
            left = ", ".join(name for name in QUANTITIES if name not in barred)
            raise BadValue(f"{each} cannot be measured: {barred[each]}; ask for {left}")
    return tuple(quantities or (each for each in wanted if each not in barred))


def _sizes(quantities: Sequence[str]) -> dict[str, int]:
    """Return the names of the results, and the numbers of each."""
    return {name: size for each in quantities for name, size in QUANTITIES[each].items()}


# --- measurements


def _measured(matrix: Matrix, buffers: Mapping[str, Any], turn: int, quantities: Sequence[str]) -> Tensor:
    """Return all numbers of one matrix, on all of its ranks; one of these computes, chosen in turn.

    NaN for quantities that have no value: of a matrix that is not finite, or without a gradient.
    """
    param, sizes = matrix.param, _sizes(quantities)
    precision = torch.promote_types(param.dtype, torch.float32)
    weight = _whole(param).to(precision)
    ranks = matrix.layout.ranks if matrix.layout else ()
    measuring = matrix.owner if matrix.owner is not None else ranks[turn % len(ranks)] if ranks else None
    grad = torch.full_like(weight, torch.nan)
    if param.grad is not None and not isinstance(param.grad, Elsewhere):
        grad = _whole(param.grad).to(precision)
    state = {name: _whole(each) for name, each in here(param, buffers).items() if isinstance(each, Tensor)}
    state = floating(state, precision)
    row = torch.zeros(sum(sizes.values()), dtype=torch.float64, device=weight.device)
    if measuring is None or measuring == dist.get_rank():
        found = _compute(matrix, weight, grad, state, quantities)
        unknown = row.new_full((POINTS,), torch.nan)
        row = torch.cat([found.get(name, unknown[:size]).reshape(size).to(row.dtype) for name, size in sizes.items()])
    for group in matrix.layout.groups if matrix.layout else ():
        dist.all_reduce(row, group=group)
    return row


def _compute(
    matrix: Matrix, weight: Tensor, grad: Tensor, state: dict[str, Tensor], quantities: Sequence[str]
) -> dict[str, Tensor]:
    """Measure one whole matrix (or the blocks of one), the means over its blocks."""
    momentum = next((state[name] for name in _MOMENTA if name in state), torch.full_like(weight, torch.nan))
    jobs: list[tuple[Any, tuple[Tensor, ...]]] = [(measures.norms, (weight,))] if "norms" in quantities else []
    rule, update = matrix.rule, torch.empty(0)
    if "spectrum" in quantities:
        jobs.append((measures.spectrum, (weight, momentum.to(weight.dtype))))
    if set(quantities) & set(OF_GRADIENTS):
        update = _update(matrix, grad, state)
        if "cosine" in quantities:
            jobs.append((measures.cosine, (grad, update)))
    if set(quantities) & set(OF_DIRECTIONS):
        assert rule is not None and rule.prepare is not None  # quantities of directions are of rules that have one
        copies = {name: [state[name].clone()] for name in rule.state}
        mixed = rule.prepare([grad], copies, matrix.group)[0]
        jobs.append((measures.direction, (mixed, update)))
    found = {}
    for measure, wholes in jobs:
        if all(whole.isfinite().all() for whole in wholes):  # LAPACK refuses others, or does not end
            by_shape = zip(*(matrix.blocks.stacks(whole[None]) for whole in wholes), strict=True)
            measured = [measure(*stacks) for stacks in by_shape]
            found |= {name: torch.cat([each[name] for each in measured]) for name in measured[0]}
    return {name: value.mean(0) for name, value in found.items()}


def _update(matrix: Matrix, grad: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Return D, the update of this matrix at a rate of 1 without decay: a zero one moves to -D."""
    assert matrix.rule is not None
    options: dict[str, Any] = {name: matrix.group[name] for name in matrix.rule.defaults}
    options |= {"lr": 1.0, "weight_decay": 0.0}
    if in_int8(options):
        options["state_dtype"] = None  # decoded
    stand_in = torch.zeros_like(grad)
    if "steps" in matrix.group:
        options["steps"] = matrix.group["steps"]  # the coming step may be one between orthogonalizations
    optimizer = RuleOptimizer([{"params": [stand_in], **options}], matrix.rule.name)
    for name, buffer in optimizer.state[stand_in].items():
        buffer.copy_(state[name])
    stand_in.grad = grad
    optimizer.step()
    return -stand_in


def _whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor, gathered from its ranks if it is sharded."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _now(tensor: Tensor) -> float:
    """Seconds on a clock, once the tensor's device has done its work."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
