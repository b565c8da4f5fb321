"""The isotropic curvature model: the best spectrum of a step if curvature grows like a power of its length.

The model asks for the step Q that minimises -tr(Q G') + E H(||Q zeta||), zeta uniform on the unit sphere. Q keeps the
singular vectors of G; for H(r) = r^p its singular values s solve, up to one factor for all,

    sigma_i = s_i E[rho^(p-2) zeta_i^2],        rho^2 = sum_j s_j^2 zeta_j^2.

p = 2 returns the gradient; the larger p, the more even s; no power makes it flat, as Muon does: a kink of H does.
The order is kept, and s_i / s_j <= sigma_i / sigma_j.

Su, "Isotropic curvature model for understanding deep learning optimization", arXiv 2511.00674. The expectation as one
integral, and the iteration without an SVD, are ours.
"""

from math import exp, gamma, sqrt

import torch
from torch import Tensor

from .checks import BadValue

# The quadrature runs over log t from _LOW to _HIGH / (q + 1/2): t exp(-t x) and the far tail are then below 1e-11.
_LOW, _HIGH, _NODES = -26.0, 26.0, 400
_ITERATIONS = 200  # each shrinks the error of log s by 2/3 or more


def homogenize(matrices: Tensor, power: float = 4.0, iterations: int = 0, eps: float = 1e-7) -> Tensor:
    """Return the model's step for each matrix, of Frobenius norm sqrt(min(m, n)): that of the polar factor.

    Args:
        matrices: (batch, m, n); a zero matrix stays zero.
        power: p of H(r) = r^p, from 2 (the gradient itself) to 4.
        iterations: 0 takes an SVD, in float64. More are steps of gradient descent on the model itself, by matrix
            products alone: `_descend`.
        eps: floor of the Frobenius norm that each matrix is divided by.

    Raises ValueError for a power or a number of iterations out of range.
    """
    check(power, iterations)
    rank = min(matrices.shape[-2:])
    wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    wide = wide / torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True).clamp(min=eps)
    if iterations:
        step = _descend(wide, power, iterations)
    else:
        u, sigma, vh = torch.linalg.svd(wide.double(), full_matrices=False)
        step = (u * spectrum(sigma, power).unsqueeze(-2)) @ vh
    norm = torch.linalg.vector_norm(step, dim=(-2, -1), keepdim=True)
    return (step * torch.where(norm == 0, norm, sqrt(rank) / norm)).to(matrices.dtype)


def check(power: float, iterations: int) -> None:
    """Raise ValueError for arguments that `homogenize` does not support."""
    if not isinstance(power, int | float) or not 2 <= power <= 4:
        raise BadValue(f"power must be a number from 2 (the gradient) to 4; got {power!r}")
    if not isinstance(iterations, int) or not 0 <= iterations <= 100:
        raise BadValue(f"iterations must be a whole number from 0 (an SVD) to 100; got {iterations!r}")


def spectrum(sigma: Tensor, power: float) -> Tensor:
    """Return s (batch, k) for sigma (batch, k) >= 0, up to one factor per row, float64; zeros stay zero.

    A fixed point in logarithms: s <- s^(1 - t) (sigma / weight)^t with t = 1 / (p - 1). The weights have degree
    p - 2 in s, and the Jacobian's eigenvalues lie between 0 and (p - 2) / (p - 1).
    """
    sigma = sigma.double()
    if power == 2:
        return sigma
    largest = sigma.amax(-1, keepdim=True)
    sigma = sigma / torch.where(largest == 0, 1.0, largest)
    s = sigma.clone()
    for _ in range(_ITERATIONS):
        moved = s.pow((power - 2) / (power - 1)) * (sigma / expectations(s, power)).pow(1 / (power - 1))
        done = torch.allclose(moved, s, rtol=1e-12, atol=0)
        s = moved
        if done:
            break
    return s


def expectations(s: Tensor, power: float) -> Tensor:
    """Return E[rho^(p-2) g_i^2] (batch, k) for standard normal g, to which the sphere's is proportional; 2 < p <= 4.

    For p = 4 it is 2 s_i^2 + sum s^2. Otherwise, with q = p / 2 - 1 and x = rho^2,
    x^q = 1 / Gamma(1 - q) int t^-q x exp(-t x) dt, and the expectation of g_i^2 x exp(-t x) is a product of
    one-dimensional ones. The trapezoidal rule in log t converges exponentially. Powers of total are left out for p < 4.
    """
    v = s.square()
    total = v.sum(-1, keepdim=True)
    if power == 4:
        return 2 * v + torch.where(total == 0, 1.0, total)
    q = power / 2 - 1
    scaled = v / torch.where(total == 0, 1.0, total)
    nodes = torch.linspace(_LOW, _HIGH / (q + 0.5), _NODES, dtype=torch.float64, device=s.device)
    width = (nodes[1] - nodes[0]).item()
    t = nodes.exp()[:, None, None]  # (nodes, 1, 1)
    shrunk = 1 / (1 + 2 * t * scaled)  # (nodes, batch, k)
    decay = shrunk.log().sum(-1, keepdim=True).mul(0.5).exp()  # E exp(-t x)
    inner = decay * shrunk * ((scaled * shrunk).sum(-1, keepdim=True) + 2 * scaled * shrunk)
    above = (((1 - q) * nodes).exp()[:, None, None] * inner).sum(0)
    # Below the lowest node the integrand is t^(1-q) (1 + 2 scaled): the rest of the rule is a geometric series.
    ratio = exp(-(1 - q) * width)
    below = exp((1 - q) * _LOW) * ratio / (1 - ratio) * (1 + 2 * scaled)
    return (above + below) * width / gamma(1 - q)


def _descend(matrices: Tensor, power: float, iterations: int) -> Tensor:
    """Solve S E(S'S) = G from matrix products alone: G (batch, m, n) of Frobenius norm 1, E as in `expectations`.

    S minimizes a convex function, by gradient descent from the best multiple of G. E is smooth in the eigenvalues of
    S S' and is replaced by a quadratic polynomial that agrees with it at 0, at the bound ||S S'||_F on the largest, and
    at half of that. One step costs as much as one of Newton-Schulz, and less for p = 4, where E is linear.
    """
    wide = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    square, q = wide @ wide.mT, power / 2 - 1
    _, fourth = _sums(square)
    length = _moment(torch.ones_like(fourth), 2 * fourth, q + 1).pow(-1 / (power - 1)).to(wide.dtype)
    s, square = length * wide, length.square() * square
    for iteration in range(iterations):
        if iteration:
            square = s @ s.mT  # (batch, m, m)
        total, fourth = _sums(square)
        top = fourth.sqrt()
        low, middle, high = (_moment(total + 2 * v, 2 * fourth + 4 * v * v, q) for v in (0 * top, top / 2, top))
        linear, quadratic = (4 * middle - 3 * low - high) / top, 2 * (low - 2 * middle + high) / fourth
        # The second derivative lies between E(0) and E + 2 v E'(v) at the top, or p - 1 times the mean E along S.
        along = (power - 1) * _moment(total, 2 * fourth, q + 1) / total
        steepest = torch.maximum(high + 2 * top * (linear + 2 * quadratic * top), along)
        rate = 2 / (low + steepest).clamp(min=torch.finfo(s.dtype).tiny)
        rate, low, linear, quadratic = (each.to(s.dtype) for each in (rate, low, linear, quadratic))
        weight = linear * square
        if power < 4:
            weight += quadratic * (square @ square)
        s = s - rate * (weight @ s + low * s - wide)
    return s.mT if matrices.shape[-2] > matrices.shape[-1] else s


def _sums(square: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of s^2 and of s^4 for S S' (batch, m, m): (batch, 1, 1) in float64; of S = 0 as if of s = 1."""
    total = square.diagonal(dim1=-2, dim2=-1).double().sum(-1)[..., None, None]
    total = torch.where(total > 0, total, 1.0)
    fourth = square.square().sum((-2, -1), keepdim=True).double()
    return total, torch.maximum(fourth, total.square() / square.shape[-1])


def _moment(mean: Tensor, variance: Tensor, exponent: float) -> Tensor:
    """Return E[x^exponent] of the gamma distribution of this mean and variance.

    It is exact for exponent 1 and for x = s^2 g^2 of one normal g; for a weighted sum of such, near.
    """
    shape = mean.square() / variance
    return (variance / mean).pow(exponent) * torch.exp(torch.lgamma(shape + exponent) - torch.lgamma(shape))
