"""The polar factor by QDWH: QR-based, dynamically weighted Halley iteration, accurate whatever the condition number.

Each step maps every singular value s to s (a + b s²) / (1 + c s²), with a, b, c the best for all s in [l, 1]; then
l moves to its own image. The slope at zero is a: 3.4 for Jordan's polynomial, 7e10 for the first step from l = 2e-16;
six steps are enough in float64 and four in float32.

Nakatsukasa, Bai and Gygi, "Optimizing Halley's iteration for computing the matrix polar decomposition", SIAM J. Matrix
Anal. Appl. 31 (2010): formulas (3.9) to (3.11) for the weights, section 4 for the QR form, and for the Cholesky form,
which is twice as fast and accurate once c is small.
"""

from math import sqrt

import torch
from torch import Tensor

_CHOLESKY_BELOW = 100.0  # Nakatsukasa and Higham 2013: below this c, I + c X'X is well enough conditioned


def qdwh(matrices: Tensor, eps: float = 1e-7, steps: int | None = None) -> Tensor:
    """Return the polar factor of each (m, n) of a stack (batch, m, n), in float32 or, for float64, float64.

    Singular values above the dtype's eps times the Frobenius norm become 1; smaller ones are rounding, and their images
    are arbitrary between 0 and 1. A zero matrix stays zero. eps: floor of that norm. Nothing is read back to the
    host: the number of steps follows from the dtype alone, or is given: after 2 in float32, singular values of more
    than eps lie in [0.3, 1], most of them near 1.
    """
    m, n = matrices.shape[-2:]
    tall = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    tall = tall.mT if m < n else tall
    x = tall / torch.linalg.vector_norm(tall, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for a, b, c in weights(torch.finfo(x.dtype).eps)[:steps]:
        x = _qr_step(x, a, b, c) if c > _CHOLESKY_BELOW else _cholesky_step(x, a, b, c)
    return x.mT if m < n else x


def weights(smallest: float) -> list[tuple[float, float, float]]:
    """Return (a, b, c) of each step; together they take singular values in [smallest, 1] to 1, within `smallest`."""
    steps, low = [], smallest
    while 1 - low > smallest and len(steps) < 8:  # six at 1e-16; the bound guards against rounding at the end
        square = low * low
        d = (4 * (1 - square) / (square * square)) ** (1 / 3)
        root = sqrt(1 + d)
        a = root + sqrt(8 - 4 * d + 8 * (2 - square) / (square * root)) / 2
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        steps.append((a, b, c))
        low = min(1.0, low * (a + b * square) / (1 + c * square))
    return steps


def _qr_step(x: Tensor, a: float, b: float, c: float) -> Tensor:
    """X <- b/c X + (a - b/c)/sqrt(c) Q1 Q2', with [sqrt(c) X; I] = [Q1; Q2] R: no X'X is formed."""
    rows, columns = x.shape[-2:]
    identity = torch.eye(columns, dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    q = torch.linalg.qr(torch.cat([sqrt(c) * x, identity], dim=1)).Q  # (batch, m + n, n)
    return torch.baddbmm(x, q[:, :rows], q[:, rows:].mT, beta=b / c, alpha=(a - b / c) / sqrt(c))


def _cholesky_step(x: Tensor, a: float, b: float, c: float) -> Tensor:
    """X <- b/c X + (a - b/c) X (I + c X'X)^-1."""
    gram = c * (x.mT @ x)
    gram.diagonal(dim1=-2, dim2=-1).add_(1)
    solved = torch.cholesky_solve(x.mT, torch.linalg.cholesky_ex(gram).L).mT
    return (b / c) * x + (a - b / c) * solved
