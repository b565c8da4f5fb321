"""Is diagonal isotropy necessary? Quadratics with a dial from gradients of random singular vectors to the worst.

    f(X) = 1/2 ||P (X - X*) R||^2 / L,    P = U diag(p) U', R = V diag(q) V', condition number of f about 100

At dial 0 all structures are equal: U and V Haar, X* Gaussian. At dial 1:

    aligned    U and V are coordinate axes, X* has rank 4 in them: the gradient's singular vectors are single entries
    rows       three quarters of the rows do not change f
    blocks     P, R and X* are block diagonal, in 4 blocks: most entries of the gradient are small
    columns    columns are scaled by a Pareto tail of index 1

At dial t, U is the polar factor of (1 - t) Haar + t (its form at 1), and parts that vanish at 1 are scaled by 1 - t.
At 1 the small entries of aligned and blocks are zero, and so are their signs: the worst case lies just before it. The
record holds the distance of OLion's last gap to Muon's, each at its best rate, and eps of the matrices that
OLion orthogonalizes (`optimizers/measures.py`), over its value for a Haar matrix, mean over the run.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers import RULES
from optimizers.measures import direction
from optimizers.polar import orthogonalize
from scripts.problems.objectives import Problem, gaussian
from scripts.problems.running import EXACT, Method, run, scores

DIALS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
STRUCTURES = ("aligned", "rows", "blocks", "columns")
SHAPE, BLOCKS, RANK = (32, 16), 4, 4
OURS, OTHERS = Method("OLion", "olion", EXACT), (Method("Muon", "muon", EXACT), Method("Lion", "lion"))
RATES = tuple(2.0**k for k in range(-7, 7))
EVERY = 10  # steps between measurements of isotropy


def blocks_of(matrix: Tensor) -> Tensor:
    """Return a matrix (..., m, n) with its entries outside BLOCKS blocks on the diagonal set to zero."""
    m, n = matrix.shape[-2:]
    row, column = torch.arange(m) * BLOCKS // m, torch.arange(n) * BLOCKS // n
    return matrix * (row[:, None] == column)


def basis(start: Tensor, end: Tensor, dial: float) -> Tensor:
    """Return an orthogonal matrix between two orthogonal matrices."""
    return orthogonalize((1 - dial) * start + dial * end, form="svd", dtype=start.dtype)


def bent(structure: str, dial: float, seeds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return P (S, m, m), R (S, n, n) and X* (S, m, n) of a structure at a dial."""
    m, n = SHAPE
    u, v, target = (gaussian(seeds, *shape) for shape in ((m, m), (n, n), SHAPE))
    u, v = (orthogonalize(each, form="svd", dtype=each.dtype) for each in (u, v))
    if structure == "aligned":
        u, v = basis(u, torch.eye(m).double().expand_as(u), dial), basis(v, torch.eye(n).double().expand_as(v), dial)
        low = u[:, :, :RANK] @ v[:, :, :RANK].mT
        target = (1 - dial) * target + dial * low * (m * n / RANK) ** 0.5  # of the same size
    if structure == "blocks":
        u, v = (basis(each, orthogonalize(blocks_of(each), form="svd", dtype=each.dtype), dial) for each in (u, v))
        target = (1 - dial) * target + dial * blocks_of(target)
    p, q = (torch.logspace(0, -0.5, size, dtype=torch.float64) for size in SHAPE)
    left, right = u * p @ u.mT, v * q @ v.mT
    if structure == "rows":
        left = left * torch.where(torch.arange(m) < m // 4, 1.0, 1 - dial)
    if structure == "columns":
        uniform = torch.erf(gaussian(seeds, n, 1) / 2**0.5) / 2 + 0.5
        scale = uniform.pow(-dial)
        right = scale / scale.amax(1, keepdim=True) * right
    return left, right, target


def problem(structure: str, seeds: Sequence[int], dials: Sequence[float] = DIALS) -> Problem:
    """Make one quadratic for each dial and seed, dials outermost."""
    left, right, target = (torch.cat(each) for each in zip(*(bent(structure, t, seeds) for t in dials), strict=True))
    largest = (torch.linalg.matrix_norm(left, 2) * torch.linalg.matrix_norm(right, 2)).square()

    def value(params: list[Tensor]) -> Tensor:
        return (left @ (params[0] - target) @ right).square().sum((-2, -1)) / 2 / largest

    return Problem(structure, [torch.zeros_like(target)], value, torch.zeros(len(target), dtype=torch.float64))


def tuned(quadratics: Problem, method: Method, steps: int, dials: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best rate of each dial (dials,), whether it is bracketed, and log10 of the last gap (dials, seeds)."""
    left = scores(quadratics, run(quadratics, method, RATES, True, steps, steps)).unflatten(1, (dials, -1))
    best = left.mean(2).argmin(0)  # (dials,)
    inside = (best > 0) & (best < len(RATES) - 1)
    return torch.tensor(RATES)[best], inside, left[best, torch.arange(dials)]


def isotropy(quadratics: Problem, rates: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return eps over Haar's and flatness of OLion's mixed momentum, means over the run, (dials, seeds) each.

    rates: of each dial. One run steps all dials at all of these; each dial is measured at its own.
    """
    distinct, dials = sorted(set(rates.tolist())), len(rates)
    rows = torch.tensor([distinct.index(rate) for rate in rates.tolist()])  # of each dial
    found: list[tuple[Tensor, Tensor]] = []

    def watch(step: int, optimizer, params) -> None:
        if step % EVERY:
            return
        (param,), group = params, optimizer.param_groups[0]
        state = {"momentum": [optimizer.state[param]["momentum"].clone()]}
        (mixed,) = RULES["olion"].prepare([param.grad], state, group)
        of = direction(mixed, RULES["olion"].direct(mixed, group))
        both = (of["isotropy"] / of["isotropy_haar"], of["flatness"])
        shaped = [each.unflatten(0, (len(distinct), dials, -1)) for each in both]
        found.append(tuple(each[rows, torch.arange(dials)] for each in shaped))

    run(quadratics, OURS, distinct, True, steps, steps, watch)
    return tuple(torch.stack(each).mean(0) for each in zip(*found, strict=True))


def study(seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Record the gaps, rates and isotropy of every structure: lists over dials, and over seeds inside."""
    record: dict[str, Any] = {"seeds": list(seeds), "steps": steps, "dials": list(DIALS), "structures": {}}
    for structure in STRUCTURES:
        quadratics = problem(structure, seeds)
        found = {method.label: tuned(quadratics, method, steps, len(DIALS)) for method in (OURS, *OTHERS)}
        eps, flatness = isotropy(quadratics, found["OLion"][0], steps)
        record["structures"][structure] = {
            "eps": eps.tolist(),
            "flatness": flatness.tolist(),
            "methods": {
                label: {"rates": rates.tolist(), "bracketed": inside.tolist(), "left": left.tolist()}
                for label, (rates, inside, left) in found.items()
            },
        }
    return record


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Return Spearman's correlation; ties are ranked in their order."""
    ranks = torch.stack([each.flatten().argsort().argsort().double() for each in (x, y)])
    return float(torch.corrcoef(ranks)[0, 1])


def behind(of: dict[str, Any], other: str = "Muon") -> Tensor:
    """Return the decades by which OLion's last gap lies above another's, (dials, seeds)."""
    return torch.tensor(of["methods"]["OLion"]["left"]) - torch.tensor(of["methods"][other]["left"])
