"""Run an optimizer on a problem at many rates at once, and find the best of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimizers import RULES, RuleOptimizer
from scripts.problems.objectives import Params, Problem

DECAYED = 1e-3  # last rate of a decaying schedule, over the first
SOLVED = 1e-16  # share of the first gap below which a problem is solved to rounding
LOST = 1e3  # times the first value: the rate diverges, and its run ends
RATES = tuple(2.0**k for k in range(-13, 10))


@dataclass(frozen=True)
class Method:
    """An optimizer with its options; `look` is the rule whose colour it has in figures."""

    label: str
    rule: str
    options: dict[str, Any] = field(default_factory=dict)


EXACT = {"ns_form": "qdwh"}  # the exact polar factor, so that only the rules differ
METHODS = (
    Method("Adam", "adamw"),
    Method("Lion", "lion"),
    Method("Signum", "signum"),
    Method("Muon", "muon", EXACT),
    Method("OLion", "olion", EXACT),
    Method("PolarGrad", "polargrad", {"inner_steps": 0, "momentum": 0.9}),
    Method("PolarGrad, no momentum", "polargrad", {"inner_steps": 0, "momentum": 0.0}),
    Method("Curvature", "curvature"),
)


class Course(NamedTuple):
    """A course of values over recorded steps, each (points, R, S) for R rates and S seeds; NaN after a divergence."""

    gap: Tensor  # f - f*
    norm: Tensor  # of the whole gradient
    condition: Tensor  # kappa_G: the largest over the smallest singular value of a gradient, the largest of several


def run(
    problem: Problem,
    method: Method,
    rates: Sequence[float],
    decays: bool,
    steps: int,
    every: int = 1,
    watch: Callable[[int, RuleOptimizer, Params], None] | None = None,
) -> Course:
    """Take `steps` steps at each rate and record every so many of them, the first and the last.

    The rates share one run: the engine steps at rate 1, and each row scales that step by its rate. `watch` is called
    before each step with its number, the optimizer and the parameters (R S, m, n), which have their gradients.
    """
    count, each = len(rates), torch.tensor(rates, dtype=torch.float64).view(-1, 1)  # (R, 1)
    start = [tensor.expand(count, *tensor.shape).flatten(0, 1) for tensor in problem.start]  # (R S, m, n)
    params = [tensor.clone().requires_grad_() for tensor in start]
    options = method.options | {"lr": 1.0, "weight_decay": 0.0}
    if "as_matrices" in RULES[method.rule].defaults:
        options["as_matrices"] = "batch"
    optimizer = RuleOptimizer(params, method.rule, **options)
    rows, seeds = [], len(problem.least)
    alive = torch.ones(count, seeds, dtype=torch.bool)
    first = problem.value(problem.start)  # (S,)
    for step in range(steps + 1):
        values, grads = _evaluate(problem, params, count)
        alive &= values <= LOST * first  # false of NaN, too
        for param, begin in zip(params, start, strict=True):
            param.data[~alive.flatten()] = begin[~alive.flatten()]
        if step in points(steps, every):
            rows.append(_measured(values - problem.least, grads, alive))
        if step == steps:
            break
        before = [param.detach().clone() for param in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.where(alive.view(-1, 1, 1), grad, 0.0)
        if watch:
            watch(step, optimizer, params)
        optimizer.step()
        now = each * (DECAYED ** (step / steps) if decays else 1.0) * alive  # (R, S)
        for param, old in zip(params, before, strict=True):
            param.data.copy_(old + now.view(-1, 1, 1) * (param.data - old))
    return Course(*(torch.stack(column) for column in zip(*rows, strict=True)))


def points(steps: int, every: int) -> list[int]:
    """Return the recorded steps."""
    return [*range(0, steps, every), steps]


def _evaluate(problem: Problem, params: Params, count: int) -> tuple[Tensor, Params]:
    """Return values (R, S) and gradients (R S, m, n)."""
    values = problem.value([param.unflatten(0, (count, -1)) for param in params])
    return values.detach(), list(torch.autograd.grad(values.sum(), params))


def _measured(gap: Tensor, grads: Params, alive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    finite = [torch.where(alive.view(-1, 1, 1), grad, 0.0) for grad in grads]
    norm = torch.stack([grad.square().sum((1, 2)) for grad in finite]).sum(0).sqrt()
    sigmas = [torch.linalg.svdvals(grad) for grad in finite]
    condition = torch.stack([sigma[:, 0] / sigma[:, -1] for sigma in sigmas]).amax(0)
    found = (gap, norm.view_as(gap), condition.view_as(gap))
    return tuple(torch.where(alive, each, torch.nan) for each in found)


def scores(problem: Problem, course: Course) -> Tensor:
    """Return log10 of the last gap over the first, (R, S); infinite if the rate diverged."""
    left = (course.gap[-1] / course.gap[0]).clamp(min=SOLVED).log10()
    return torch.where(left.isnan(), torch.inf, left)


class Tuned(NamedTuple):
    """The best rate, whether higher and lower rates were tried, and its course (points, S)."""

    rate: float
    bracketed: bool
    course: Course


def tune(
    problem: Problem, method: Method, decays: bool, steps: int, rates: Sequence[float] = RATES, every: int = 1
) -> Tuned:
    """Find the rate of the lowest mean log gap over the seeds."""
    course = run(problem, method, rates, decays, steps, every)
    means = scores(problem, course).mean(1)  # (R,)
    best = int(means.argmin())
    inside = 0 < best < len(rates) - 1
    return Tuned(rates[best], inside, Course(*(each[:, best] for each in course)))


def newton(problem: Problem, steps: int, every: int = 1) -> Course:
    """Take `steps` steps of Newton's method, recorded as (points, S)."""
    params, rows = [tensor.clone().requires_grad_() for tensor in problem.start], []
    for step in range(steps + 1):
        values, grads = _evaluate(problem, params, 1)
        if step in points(steps, every):
            rows.append(_measured(values - problem.least, grads, torch.ones_like(values, dtype=torch.bool)))
        if step < steps:
            moved = problem.newton([param.detach() for param in params])
            params = [tensor.requires_grad_() for tensor in moved]
    return Course(*(torch.stack(column)[:, 0] for column in zip(*rows, strict=True)))
