"""Paths between data and noise, the network's possible predictions, losses, and samplers.

At time t, x_t = a x + s e for data x and standard normal noise e; t = 0 is data, t = 1 noise. The velocity is a' x +
s' e, the score -e / s (SiT, Ma et al., arXiv 2401.08740). Shapes: B samples, N tokens, Z features; t is (B,).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from common import BadValue
from SIT.config import Prediction

PREDICTIONS = get_args(Prediction)
Velocity = Callable[[Tensor, Tensor], Tensor]  # (x (B, ...), t (B,)) -> (B, ...)

# Where a = 0 the noise or score does not determine the data, where s = 0 the data does not determine the noise. SiT
# excludes this much time at either end; here the divisor is bounded below instead.
SMALLEST_DIVISOR = 1e-3

# Of log(s / a) in log-normal times: EDM's (Karras et al., arXiv 2206.00364, table 1), used by REPA.
LOGNORMAL_MEAN, LOGNORMAL_STD = -1.2, 1.2


@dataclass(frozen=True)
class Path:
    """A path from data to noise."""

    name: Literal["linear", "cosine"] = "linear"
    """linear: a = 1 - t, s = t; cosine: a = cos(pi t / 2), s = sin(pi t / 2)."""

    def __post_init__(self):
        if self.name not in ("linear", "cosine"):
            raise BadValue(f"a path must be linear or cosine, got {self.name!r}")

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a, s, a' and s' at times t, each shaped as t."""
        if self.name == "linear":
            return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
        half_pi = math.pi / 2
        cosine, sine = torch.cos(half_pi * t), torch.sin(half_pi * t)
        return cosine, sine, -half_pi * sine, half_pi * cosine

    def time_of(self, ratio: Tensor) -> Tensor:
        """Return the times of these values of s / a."""
        return ratio / (1 + ratio) if self.name == "linear" else ratio.atan() * (2 / math.pi)


LINEAR = Path("linear")
COSINE = Path("cosine")


def _coefficients(path: Path, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return path.coefficients(t.reshape(-1, *[1] * (x.ndim - 1)))  # (B, 1, ...) each


def interpolate(x: Tensor, e: Tensor, t: Tensor, path: Path = LINEAR) -> Tensor:
    """Return the points x_t (B, ...) between data x and noise e at times t (B,)."""
    a, s, _, _ = _coefficients(path, t, x)
    return a * x + s * e


def target(x: Tensor, e: Tensor, t: Tensor, path: Path = LINEAR, prediction: str = "velocity") -> Tensor:
    """Return the target (B, ...) at (x, e, t) of a network that predicts velocity, noise, data or score."""
    _, s, da, ds = _coefficients(path, t, x)
    if prediction == "velocity":
        return da * x + ds * e
    if prediction == "noise":
        return e
    if prediction == "data":
        return x
    if prediction == "score":
        return -e / s.clamp(min=SMALLEST_DIVISOR)
    raise BadValue(f"a prediction must be one of {', '.join(PREDICTIONS)}; got {prediction!r}")


def endpoints(value: Tensor, x_t: Tensor, t: Tensor, path: Path, prediction: str) -> tuple[Tensor, Tensor]:
    """Return the data and the noise (B, ...) implied by a network's output `value` at x_t."""
    a, s, da, ds = _coefficients(path, t, x_t)
    if prediction == "velocity":
        determinant = a * ds - s * da  # of (x, e) -> (x_t, v): 1 on the linear path, pi / 2 on the cosine one
        return (ds * x_t - s * value) / determinant, (a * value - da * x_t) / determinant
    if prediction == "data":
        return value, (x_t - a * value) / s.clamp(min=SMALLEST_DIVISOR)
    if prediction in ("noise", "score"):
        e = value if prediction == "noise" else -s.clamp(min=SMALLEST_DIVISOR) * value
        return (x_t - s * e) / a.clamp(min=SMALLEST_DIVISOR), e
    raise BadValue(f"a prediction must be one of {', '.join(PREDICTIONS)}; got {prediction!r}")


def to_velocity(value: Tensor, x_t: Tensor, t: Tensor, path: Path = LINEAR, prediction: str = "velocity") -> Tensor:
    """Convert a network's output at x_t to a velocity."""
    if prediction == "velocity":
        return value  # unchanged to the bit
    return target(*endpoints(value, x_t, t, path, prediction), t, path, "velocity")


def to_score(value: Tensor, x_t: Tensor, t: Tensor, path: Path = LINEAR, prediction: str = "velocity") -> Tensor:
    """Convert a network's output at x_t to a score, the gradient of the log density of x_t."""
    return target(*endpoints(value, x_t, t, path, prediction), t, path, "score")


def first_time(steps: int, prediction: str = "velocity") -> float:
    """Return the time at which a sampler with `steps` steps starts from noise.

    1, except for noise and score, which at t = 1 do not determine the data: the network's error would be divided by
    a = 0. One step later the error is multiplied by about `steps`, and the step by 1 / steps.
    """
    return 1 - 1 / (steps + 1) if prediction in ("noise", "score") else 1.0


def times(batch: int, how: str = "uniform", generator: torch.Generator | None = None, path: Path = LINEAR) -> Tensor:
    """Draw training times (B,) on the generator's device; lognormal: of s / a, with EDM's mean and deviation."""
    device = generator.device if generator is not None else None
    if how == "uniform":
        return torch.rand(batch, generator=generator, device=device)
    if how == "lognormal":
        normal = torch.randn(batch, generator=generator, device=device)
        return path.time_of((LOGNORMAL_MEAN + LOGNORMAL_STD * normal).exp())
    raise BadValue(f"times must be uniform or lognormal, got {how!r}")


def denoising_loss(
    value: Tensor, x: Tensor, e: Tensor, t: Tensor, path: Path = LINEAR, prediction: str = "velocity"
) -> Tensor:
    """Return the mean squared error of each sample's output `value` (B, ...), in fp32 or wider: (B,).

    The error of a score is multiplied by s, as in SiT: for small s the target -e / s would dominate all other times.
    """
    error = _precise(value) - _precise(target(x, e, t, path, prediction))
    if prediction == "score":
        error = error * _coefficients(path, t, x)[1]
    return error.square().flatten(1).mean(1)


def projection_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Return minus the mean cosine of each sample's tokens with the encoder's, (B, N, Z) -> (B,), in fp32 or wider.

    Source: REPA, Yu et al., arXiv 2410.06940.
    """
    cosines = F.cosine_similarity(_precise(projected), _precise(features), dim=-1)  # (B, N)
    return -cosines.mean(1)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def guided(
    model_velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    null_class: int,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Velocity:
    """Return model_velocity(x, t, y) with labels y (B,) and classifier-free guidance (Ho and Salimans, 2207.12598).

    scale: 1 is no guidance, 0 no class. interval: times with guidance, both ends included (Kynkaanniemi et al., arXiv
    2404.07724); elsewhere, and at scale 1, the model runs on B samples instead of 2 B. All times of a call must be
    equal; each of Heun's two calls per step uses its own, while REPA's sampler uses the step's for both. channels:
    guide only the first so many, as DiT's and SiT's samplers do with 3 of 4; the others keep the class's velocity.

    Raises ValueError for an interval outside 0 <= low <= high <= 1.
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise BadValue(f"a guidance interval must be 0 <= low <= high <= 1, got {low} and {high}")

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if scale == 1 or not low <= t[0] <= high:
            return model_velocity(x, t, y)
        labels = torch.cat([y, torch.full_like(y, null_class)])  # (2 B,)
        both = _precise(model_velocity(torch.cat([x, x]), torch.cat([t, t]), labels))  # (2 B, ...)
        of_class, of_none = both.chunk(2)
        mixed = of_none + scale * (of_class - of_none)
        return mixed if channels is None else torch.cat([mixed[:, :channels], of_class[:, channels:]], dim=1)

    return velocity


@torch.no_grad()
def sample_ode(
    velocity: Velocity, noise: Tensor, steps: int, method: Literal["euler", "heun"] = "euler", start: float = 1.0
) -> Tensor:
    """Integrate a velocity from noise (B, ...) at t = start (first_time) to data at t = 0 in equal steps: (B, ...).

    Velocities are evaluated in the dtype of `noise`; the state is float64. Heun needs two per step, but one in the last
    step, as in EDM: at t = 0 a velocity converted from another prediction is singular.
    """
    if method not in ("euler", "heun"):
        raise BadValue(f"method must be euler or heun, got {method!r}")
    _refuse_no_steps(steps)
    state = _state(noise)
    for now, later in pairwise(torch.linspace(start, 0, steps + 1, dtype=torch.float64).tolist()):
        slope = _evaluate(velocity, state, now, noise)
        following = state + (later - now) * slope
        if method == "heun" and later > 0:
            slope = (slope + _evaluate(velocity, following, later, noise)) / 2
            following = state + (later - now) * slope
        state = following
    return state.to(noise.dtype).to(noise.device)


@torch.no_grad()
def sample_sde(
    velocity: Velocity,
    noise: Tensor,
    steps: int,
    path: Path = LINEAR,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    last_step: float = 0.04,
    start: float = 1.0,
) -> Tensor:
    """Integrate the reverse diffusion from noise (B, ...) at t = start to data at t = 0 by Euler-Maruyama: (B, ...).

    dx = (v - w / 2 score) dt + sqrt(w) dW with w = 2 s, which is REPA's 2 t on the linear path. It has the velocity's
    marginals for any w; with this one the drift is v + e, finite at t = 0. The state is float64, as in sample_ode.

    generator: of the added noise, as in normal_like. last_step: length of the last step, which adds no noise; the
    others are equal. 0.04 is SiT's and REPA's.
    """
    _refuse_no_steps(steps)
    if not 0 < last_step < start:
        raise BadValue(f"last_step must be between 0 and {start:g}, got {last_step}")
    state = _state(noise)
    for now, later in pairwise([*torch.linspace(start, last_step, steps, dtype=torch.float64).tolist(), 0.0]):
        t = torch.full((len(state),), now, dtype=state.dtype, device=state.device)  # (B,)
        v = _evaluate(velocity, state, now, noise)
        _, e = endpoints(v, state, t, path, "velocity")
        state = state + (later - now) * (v + e)
        if later > 0:
            _, s, _, _ = path.coefficients(t[0])
            state = state + torch.sqrt(2 * s * (now - later)) * normal_like(state, generator)
    return state.to(noise.dtype).to(noise.device)


def normal_like(x: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
    """Draw standard normal noise (B, ...) for samples x (B, ...), on the generator's device.

    generator: one for all, or one per sample, whose noise then does not depend on the batch.
    """
    if isinstance(generator, Sequence):
        return torch.stack([normal_like(sample, own) for sample, own in zip(x, generator, strict=True)])
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, dtype=x.dtype, device=device, generator=generator).to(x.device)


def _refuse_no_steps(steps: int) -> None:
    if steps < 1:
        raise BadValue(f"steps must be at least 1, got {steps}")


def _state(noise: Tensor) -> Tensor:
    """Copy the noise to float64, on the CPU for Apple's GPUs, which do not have it."""
    return (noise.cpu() if noise.device.type == "mps" else noise).double()


def _evaluate(velocity: Velocity, state: Tensor, t: float, like: Tensor) -> Tensor:
    """Evaluate the velocity of a float64 state at one time, in the dtype and on the device of `like`."""
    x = state.to(like.dtype).to(like.device)
    value = velocity(x, torch.full((len(x),), t, dtype=like.dtype, device=like.device))
    return value.to(state.device).double()
