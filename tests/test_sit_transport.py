"""SIT.transport against closed forms: calculus on the paths, and Gaussian data, whose exact velocity is known."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from SIT.transport import (
    COSINE,
    LINEAR,
    PREDICTIONS,
    Path,
    denoising_loss,
    endpoints,
    first_time,
    guided,
    interpolate,
    projection_loss,
    sample_ode,
    sample_sde,
    target,
    times,
    to_score,
    to_velocity,
)

on_both_paths = pytest.mark.parametrize("path", [LINEAR, COSINE], ids=["linear", "cosine"])

MEAN = torch.tensor([1.5, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.8, 0.3], [0.3, 0.4]], dtype=torch.float64)


def points(batch=64, dtype=torch.float64):
    x, e = torch.randn(2, batch, 3, 2, 2, dtype=dtype)
    return x, e, torch.linspace(0.01, 0.99, batch, dtype=dtype)


def gaussian_velocity(path):
    """The velocity of data N(MEAN, COVARIANCE): E[a' x + s' e | x_t], by the rules of conditional Gaussians."""

    def velocity(x_t, t):
        a, s, da, ds = (coefficient.double() for coefficient in path.coefficients(t[0]))  # one time per call
        precision = torch.linalg.inv(a**2 * COVARIANCE + s**2 * torch.eye(2).double())
        surprise = (x_t.double() - a * MEAN) @ precision
        x, e = MEAN + a * surprise @ COVARIANCE, s * surprise
        return (da * x + ds * e).to(x_t.dtype)

    return velocity


# --- paths, targets, conversions


def test_paths_match_their_definitions():
    t = torch.tensor([0.0, 1 / 3, 1.0], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(LINEAR.coefficients(t)[:2]), torch.stack([1 - t, t]))
    expected = torch.tensor([[1, math.sqrt(3) / 2, 0], [0, 0.5, 1]], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(COSINE.coefficients(t)[:2]), expected)
    with pytest.raises(ValueError, match="linear or cosine, got 'vp'"):
        Path("vp")


@on_both_paths
def test_velocity_target_matches_the_derivative_of_the_interpolation(path):
    x, e, t = points()
    _, derivative = torch.autograd.functional.jvp(lambda t: interpolate(x, e, t, path), t, torch.ones_like(t))
    torch.testing.assert_close(target(x, e, t, path, "velocity"), derivative, rtol=1e-12, atol=1e-12)


@on_both_paths
def test_score_target_matches_the_gradient_of_the_density_given_the_data(path):
    x, e, t = points()
    x_t = interpolate(x, e, t, path).requires_grad_()
    a, s, _, _ = path.coefficients(t[:, None, None, None])
    torch.distributions.Normal(a * x, s).log_prob(x_t).sum().backward()
    torch.testing.assert_close(target(x, e, t, path, "score"), x_t.grad, rtol=1e-10, atol=1e-10)


@on_both_paths
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions_match_each_other(path, prediction):
    x, e, t = points()
    x_t, value = interpolate(x, e, t, path), target(x, e, t, path, prediction)
    tight = {"rtol": 1e-10, "atol": 1e-10}
    found_x, found_e = endpoints(value, x_t, t, path, prediction)
    torch.testing.assert_close(found_x, x, **tight)
    torch.testing.assert_close(found_e, e, **tight)
    torch.testing.assert_close(to_velocity(value, x_t, t, path, prediction), target(x, e, t, path), **tight)
    torch.testing.assert_close(to_score(value, x_t, t, path, prediction), target(x, e, t, path, "score"), **tight)


@on_both_paths
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions_match_finite_numbers_at_either_end(path, prediction):
    x, e, _ = points(2)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x_t, value = interpolate(x, e, t, path), target(x, e, t, path, prediction)
    assert to_velocity(value, x_t, t, path, prediction).isfinite().all()
    assert to_score(value, x_t, t, path, prediction).isfinite().all()


def test_an_unknown_prediction_is_refused():
    x, e, t = points(2)
    with pytest.raises(ValueError, match="velocity, noise, data, score; got 'epsilon'"):
        target(x, e, t, LINEAR, "epsilon")
    with pytest.raises(ValueError, match="got 'epsilon'"):
        to_velocity(x, e, t, LINEAR, "epsilon")


# --- times and losses


@on_both_paths
def test_lognormal_times_match_the_quantiles_of_edm(path):
    t = times(40_000, "lognormal", torch.Generator().manual_seed(0), path).double()
    assert 0 < t.min() and t.max() < 1
    a, s, _, _ = path.coefficients(t)
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        quantile = -1.2 + 1.2 * math.sqrt(2) * torch.erfinv(torch.tensor(2 * share - 1)).item()
        below = ((s / a).log() < quantile).double().mean().item()
        # Four standard errors of a share of 40,000 are at most 0.01.
        assert below == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 40_000))


def test_uniform_times_match_their_quantiles_and_their_seed():
    first, again, other = (times(40_000, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    for share in (0.05, 0.5, 0.95):
        assert (first < share).double().mean().item() == pytest.approx(share, abs=0.01)  # four standard errors
    with pytest.raises(ValueError, match="uniform or lognormal, got 'normal'"):
        times(3, "normal")


def test_denoising_loss_matches_the_mean_square_of_each_sample():
    value, x, e = torch.randn(3, 5, 3, 4, 4)
    t = torch.rand(5)
    for prediction in ("velocity", "noise", "data"):
        pairs = zip(value, target(x, e, t, COSINE, prediction), strict=True)
        expected = torch.stack([F.mse_loss(*pair) for pair in pairs])
        torch.testing.assert_close(denoising_loss(value, x, e, t, COSINE, prediction), expected)
    assert denoising_loss(value.bfloat16(), x.bfloat16(), e.bfloat16(), t.bfloat16()).dtype == torch.float32


def test_denoising_loss_of_a_score_matches_the_mean_square_of_its_noise():
    """Times s, a score's error is minus that of the noise, whatever the time."""
    value, x, e = torch.randn(3, 1000, 4)
    t = torch.linspace(1e-5, 1, 1000)
    found = denoising_loss(torch.zeros_like(value), x, e, t, LINEAR, "score")
    torch.testing.assert_close(found[t > 1e-3], e.square().mean(1)[t > 1e-3])
    assert found.max() <= e.square().mean(1).max()
    noise = -t[:, None] * value
    torch.testing.assert_close(
        denoising_loss(value, x, e, t, LINEAR, "score")[10:], denoising_loss(noise, x, e, t, LINEAR, "noise")[10:]
    )


def test_projection_loss_matches_torchs_cosine_similarity():
    projected, features = torch.randn(2, 5, 9, 7, dtype=torch.float64)
    expected = torch.zeros(5, dtype=torch.float64)
    for sample in range(5):
        for token in range(9):
            expected[sample] -= F.cosine_similarity(projected[sample, token], features[sample, token], dim=0) / 9
    torch.testing.assert_close(projection_loss(projected, features), expected)
    torch.testing.assert_close(projection_loss(3 * features, features), torch.full((5,), -1.0).double())


# --- samplers


def pushed_through(path, steps, method):
    """The exact mean and covariance of an ODE sampler's output for N(0, I): it is affine in the noise."""
    corners = torch.tensor([[0, 0], [1, 0], [0, 1]], dtype=torch.float64)
    mean, *images = sample_ode(gaussian_velocity(path), corners, steps, method)
    columns = torch.stack(images, dim=1) - mean[:, None]
    return mean, columns @ columns.T


@on_both_paths
@pytest.mark.parametrize(("method", "ratio"), [("euler", 2), ("heun", 4)])
def test_ode_sampler_matches_the_data_with_its_order_of_convergence(path, method, ratio):
    errors = []
    for steps in (100, 200, 400):
        mean, covariance = pushed_through(path, steps, method)
        errors.append(torch.stack([(mean - MEAN).norm(), (covariance - COVARIANCE).norm()]))
    largest = max(MEAN.norm(), COVARIANCE.norm())
    # A method of order p is off by a small multiple of (1 / steps)^p.
    assert errors[-1].max() < 2 * largest / 400 ** math.log2(ratio)
    for coarse, fine in pairwise(errors):
        for before, after in zip(coarse.tolist(), fine.tolist(), strict=True):
            # Where an error vanishes but for rounding (the mean on the linear path) there is no ratio.
            assert max(before, after) < 1e-12 or before / after == pytest.approx(ratio, rel=0.15)


@on_both_paths
def test_sde_sampler_matches_the_data_within_its_statistical_error(path):
    samples, steps = 10_000, 500
    noise = torch.randn(samples, 2, dtype=torch.float64)
    drawn = sample_sde(gaussian_velocity(path), noise, steps, path, torch.Generator().manual_seed(1), last_step=1e-3)
    # Five standard errors of each mean and covariance, and the bias of Euler-Maruyama, of the order of 1 / steps.
    variances = COVARIANCE.diagonal()
    error_of_mean = 5 * (variances / samples).sqrt() + 2 / steps
    error_of_covariance = 5 * ((variances.outer(variances) + COVARIANCE**2) / samples).sqrt() + 2 / steps
    assert ((drawn.mean(0) - MEAN).abs() < error_of_mean).all()
    assert ((drawn.T.cov() - COVARIANCE).abs() < error_of_covariance).all()


@on_both_paths
def test_sde_sampler_matches_euler_maruyama_written_out_with_the_score(path):
    noise, steps, last = torch.randn(50, 2, dtype=torch.float64), 7, 0.04
    velocity = gaussian_velocity(path)
    drawn = sample_sde(velocity, noise, steps, path, torch.Generator().manual_seed(3), last_step=last)
    generator, state = torch.Generator().manual_seed(3), noise
    grid = [1 - k * (1 - last) / (steps - 1) for k in range(steps)] + [0.0]
    for step in range(steps):
        t, length = torch.full((50,), grid[step], dtype=torch.float64), grid[step] - grid[step + 1]
        v = velocity(state, t)
        w = 2 * t[0] if path == LINEAR else 2 * torch.sin(math.pi * t[0] / 2)
        state = state - length * (v - w / 2 * to_score(v, state, t, path))
        if step < steps - 1:
            state = state + torch.sqrt(w * length) * torch.randn(50, 2, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(drawn, state)


def test_sde_sampler_matches_its_seed():
    def draw(seed):
        noise = torch.ones(4, 2)
        return sample_sde(gaussian_velocity(LINEAR), noise, 5, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("sampler", [sample_ode, sample_sde])
def test_samplers_match_the_dtype_of_the_noise_in_their_calls_and_results(sampler):
    asked = []

    def velocity(x, t):
        asked.append((x.dtype, t.dtype, tuple(t.shape)))
        return x

    drawn = sampler(velocity, torch.randn(3, 2), 4)
    assert drawn.dtype == torch.float32 and set(asked) == {(torch.float32, torch.float32, (3,))}


@on_both_paths
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_samplers_match_the_data_for_predictions_that_are_a_little_wrong(path, prediction, sampler):
    """A network is never exact: a division of its error by a or s, which vanish at the ends, would show here."""
    samples, steps = 4000, 50
    generator = torch.Generator().manual_seed(1)
    velocity = gaussian_velocity(path)

    def nearly(x, t):
        x_and_e = endpoints(velocity(x, t), x, t, path, "velocity")
        value = target(*x_and_e, t, path, prediction)
        error = 0.1 * value.abs().mean() * torch.sin(7 * x)
        return to_velocity(value + error, x, t, path, prediction)

    noise = torch.randn(samples, 2, dtype=torch.float64, generator=generator)
    start = first_time(steps, prediction)
    if sampler == "sde":
        drawn = sample_sde(nearly, noise, steps, path, generator, start=start)
    else:
        drawn = sample_ode(nearly, noise, steps, sampler, start)
    torch.testing.assert_close(drawn.mean(0), MEAN, rtol=0, atol=0.15)
    torch.testing.assert_close(drawn.T.cov(), COVARIANCE, rtol=0.15, atol=0.15)


def test_ode_state_matches_float64_between_velocities_in_float32():
    """1 + 10,000 steps of 1e-8 x 1e-4: a state in float32 would not move."""
    drawn = sample_ode(lambda x, t: torch.full_like(x, -1e-4), torch.ones(1), 10_000)
    torch.testing.assert_close(drawn, torch.tensor([1 + 1e-4]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("sampler", [sample_ode, sample_sde])
def test_samplers_refuse_no_steps(sampler):
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        sampler(gaussian_velocity(LINEAR), torch.zeros(1, 2), 0)


def test_samplers_refuse_unknown_options():
    with pytest.raises(ValueError, match="euler or heun, got 'rk4'"):
        sample_ode(gaussian_velocity(LINEAR), torch.zeros(1, 2), 3, "rk4")
    with pytest.raises(ValueError, match="last_step must be between 0 and 1, got 1"):
        sample_sde(gaussian_velocity(LINEAR), torch.zeros(1, 2), 3, last_step=1)


# --- guidance


class LabelledVelocity:
    """A velocity that depends on its class, and counts its samples."""

    def __init__(self):
        self.samples = 0

    def __call__(self, x, t, y):
        self.samples += len(x)
        return torch.sin(x + t[:, None]) * (1 + y[:, None])


def test_guidance_of_scale_1_matches_none():
    model, y, x, t = LabelledVelocity(), torch.arange(4), torch.randn(4, 2), torch.full((4,), 0.5)
    assert torch.equal(guided(model, y, 9, 1.0)(x, t), model(x, t, y))
    assert model.samples == 8  # four for each: nothing doubled


def test_guidance_outside_its_interval_matches_none():
    model, y, x = LabelledVelocity(), torch.arange(4), torch.randn(4, 2)
    velocity = guided(model, y, 9, 3.0, (0.25, 0.75))
    for time in (0.0, 0.2, 0.8, 1.0):
        t = torch.full((4,), time)
        assert torch.equal(velocity(x, t), model(x, t, y))
    for time in (0.25, 0.5, 0.75):
        t = torch.full((4,), time)
        assert not torch.allclose(velocity(x, t), model(x, t, y))


@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
def test_guidance_matches_its_formula(scale):
    model, y, x, t = LabelledVelocity(), torch.arange(4), torch.randn(4, 2), torch.full((4,), 0.5)
    of_class, of_none = model(x, t, y), model(x, t, torch.full_like(y, 9))
    torch.testing.assert_close(guided(model, y, 9, scale)(x, t), (1 - scale) * of_none + scale * of_class)


def test_guidance_of_three_channels_matches_the_sampler_of_dit():
    def model(x, t, y):
        return torch.sin(x + t[:, None]) * (1 + y[:, None, None, None])

    y, x, t = torch.arange(2), torch.randn(2, 4, 3, 3), torch.full((2,), 0.5)
    of_class, of_none = model(x, t[:, None, None], y), model(x, t[:, None, None], torch.full_like(y, 9))
    # As DiT's forward_with_cfg has it: three channels guided, the others those of the half with the class.
    expected = torch.cat([of_none[:, :3] + 4 * (of_class[:, :3] - of_none[:, :3]), of_class[:, 3:]], 1)
    velocity = guided(lambda x, t, y: model(x, t[:, None, None], y), y, 9, 4.0, channels=3)
    torch.testing.assert_close(velocity(x, t), expected)


def test_guidance_of_scale_1_matches_none_through_a_sampler():
    model, y, noise = LabelledVelocity(), torch.arange(4), torch.randn(4, 2)
    plain = sample_ode(lambda x, t: model(x, t, y), noise, 6, "heun")
    assert torch.equal(sample_ode(guided(model, y, 9, 1.0), noise, 6, "heun"), plain)
    assert torch.equal(sample_ode(guided(model, y, 9, 5.0, (0.4, 0.45)), noise, 6, "heun"), plain)  # between steps
    assert not torch.allclose(sample_ode(guided(model, y, 9, 5.0), noise, 6, "heun"), plain)


@pytest.mark.parametrize("interval", [(0.6, 0.4), (-0.1, 1.0), (0.0, 1.1)])
def test_guidance_refuses_an_impossible_interval(interval):
    with pytest.raises(ValueError, match="0 <= low <= high <= 1"):
        guided(LabelledVelocity(), torch.arange(4), 9, 2.0, interval)
