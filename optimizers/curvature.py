"""The isotropic curvature model: how much a spectrum should be evened out if curvature grows like a power of the step.

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

# The quadrature runs over log t from _LOW to _HIGH / (q + 1/2): t exp(-t x) and the far tail are then below 1e-11.
_LOW, _HIGH, _NODES = -26.0, 26.0, 400
_ITERATIONS = 200  # each shrinks the error of log s by 2/3 or more


def homogenize(matrices: Tensor, power: float = 4.0, iterations: int = 0, eps: float = 1e-7) -> Tensor:
    """Return the model's step for each matrix, of Frobenius norm sqrt(min(m, n)): that of the polar factor.

    Args:
        matrices: (batch, m, n); a zero matrix stays zero.
        power: p of H(r) = r^p, from 2 (the gradient itself) to 4.
        iterations: 0 takes an SVD, in float64. More are gradient descent on the model itself by matrix products
            alone, for p = 4: `_descend`.
        eps: floor of the Frobenius norm that each matrix is divided by.

    Raises ValueError for a power or a number of iterations that cannot be done.
    """
    check(power, iterations)
    rank = min(matrices.shape[-2:])
    wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    wide = wide / torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True).clamp(min=eps)
    if iterations:
        step = _descend(wide, iterations)
    else:
        u, sigma, vh = torch.linalg.svd(wide.double(), full_matrices=False)
        step = (u * spectrum(sigma, power).unsqueeze(-2)) @ vh
    norm = torch.linalg.vector_norm(step, dim=(-2, -1), keepdim=True)
    return (step * torch.where(norm == 0, norm, sqrt(rank) / norm)).to(matrices.dtype)


def check(power: float, iterations: int) -> None:
    """Raise ValueError for what `homogenize` cannot do."""
    if not isinstance(power, int | float) or not 2 <= power <= 4:
        raise ValueError(f"power must be a number from 2 (the gradient) to 4; got {power!r}")
    if not isinstance(iterations, int) or not 0 <= iterations <= 100:
        raise ValueError(f"iterations must be a whole number from 0 (an SVD) to 100; got {iterations!r}")
    if iterations and power != 4:
        raise ValueError(f"the iteration by matrix products is for power 4; got {power!r}: give iterations=0")


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


def _descend(matrices: Tensor, iterations: int) -> Tensor:
    """Solve 2 S S'S + ||S||_F^2 S = G, p = 4, from matrix products: G (batch, m, n) of Frobenius norm 1.

    It is the gradient of a convex function of S. Its second derivative lies, near the solution, between t = ||S||_F^2
    and t + 6 s_1^2, or 3 t along S: a spectrum that is spread over many values is solved in a few steps.
    """
    wide = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    gram = wide @ wide.mT
    # Start on the ray of G at the best length: minimise over z, with G of norm 1 and f4 the sum of sigma^4.
    fourth = gram.square().sum((-2, -1), keepdim=True)
    length = (2 * fourth + 1).pow(-1 / 3)
    s, square = length * wide, length.square() * gram
    for iteration in range(iterations):
        if iteration:
            square = s @ s.mT  # (batch, m, m)
        total = square.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        # 6 s_1^2 is at most 6 (sum of s^4)^(1/2), closer than the Frobenius norm.
        curved = total + 6 * square.square().sum((-2, -1), keepdim=True).sqrt()
        rate = 2 / (total + torch.maximum(curved, 3 * total)).clamp(min=torch.finfo(s.dtype).tiny)
        s = s - rate * (2 * square @ s + total * s - wide)
    return s.mT if matrices.shape[-2] > matrices.shape[-1] else s
