"""Slow, obvious float64 references of the update rules, one matrix and one step at a time.

Written from the formulas of the OLion paper (arXiv 2602.01105) and independent of the package: no batching,
no foreach, no in-place work, no choice of form. Each function takes a parameter, its gradient and its state,
and returns the new parameter and the new state, in float64 whatever the dtype of the arguments. `state` starts as {}.

Two departures from the paper: eps is the floor of the Frobenius norm, as in torch.optim.Muon, and not added
to it; and a matrix that is all zero has a direction of zero instead of 0 / 0.
"""

import math

import torch
from torch import Tensor

# Keller Jordan's quintic, https://kellerjordan.github.io/posts/muon/
JORDAN = (3.4445, -4.7750, 2.0315)


def newton_schulz(matrix: Tensor, steps: int = 5, coefficients=JORDAN, eps: float = 1e-7) -> Tensor:
    """Take `steps` quintic steps X <- a X + b (XX')X + c (XX')^2 X from X = matrix / ||matrix||_F."""
    a, b, c = coefficients
    x = matrix.double()
    x = x / max(float(x.norm()), eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def polar_factor(matrix: Tensor, rank: int | None = None) -> Tensor:
    """U V' of the thin SVD, over the singular values that are not zero (or the first `rank` of them)."""
    u, sigma, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    if rank is None:
        rank = int((sigma > sigma.max() * 1e-12).sum())  # 1e-12: far above float64's rounding, far below data
    return u[:, :rank] @ vh[:rank]


def to_rms(matrix: Tensor, rms: float) -> Tensor:
    """Rescale so that the root mean square entry is `rms`; zero stays zero."""
    norm = float(matrix.norm())
    return matrix if norm == 0.0 else matrix * (rms * math.sqrt(matrix.numel()) / norm)


def decay_and_step(param: Tensor, direction: Tensor, lr: float, weight_decay: float) -> Tensor:
    """X <- X - lr D - lr wd X, with the decay on the old X."""
    return param.double() - lr * direction - lr * weight_decay * param.double()


def buffer(state: dict, name: str, like: Tensor) -> Tensor:
    """The named buffer of `state`, zero before the first step."""
    return state.get(name, torch.zeros_like(like, dtype=torch.float64))


def olion_mixture(grad: Tensor, state: dict, betas=(0.95, 0.98)) -> tuple[Tensor, Tensor]:
    """OLion's mixed momentum G~ and its new buffer M; the NEW M enters the mix."""
    mix, keep = betas
    momentum = keep * buffer(state, "momentum", grad) + (1 - keep) * grad.double()
    return (1 - mix) * grad.double() + mix * momentum, momentum


def olion(
    param: Tensor,
    grad: Tensor,
    state: dict,
    *,
    lr: float,
    betas=(0.95, 0.98),
    weight_decay: float = 0.1,
    ns_steps: int = 5,
    ns_coefficients=JORDAN,
    eps: float = 1e-7,
    scale: float = 0.2,
) -> tuple[Tensor, dict]:
    """Double EMA, Newton-Schulz, entrywise sign (sign(0) = 0), rescaled to an RMS of `scale`."""
    mixture, momentum = olion_mixture(grad, state, betas)
    signs = torch.sign(newton_schulz(mixture, ns_steps, ns_coefficients, eps))
    return decay_and_step(param, to_rms(signs, scale), lr, weight_decay), {"momentum": momentum}


def muon(
    param: Tensor,
    grad: Tensor,
    state: dict,
    *,
    lr: float,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients=JORDAN,
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
) -> tuple[Tensor, dict]:
    """EMA, Nesterov mix with the same beta, Newton-Schulz, torch.optim.Muon's two scales."""
    kept = momentum * buffer(state, "momentum", grad) + (1 - momentum) * grad.double()
    mixture = (1 - momentum) * grad.double() + momentum * kept if nesterov else kept
    orthogonal = newton_schulz(mixture, ns_steps, ns_coefficients, eps)
    rows, columns = param.shape
    if adjust_lr_fn == "match_rms_adamw":
        scale = 0.2 * math.sqrt(max(rows, columns))
    else:
        scale = math.sqrt(max(1.0, rows / columns))
    return decay_and_step(param, scale * orthogonal, lr, weight_decay), {"momentum": kept}


def adamuon(
    param: Tensor,
    grad: Tensor,
    state: dict,
    *,
    lr: float,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    eps: float = 1e-8,
    ns_steps: int = 5,
    ns_coefficients=JORDAN,
    scale: float = 0.2,
) -> tuple[Tensor, dict]:
    """EMA, sign, Newton-Schulz, elementwise second moment (same beta, not debiased), RMS of `scale`."""
    kept = momentum * buffer(state, "momentum", grad) + (1 - momentum) * grad.double()
    orthogonal = newton_schulz(torch.sign(kept), ns_steps, ns_coefficients)
    second = momentum * buffer(state, "second_moment", grad) + (1 - momentum) * orthogonal**2
    direction = to_rms(orthogonal / (second.sqrt() + eps), scale)
    return decay_and_step(param, direction, lr, weight_decay), {"momentum": kept, "second_moment": second}


def lion(
    param: Tensor,
    grad: Tensor,
    state: dict,
    *,
    lr: float,
    betas=(0.9, 0.99),
    weight_decay: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, dict]:
    """Chen et al. 2023 (arXiv 2302.06675): sign of a mix with the OLD buffer, then the buffer's own EMA."""
    mix, keep = betas
    old = buffer(state, "momentum", grad)
    direction = scale * torch.sign(mix * old + (1 - mix) * grad.double())
    kept = keep * old + (1 - keep) * grad.double()
    return decay_and_step(param, direction, lr, weight_decay), {"momentum": kept}


def signum(
    param: Tensor,
    grad: Tensor,
    state: dict,
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, dict]:
    """Bernstein et al. 2018 (arXiv 1802.04434): the sign of an average of gradients."""
    kept = momentum * buffer(state, "momentum", grad) + (1 - momentum) * grad.double()
    return decay_and_step(param, scale * torch.sign(kept), lr, weight_decay), {"momentum": kept}


def lionmuon(
    param: Tensor,
    grad: Tensor,
    state: dict,
    *,
    lr: float,
    betas=(0.9, 0.99),
    weight_decay: float = 0.1,
    period: int = 2,
    sign_scale: float = 0.05,
    scale: float = 0.2,
    ns_steps: int = 5,
    ns_coefficients=JORDAN,
    eps: float = 1e-7,
) -> tuple[Tensor, dict]:
    """arXiv 2605.19811: Lion's mix with the OLD buffer, orthogonalized at steps 1, P + 1, ..., else signed."""
    mix, keep = betas
    old, number = buffer(state, "momentum", grad), state.get("_steps", 0)
    mixture = mix * old + (1 - mix) * grad.double()
    if number % period == 0:
        factor = scale * math.sqrt(max(param.shape))
        direction = factor * newton_schulz(mixture, ns_steps, ns_coefficients, eps)
    else:
        direction = sign_scale * torch.sign(mixture)
    kept = keep * old + (1 - keep) * grad.double()
    return decay_and_step(param, direction, lr, weight_decay), {"momentum": kept, "_steps": number + 1}


def polargrad(
    param: Tensor,
    grad: Tensor,
    state: dict,
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    order: str = "momentum_first",
    exact: bool = False,
) -> tuple[Tensor, dict]:
    """Lau, Long and Su, arXiv 2505.21799; `exact`: with the SVD's polar factor and sum of singular values."""
    old, polar = buffer(state, "momentum", grad), polar_factor if exact else newton_schulz
    averaged = momentum * old + (1 - momentum) * grad.double()
    source = averaged if order == "momentum_first" else grad.double()
    factor = polar(source)
    nuclear = torch.linalg.svdvals(source).sum() if exact else (source * factor).sum()
    if order == "momentum_first":
        kept, direction = averaged, nuclear * factor
    else:
        kept = momentum * old + (1 - momentum) * factor
        direction = nuclear * kept
    return decay_and_step(param, direction, lr, weight_decay), {"momentum": kept}


def normuon(
    param: Tensor,
    grad: Tensor,
    state: dict,
    *,
    lr: float,
    weight_decay: float = 0.1,
    betas=(0.95, 0.95),
    eps: float = 1e-10,
    scale: float = 0.2,
    ns_steps: int = 5,
    ns_coefficients=JORDAN,
) -> tuple[Tensor, dict]:
    """Li et al., arXiv 2510.05491: EMA, Newton-Schulz, a second moment of each row, RMS of `scale`."""
    first, second = betas
    kept = first * buffer(state, "momentum", grad) + (1 - first) * grad.double()
    orthogonal = newton_schulz(kept, ns_steps, ns_coefficients)
    rows = (orthogonal**2).mean(dim=1, keepdim=True)
    moment = second * buffer(state, "row_second_moment", rows) + (1 - second) * rows
    direction = to_rms(orthogonal / (moment.sqrt() + eps), scale)
    return decay_and_step(param, direction, lr, weight_decay), {"momentum": kept, "row_second_moment": moment}


def quartic_spectrum(sigma: Tensor) -> Tensor:
    """The s of 2 s_i^3 + s_i sum s^2 = sigma_i: the root of each cubic by sinh, inside bisection for the sum."""
    low, high = 1e-300, 1.0 + float(sigma.sum()) ** (2 / 3) * len(sigma)
    for _ in range(120):
        half = (low + high) / 4  # s^3 + half s = sigma / 2
        s = 2 * math.sqrt(half / 3) * torch.sinh(torch.asinh(0.75 * sigma / half * math.sqrt(3 / half)) / 3)
        low, high = (2 * half, high) if float((s**2).sum()) > 2 * half else (low, 2 * half)  # it falls in the sum
    return s


def curvature(
    param: Tensor,
    grad: Tensor,
    state: dict,
    *,
    lr: float,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    scale: float = 0.2,
) -> tuple[Tensor, dict]:
    """Su, arXiv 2511.00674, for H = r^4: the singular vectors stay, the singular values solve a cubic each."""
    kept = momentum * buffer(state, "momentum", grad) + (1 - momentum) * grad.double()
    mixture = (1 - momentum) * grad.double() + momentum * kept if nesterov else kept
    u, sigma, vh = torch.linalg.svd(mixture / max(float(mixture.norm()), 1e-7), full_matrices=False)
    direction = to_rms((u * quartic_spectrum(sigma)) @ vh, scale)
    return decay_and_step(param, direction, lr, weight_decay), {"momentum": kept}


def adamw(
    param: Tensor,
    grad: Tensor,
    state: dict,
    *,
    lr: float,
    betas=(0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> tuple[Tensor, dict]:
    """Loshchilov and Hutter 2019 (arXiv 1711.05101), debiased, eps outside the root as in torch."""
    first_beta, second_beta = betas
    step = state.get("step", 0) + 1
    first = first_beta * buffer(state, "exp_avg", grad) + (1 - first_beta) * grad.double()
    second = second_beta * buffer(state, "exp_avg_sq", grad) + (1 - second_beta) * grad.double() ** 2
    debiased_root = (second / (1 - second_beta**step)).sqrt()
    direction = first / (1 - first_beta**step) / (debiased_root + eps)
    state = {"exp_avg": first, "exp_avg_sq": second, "step": step}
    return decay_and_step(param, direction, lr, weight_decay), state
