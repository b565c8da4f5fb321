"""The convergence theorem of PolarGrad, checked along a run on the quadratic problem.

Lau, Long and Su, arXiv 2505.21799: for an L-smooth, mu-strongly convex f, the step X - nu U / (L r), with G = U H the
polar decomposition, nu = tr H and r the rank of G, shrinks f - f* by 1 - 1 / (r kappa) or more, kappa = L / mu, and by
1 - 1 / (kappa_G^2 kappa), kappa_G being G's condition number.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from scripts.problems.objectives import Problem
from scripts.problems.running import Method, run


class Checked(NamedTuple):
    """The factor by which each step of each seed exceeds the theorem's bound, (steps, S): 1 or more if it holds."""

    by_rank: Tensor  # (1 - ratio) r kappa
    by_condition: Tensor  # (1 - ratio) kappa_G^2 kappa


def check(problem: Problem, steps: int, down_to: float = 1e-10) -> Checked:
    """Run PolarGrad without momentum at the theorem's rate; steps at which f - f* is below `down_to` of its start
    are left out (infinite), their ratios being rounding."""
    assert problem.convexity is not None
    rank = min(problem.start[0].shape[-2:])  # every gradient of the run has full rank
    course = run(problem, PLAIN, [1 / rank], False, steps)
    gap, condition = course.gap[:, 0], course.condition[:, 0]  # (steps + 1, S)
    shrunk = 1 - gap[1:] / gap[:-1]
    rounded = gap[1:] < down_to * gap[0]
    promised = (1 / rank, 1 / condition[:-1].square())
    return Checked(*(torch.where(rounded, torch.inf, shrunk / (each * problem.convexity)) for each in promised))


PLAIN = Method("PolarGrad", "polargrad", {"inner_steps": 0, "momentum": 0.0})
