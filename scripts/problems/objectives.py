"""The objectives: one problem per seed, all of them evaluated at once on stacks of points, in float64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Params = list[Tensor]
NEWTON_STEPS = 100  # to the least value of the logistic problem; a dozen are enough


@dataclass(frozen=True)
class Problem:
    """S problems of one kind; S, their seeds, is the last but two dimension of every tensor."""

    title: str
    start: Params  # (S, m, n) each
    value: Callable[[Params], Tensor]  # (..., S, m, n) each -> (..., S)
    least: Tensor  # (S,)
    newton: Callable[[Params], Params] | None = None  # one step of Newton's method from (S, m, n)
    convexity: Tensor | None = None  # (S,): the strong convexity, the gradient's Lipschitz constant being 1


def gaussian(seeds: Sequence[int], *shape: int) -> Tensor:
    """Draw independent normal entries (S, *shape), a generator for each seed and shape."""
    drawn = [torch.randn(*shape, generator=_generator(seed, shape), dtype=torch.float64) for seed in seeds]
    return torch.stack(drawn)


def _generator(seed: int, shape: Sequence[int]) -> torch.Generator:
    place = seed
    for size in shape:  # independent for other shapes
        place = place * 1009 + size
    return torch.Generator().manual_seed(place)


def quadratic(seeds: Sequence[int], m: int = 24, n: int = 12) -> Problem:
    """Make 1/2 ||A X B - C||^2 / L with A (2 m, m), B (n, 5 n / 2) and C Gaussian."""
    a, b, c = gaussian(seeds, 2 * m, m), gaussian(seeds, n, 5 * n // 2), gaussian(seeds, 2 * m, 5 * n // 2)
    sides = [torch.linalg.svdvals(each).square() for each in (a, b)]
    largest = sides[0][:, 0] * sides[1][:, 0]  # (S,)

    def value(params: Params) -> Tensor:
        return (a @ params[0] @ b - c).square().sum((-2, -1)) / 2 / largest

    solution = torch.linalg.pinv(a) @ c @ torch.linalg.pinv(b)
    start = torch.zeros_like(solution)
    smallest = sides[0][:, -1] * sides[1][:, -1]
    return Problem(
        "Matrix quadratic regression",
        [start],
        value,
        value([solution]),
        newton=lambda params: [solution.clone()],  # the Hessian is constant: one step from anywhere
        convexity=smallest / largest,
    )


def logistic(seeds: Sequence[int], m: int = 24, n: int = 12) -> Problem:
    """Make sum log(1 + exp(-C * (A X B))) / L; C are the signs of A X0 B with noise of the same size."""
    a, b, x = gaussian(seeds, 2 * m, m), gaussian(seeds, n, 5 * n // 2), gaussian(seeds, m, n)
    clean = a @ x @ b
    labels = (clean + clean.std((1, 2), keepdim=True) * gaussian(seeds, *clean.shape[1:])).sign()
    largest = (torch.linalg.matrix_norm(a, 2) * torch.linalg.matrix_norm(b, 2)).square() / 4  # (S,)
    design = torch.einsum("sik,slj->sijkl", a, b).flatten(3, 4).flatten(1, 2)  # (S, p q, m n)

    def value(params: Params) -> Tensor:
        return torch.nn.functional.softplus(-labels * (a @ params[0] @ b)).sum((-2, -1)) / largest

    def newton(params: Params) -> Params:
        margin = labels * (a @ params[0] @ b)
        down = (labels * torch.sigmoid(-margin)).flatten(1)  # minus the loss's derivative
        weight = (torch.sigmoid(margin) * torch.sigmoid(-margin)).flatten(1)
        hessian = design.mT @ (weight.unsqueeze(2) * design)
        step = torch.linalg.solve(hessian, (design.mT @ down.unsqueeze(2))).reshape(params[0].shape)
        for halving in range(30):  # a full step can overshoot far from the solution
            moved = [params[0] + step / 2**halving]
            if bool((value(moved) <= value(params)).all()):
                return moved
        return params

    start = [torch.zeros_like(x)]
    solution, before = newton(start), start
    for _ in range(NEWTON_STEPS):
        if bool((value(solution) >= value(before)).all()):
            break
        solution, before = newton(solution), solution
    return Problem("Matrix logistic regression", start, value, value(solution), newton=newton)


def completion(seeds: Sequence[int], m: int = 32, n: int = 24, rank: int = 4, seen: float = 0.6) -> Problem:
    """Make 1/2 ||mask * (X Y' - M)||^2 / ||mask * M||^2, M = U V' of this rank, a share `seen` of its entries."""
    matrix = gaussian(seeds, m, rank) @ gaussian(seeds, n, rank).mT
    mask = (torch.erf(gaussian(seeds, m, n) / 2**0.5) / 2 + 0.5 < seen).double()  # the normal quantile
    size = (mask * matrix).square().sum((1, 2))

    def value(params: Params) -> Tensor:
        x, y = params
        return (mask * (x @ y.mT - matrix)).square().sum((-2, -1)) / 2 / size

    other = [seed + 1_000_003 for seed in seeds]  # the start must not be the solution
    start = [0.5 * gaussian(other, m, rank), 0.5 * gaussian(other, n, rank)]
    return Problem("Low-rank matrix completion", start, value, torch.zeros(len(seeds), dtype=torch.float64))


PROBLEMS: dict[str, Callable[[Sequence[int]], Problem]] = {
    "quadratic": quadratic,
    "logistic": logistic,
    "completion": completion,
}
