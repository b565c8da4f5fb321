"""The isotropic curvature model's step solves the model's equation, whose expectations have closed forms to compare."""

import math

import pytest
import torch
from torch import Tensor

from optimizers.homogenize import expectations, homogenize, spectrum

POWERS = [2.02, 2.4, 3.0, 3.6, 3.98]


def sigma_of(*shape: int, condition: float = 1e3) -> Tensor:
    sizes = torch.rand(*shape, dtype=torch.float64) * -math.log10(condition)
    return (10**sizes).sort(-1, descending=True).values


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_expectation_of_an_even_spectrum_matches_the_moment_of_chi_squared(count, power):
    q = power / 2 - 1
    # Of s = 1 / sqrt(count) each: E[x^q g^2] = E[x^(q+1)], a moment of chi squared of `count` degrees of freedom.
    log_moment = math.lgamma(count / 2 + q + 1) - math.lgamma(count / 2)
    expected = math.exp(log_moment + (q + 1) * math.log(2 / count))
    found = expectations(torch.full((1, count), 0.3, dtype=torch.float64), power)
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-8, atol=0)


@pytest.mark.parametrize("power", POWERS)
def test_expectations_of_an_uneven_spectrum_match_a_fixed_sample(power):
    s = torch.tensor([1.0, 0.5, 0.1, 1e-3], dtype=torch.float64)
    draws = torch.randn(400_000, 4, dtype=torch.float64).square()
    x = (draws * s.square()).sum(-1, keepdim=True) / s.square().sum()
    sampled = x.pow(power / 2 - 1) * draws
    error = sampled.std(0) / len(draws) ** 0.5
    assert ((expectations(s[None], power)[0] - sampled.mean(0)).abs() < 5 * error).all()


def test_expectations_approach_the_closed_form_of_the_fourth_power():
    s = sigma_of(3, 20)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    torch.testing.assert_close(expectations(s, 4 - 1e-7), expectations(s, 4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("power", [*POWERS, 4])
def test_spectrum_solves_the_equation_of_the_model(power):
    sigma = sigma_of(2, 12)
    s = spectrum(sigma, power)
    ratio = s * expectations(s, power) / sigma
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-8, atol=0)  # one factor for all


def test_spectrum_of_the_fourth_power_matches_its_cubic():
    sigma = sigma_of(1, 9)
    s = spectrum(sigma, 4)
    cubic = 2 * s**3 + s * s.square().sum()
    torch.testing.assert_close(cubic / cubic[0, 0], sigma / sigma[0, 0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("power", [*POWERS, 4])
def test_spectrum_keeps_the_order_and_evens_it_out_more_for_a_larger_power(power):
    sigma = sigma_of(5, 16)
    s, less = spectrum(sigma, power), spectrum(sigma, 1 + power / 2)
    assert (s.diff() <= 0).all()
    assert (s[:, :1] / s <= sigma[:, :1] / sigma * (1 + 1e-9)).all()
    assert (s[:, :1] / s < less[:, :1] / less + 1e-9).all()


def test_power_two_matches_the_gradient():
    matrices = torch.randn(2, 6, 9, dtype=torch.float64)
    norm = torch.linalg.matrix_norm(matrices)[:, None, None]
    torch.testing.assert_close(homogenize(matrices, 2), matrices * 6**0.5 / norm)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (12, 12)])
def test_step_has_the_singular_vectors_of_the_gradient_and_the_norm_of_its_polar_factor(shape):
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    step = homogenize(matrices, 3.0)
    u, sigma, vh = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.mT @ step @ vh.mT
    wanted = spectrum(sigma, 3.0)
    wanted = wanted * (min(shape) ** 0.5 / wanted.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(inside, torch.diag_embed(wanted), rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.linalg.matrix_norm(step), torch.full((3,), min(shape) ** 0.5).double())


# Largest relative error of the step, of p = 2.05, 2.5, 3 and 4: what the iteration leaves, and, but for p = 4, what the
# quadratic and the gamma distribution in place of the expectation do.
@pytest.mark.parametrize(
    ("iterations", "errors"),
    [(2, (1e-3, 2e-3, 5e-3, 2e-2)), (5, (1e-3, 1e-3, 1e-3, 2e-3)), (15, (1e-3, 1e-3, 1e-3, 1e-5))],
)
@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (40, 40)])
def test_iteration_by_products_approaches_the_svd(shape, iterations, errors):
    matrices = torch.randn(2, *shape, dtype=torch.float64)
    for power, error in zip((2.05, 2.5, 3.0, 4.0), errors, strict=True):
        exact, found = homogenize(matrices, power), homogenize(matrices, power, iterations)
        distance = torch.linalg.matrix_norm(found - exact) / torch.linalg.matrix_norm(exact)
        assert (distance < error).all(), power


@pytest.mark.parametrize("power", [2.05, 2.5, 3.0])
def test_five_iterations_by_products_hold_for_a_spectrum_that_decays(power):
    u, v = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q[:, :30] for n in (30, 50))
    for sigma in (1 / torch.arange(1, 31), torch.logspace(0, -4, 30)):
        matrix = ((u * sigma) @ v.mT)[None]
        exact = homogenize(matrix, power)
        assert (homogenize(matrix, power, 5) - exact).norm() < 1e-2 * exact.norm()  # 6e-3 was measured


def test_iteration_by_products_holds_for_one_dominant_direction():
    matrices = 1e-3 * torch.randn(20, 30, dtype=torch.float64)
    matrices[0, 0] += 1
    found, exact = homogenize(matrices[None], iterations=60), homogenize(matrices[None])
    assert (found - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("iterations", [0, 3])
def test_zero_matrices_stay_zero_beside_others(iterations):
    matrices = torch.randn(3, 4, 6)
    matrices[1] = 0
    for power in (2.5, 4):
        step = homogenize(matrices, power, iterations)
        assert torch.equal(step[1], torch.zeros(4, 6)) and step[[0, 2]].ne(0).all() and step.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": 1.5}, "power must be a number from 2"),
        ({"power": math.nan}, "power must be a number from 2"),
        ({"iterations": -1}, "iterations must be a whole number"),
    ],
)
def test_homogenize_refuses_what_it_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        homogenize(torch.randn(1, 3, 3), **options)
