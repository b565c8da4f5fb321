"""Measures of matrices, as pure functions: norms, spectrum, isotropy, closeness to a Hadamard matrix.

Each takes finite matrices (b, m, n) and returns {quantity: (b,)}, or (b, POINTS) for a distribution. Singular values
are exact (LAPACK's or cuSOLVER's SVD, in float32, or float64 for float64) up to EXACT_LIMIT rows or columns. Beyond it
spectral norms come from LANCZOS_STEPS Golub-Kahan-Lanczos steps, a lower bound (1e-5 below at 2048 x 2048 Gaussian
entries), the polar factor from QDWH, and measures that need all singular values or vectors are NaN.

Isotropy: Wang, Shen and Zhang, arXiv 2602.01105. With Z = U Sigma V' of rank r, S = sign(U V') and m_k = u_k' S v_k:
eps = sqrt(r) ||m - mean(m)|| / ||U V'||_1. The other measures are named after their formulas below.
"""

from math import pi, sqrt

import torch
from torch import Tensor

from .polar import orthogonalize

EXACT_LIMIT = 1024  # of the smaller side; an SVD of this size takes a few tenths of a second on a CPU core
LANCZOS_STEPS = 40
POINTS = 33  # of a distribution: its 0th, 1/32th, ... 32/32th quantile

Measures = dict[str, Tensor]


def norms(weight: Tensor) -> Measures:
    """Spectral, max-abs and Frobenius norm, stable rank (Frobenius / spectral)², kurtosis (3 for Gaussian entries)."""
    entries = weight.flatten(1)
    spectral, frobenius = spectral_norm(weight), torch.linalg.vector_norm(entries, dim=1)
    centered = entries - entries.mean(1, keepdim=True)
    return {
        "weight_spectral": spectral,
        "weight_max_abs": entries.abs().amax(1),
        "weight_frobenius": frobenius,
        "weight_stable_rank": (frobenius / spectral).square(),
        "weight_kurtosis": centered.pow(4).mean(1) / centered.square().mean(1).square(),
    }


def spectrum(weight: Tensor, momentum: Tensor) -> Measures:
    """Quantiles, from the smallest to the largest, of the weight's entries and of both matrices' singular values."""
    return {
        "weight_entries": quantiles(weight.flatten(1).sort(dim=1).values),
        "weight_singular_values": quantiles(singular_values(weight).flip(1)),
        "momentum_singular_values": quantiles(singular_values(momentum).flip(1)),
    }


def direction(mixed: Tensor, update: Tensor) -> Measures:
    """Measures of Z (b, m, n), the input of the orthogonalization, and of its direction D, of the same shape.

    isotropy, isotropy_haar: eps, and the level sqrt((pi/2 - 1) r / (m n)) of a random orthogonal matrix of rank r.
    flatness: ||Q||_1 / sqrt(r m n) of Z's polar factor Q; 1 for a Hadamard matrix, sqrt(2 / pi) for a random one.
    sign_spectral: sigma_max(sign(D)) / sqrt(max(m, n)); 1 for a Hadamard matrix.
    flipped_signs: share of entries whose sign in D is not that in Q, the exact orthogonalization.
    alignment: <Z, sign(D)> / ||Z||_nuclear over ||Q||_1 / r; 1 if Z is isotropic.
    """
    m, n = mixed.shape[1:]
    left, sigma, right = _factors(mixed)
    if left is None or sigma is None or right is None:
        q = orthogonalize(mixed, form="qdwh", dtype=mixed.dtype)
        rank, sigma_sum = q.square().sum((1, 2)).round(), (mixed * q).sum((1, 2))
        eps = torch.full_like(rank, torch.nan)
    else:
        present = sigma > sigma[:, :1] * max(m, n) * torch.finfo(sigma.dtype).eps  # (b, r)
        left = left * present.unsqueeze(1)
        q = left @ right
        rank, sigma_sum = present.sum(1, dtype=mixed.dtype), sigma.sum(1)
        agreements = (left * (q.sign() @ right.mT)).sum(1)  # m_k, (b, r)
        mean = agreements.sum(1) / rank
        deviation = torch.linalg.vector_norm((agreements - mean.unsqueeze(1)) * present, dim=1)
        eps = rank.sqrt() * deviation / q.abs().sum((1, 2))
    signs, total = update.sign(), q.abs().sum((1, 2))
    return {
        "isotropy": eps,
        "isotropy_haar": ((pi / 2 - 1) * rank / (m * n)).sqrt(),
        "flatness": total / (rank * m * n).sqrt(),
        "sign_spectral": spectral_norm(signs) / sqrt(max(m, n)),
        "flipped_signs": (signs * q < 0).to(q.dtype).mean((1, 2)),
        "alignment": (mixed * signs).sum((1, 2)) / sigma_sum * rank / total,
    }


def cosine(gradient: Tensor, update: Tensor) -> Measures:
    """The cosine of the angle between gradient and update, 1 for plain gradient descent."""
    return {"cosine": torch.nn.functional.cosine_similarity(gradient.flatten(1), update.flatten(1), dim=1, eps=0)}


def spectral_norm(stack: Tensor) -> Tensor:
    """Return the largest singular value of each (m, n): (b, m, n) -> (b,)."""
    tall = _tall(stack)
    if tall.shape[2] > EXACT_LIMIT:
        return torch.stack([_lanczos(matrix, LANCZOS_STEPS) for matrix in tall])
    return torch.linalg.eigvalsh(tall.mT @ tall)[:, -1].clamp(min=0).sqrt()  # squaring harms only small ones


def singular_values(stack: Tensor) -> Tensor:
    """Return all singular values, largest first, (b, m, n) -> (b, min(m, n)); NaN beyond EXACT_LIMIT."""
    tall = _tall(stack)
    if tall.shape[2] > EXACT_LIMIT:
        return torch.full_like(tall[:, 0], torch.nan)
    return torch.linalg.svdvals(_reduced(tall))


def quantiles(ascending: Tensor) -> Tensor:
    """Return POINTS evenly spaced quantiles of sorted rows, (b, k) -> (b, POINTS), interpolated between neighbours."""
    place = torch.linspace(0, ascending.shape[1] - 1, POINTS, dtype=torch.float64, device=ascending.device)
    low = place.floor().long()
    high = (low + 1).clamp(max=ascending.shape[1] - 1)
    return torch.lerp(ascending[:, low], ascending[:, high], (place - low).to(ascending.dtype))


def _factors(stack: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return U (b, m, r), sigma (b, r), V' (b, r, n); None of each beyond EXACT_LIMIT."""
    if min(stack.shape[1:]) > EXACT_LIMIT:
        return None, None, None
    if stack.shape[1] < stack.shape[2]:
        u, sigma, vh = torch.linalg.svd(stack.mT, full_matrices=False)
        return vh.mT, sigma, u.mT
    return torch.linalg.svd(stack, full_matrices=False)


def _tall(stack: Tensor) -> Tensor:
    return stack.mT if stack.shape[1] < stack.shape[2] else stack


def _reduced(tall: Tensor) -> Tensor:
    """Return a square matrix with the same singular values: cheaper if the matrix is much taller than wide."""
    return torch.linalg.qr(tall, mode="r").R if tall.shape[1] > 2 * tall.shape[2] else tall


def _lanczos(matrix: Tensor, steps: int) -> Tensor:
    """Bidiagonalize A (m, n) from a fixed start, both bases kept orthogonal; return the largest value found.

    Golub and Kahan 1965; the start has a generator of its own, so that training draws the same with and without it.
    """
    generator = torch.Generator(matrix.device).manual_seed(0)
    v = torch.randn(matrix.shape[1], generator=generator, device=matrix.device, dtype=matrix.dtype)
    rights, lefts, beta = [v / v.norm()], [], 0.0
    small = matrix.new_zeros(steps, steps)  # upper bidiagonal
    for k in range(steps):
        u = matrix @ rights[-1] - (beta * lefts[-1] if lefts else 0)
        u, small[k, k] = _next(u, lefts)
        lefts.append(u)
        v, beta = _next(matrix.mT @ u - small[k, k] * rights[-1], rights)
        if k + 1 < steps:
            small[k, k + 1] = beta
        rights.append(v)
    return torch.linalg.svdvals(small)[0]


def _next(vector: Tensor, basis: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Orthogonalize against a basis; return the unit vector, zero if nothing is left, and its former norm."""
    if basis:
        stacked = torch.stack(basis)
        vector = vector - stacked.mT @ (stacked @ vector)
    norm = vector.norm()
    return torch.where(norm > 0, vector / norm.clamp(min=torch.finfo(vector.dtype).tiny), 0), norm
