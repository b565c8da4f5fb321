"""Newton-Schulz, in each form and precision, against a float64 reference and the SVD."""

import math

import pytest
import reference
import torch
from torch import Tensor

from optimizers.polar import COEFFICIENTS, flops, orthogonalize

FORMS = ["plain", "gram", "auto"]
SHAPES = [(24, 16), (16, 24), (20, 20), (1, 12), (12, 1), (1, 1), (3, 8, 30), (2, 2, 30, 8)]


def rank_deficient(rows: int, columns: int, rank: int, dtype=torch.float64) -> Tensor:
    return torch.randn(rows, rank, dtype=dtype) @ torch.randn(rank, columns, dtype=dtype)


def with_spectrum(rows: int, columns: int, sigma: Tensor) -> Tensor:
    """A float64 matrix with the given singular values and random singular vectors."""
    u = torch.linalg.qr(torch.randn(rows, len(sigma), dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, len(sigma), dtype=torch.float64)).Q
    return (u * sigma) @ v.mT


def ill_conditioned(kind: str) -> Tensor:
    """Spectra on which a naive half-precision Gram iteration diverges; condition 1e6 or worse."""
    if kind == "exponential decay":
        return with_spectrum(96, 192, torch.logspace(0, -6, 96, dtype=torch.float64))
    if kind == "rank one plus noise":
        return rank_deficient(96, 192, 1) + 1e-6 * torch.randn(96, 192, dtype=torch.float64)
    return rank_deficient(96, 192, 10)


ILL_CONDITIONED = ["exponential decay", "rank one plus noise", "rank-deficient"]


def reference_stack(matrices: Tensor, **options) -> Tensor:
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    return torch.stack([reference.newton_schulz(each, **options) for each in flat]).reshape(matrices.shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_form_in_float64_matches_reference(shape, form):
    matrices = torch.randn(shape, dtype=torch.float64)
    result = orthogonalize(matrices, form=form)
    # 2e-16 times the slope of five steps at zero, 3.4445^5 = 485; the Gram form squares part of it.
    torch.testing.assert_close(result, reference_stack(matrices), rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(500, 510), (290, 700)])
def test_form_on_matrices_large_enough_to_be_blocked_matches_reference(shape, form):
    """Symmetric products are computed in blocks from about 300 rows on; 500 does not divide evenly."""
    matrix = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(matrix, form=form), reference.newton_schulz(matrix), rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_form_in_float32_matches_reference(form):
    matrices = torch.randn(3, 24, 40)
    result = orthogonalize(matrices, form=form)
    assert result.dtype == torch.float32
    # 6e-8 times the slope 485.
    torch.testing.assert_close(result.double(), reference_stack(matrices), rtol=0, atol=3e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 13, 25])
def test_gram_form_matches_plain_form_for_any_number_of_steps(steps):
    matrices = torch.randn(2, 16, 40, dtype=torch.float64)
    gram = orthogonalize(matrices, ns_steps=steps, ns_coefficients="convergent", form="gram")
    plain = orthogonalize(matrices, ns_steps=steps, ns_coefficients="convergent", form="plain")
    torch.testing.assert_close(gram, plain, rtol=0, atol=1e-9)  # rounding times a convergent slope


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_convergent_coefficients_match_the_svd(shape, form):
    matrices = torch.randn(shape, dtype=torch.float64)
    exact = orthogonalize(matrices, form="svd")
    # 30 steps: 1.875^30 = 1.5e8 lifts every singular value above 1e-7 of the norm to 1.
    result = orthogonalize(matrices, ns_steps=30, ns_coefficients="convergent", form=form)
    torch.testing.assert_close(result, exact, rtol=0, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_convergent_coefficients_on_rank_deficient_matrices_match_the_svd(shape, form):
    matrix = rank_deficient(*shape, rank=4)
    exact = orthogonalize(matrix, form="svd")
    torch.testing.assert_close(exact, reference.polar_factor(matrix, rank=4), rtol=0, atol=1e-9)
    # 20 steps lift the four singular values to 1, and rounding of 1e-16 only by 1.875^20 = 3e5.
    result = orthogonalize(matrix, ns_steps=20, ns_coefficients="convergent", form=form)
    torch.testing.assert_close(result, exact, rtol=0, atol=1e-7)


@pytest.mark.parametrize("condition", [1e0, 1e4, 1e8, 1e12])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
def test_qdwh_matches_the_svd_at_any_condition_number(shape, condition):
    sigma = torch.logspace(0, -math.log10(condition), min(shape), dtype=torch.float64)
    matrix = with_spectrum(*shape, sigma)
    result = orthogonalize(matrix, form="qdwh")
    # A polar factor moves by eps / smallest singular value where the matrix is rounded: the oracle's does, too.
    bound = 10 * torch.finfo(torch.float64).eps * condition + 1e-13
    torch.testing.assert_close(result, reference.polar_factor(matrix, rank=min(shape)), rtol=0, atol=bound)
    torch.testing.assert_close(torch.linalg.svdvals(result), torch.ones_like(sigma), rtol=0, atol=1e-13)


def test_qdwh_in_float32_matches_the_svd_of_a_stack():
    matrices = torch.randn(3, 24, 40)
    expected = torch.stack([reference.polar_factor(each, rank=24) for each in matrices.double()])
    torch.testing.assert_close(orthogonalize(matrices, form="qdwh").double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [*FORMS, "qdwh", "svd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_matrices_stay_zero_beside_others(form, dtype):
    matrices = torch.randn(3, 8, 12)
    matrices[1] = 0
    result = orthogonalize(matrices, form=form, dtype=dtype)
    assert torch.equal(result[1], torch.zeros(8, 12, dtype=dtype))
    assert result[[0, 2]].ne(0).all() and result.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_one_row_becomes_a_unit_row_by_matching_the_scalar_iteration(form):
    row = torch.randn(1, 12, dtype=torch.float64)
    s = 1.0
    for _ in range(5):
        a, b, c = reference.JORDAN
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonalize(row, form=form), s * row / row.norm(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_of_the_input_does_not_matter_above_the_floor(form, dtype):
    matrix = torch.randn(12, 20)
    expected = orthogonalize(matrix, form=form, dtype=dtype)
    for power in (-20, 20):  # powers of two: exact; 2^-20 still leaves a norm far above eps = 1e-7
        scaled = orthogonalize(matrix * 2.0**power, form=form, dtype=dtype)
        assert torch.equal(scaled, expected)


def test_floor_of_the_norm_matches_torchs():
    matrix = torch.randn(6, 9, dtype=torch.float64)
    matrix = matrix / matrix.norm() * 1e-3
    result = orthogonalize(matrix, eps=1.0, form="plain")
    torch.testing.assert_close(result, reference.newton_schulz(matrix, eps=1.0), rtol=0, atol=1e-13)
    assert (result - orthogonalize(matrix, form="plain")).norm() > 0.1  # the floor was reached


@pytest.mark.parametrize("form", [*FORMS, "qdwh", "svd"])
def test_orthogonalize_leaves_its_input_and_takes_any_strides(form):
    stored = torch.randn(20, 2, 12, dtype=torch.float64)
    matrices = stored.permute(1, 2, 0)  # (2, 12, 20), not contiguous
    copy = matrices.clone()
    result = orthogonalize(matrices, form=form)
    assert torch.equal(matrices, copy)
    torch.testing.assert_close(result, orthogonalize(copy, form=form), rtol=0, atol=1e-11)
    assert result.untyped_storage().data_ptr() != stored.untyped_storage().data_ptr()


@pytest.mark.parametrize("given, expected", [(torch.float64, torch.float64), (torch.float32, torch.float32)])
def test_default_precision_on_a_cpu_matches_the_input(given, expected):
    assert orthogonalize(torch.randn(4, 6, dtype=given)).dtype == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [*FORMS, "qdwh", "svd"])
def test_dtype_asked_for_matches_the_results(form, dtype):
    assert orthogonalize(torch.randn(4, 6), form=form, dtype=dtype).dtype == dtype


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_default_precision_on_cuda_is_bfloat16_and_matches_reference(form):
    matrices = torch.randn(3, 64, 96)
    result = orthogonalize(matrices.cuda(), form=form)
    assert result.dtype == torch.bfloat16
    error = result.cpu().double() - reference_stack(matrices)
    assert error.norm() < 0.05 * reference_stack(matrices).norm()  # bf16, as on the CPU below


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_matches_reference_on_random_matrices(form):
    matrices = torch.randn(3, 64, 96)
    expected = reference_stack(matrices)
    result = orthogonalize(matrices, form=form, dtype=torch.bfloat16)
    # 2^-9 per operation, over 15 products, each of which may double a small singular value's error.
    assert (result.double() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ILL_CONDITIONED)
def test_gram_form_in_bfloat16_is_bounded_as_the_plain_form_on_ill_conditioned_matrices(kind, transposed):
    matrix = ill_conditioned(kind).float()
    matrix = matrix.mT if transposed else matrix
    plain = orthogonalize(matrix, form="plain", dtype=torch.bfloat16).double()
    gram = orthogonalize(matrix, form="gram", dtype=torch.bfloat16).double()
    assert gram.isfinite().all()
    largest_plain = torch.linalg.matrix_norm(plain, 2)
    largest_gram = torch.linalg.matrix_norm(gram, 2)
    assert largest_plain < 1.3  # Jordan's quintic keeps singular values below about 1.2; bf16 adds a little
    assert largest_gram < 1.1 * largest_plain
    # Not merely bounded: as near the exact iteration as the plain form, to a factor of 2.
    expected = reference.newton_schulz(matrix)
    assert (gram - expected).norm() < 2 * (plain - expected).norm() + 0.02 * expected.norm()


@pytest.mark.parametrize("form", ["plain", "gram"])
def test_signs_in_bfloat16_match_float64_but_for_a_small_share(form, record_property):
    matrices = torch.randn(4, 96, 192)
    signs = orthogonalize(matrices, form=form, dtype=torch.bfloat16).sign().double()
    share = (signs != reference_stack(matrices).sign()).double().mean().item()
    record_property("share of OLion signs that differ", share)
    print(f"\n{form}: {share:.3%} of OLion's signs in bf16 differ from float64's (random 96 x 192)")
    # An error of 5 % of the entries' RMS (the bound above) flips 0.05 / pi = 1.6 % of Gaussian signs.
    assert share < 0.016


def test_polar_express_converges_to_the_polar_factor():
    # Its design interval is [1e-3, 1] of the norm; seven published triples, then the convergent quintic.
    matrix = with_spectrum(24, 40, torch.logspace(0, -2, 24, dtype=torch.float64))
    result = orthogonalize(matrix, ns_steps=10, ns_coefficients="polar_express")
    torch.testing.assert_close(result, reference.polar_factor(matrix), rtol=0, atol=1e-6)


def test_polar_express_is_nearer_the_polar_factor_than_jordan_after_five_steps():
    matrix = with_spectrum(24, 40, torch.logspace(0, -2, 24, dtype=torch.float64))
    exact = reference.polar_factor(matrix)
    polar_express = (orthogonalize(matrix, ns_coefficients="polar_express") - exact).norm()
    assert polar_express < 0.5 * (orthogonalize(matrix, ns_coefficients="jordan") - exact).norm()


def test_one_triple_per_step_matches_the_steps_taken_one_by_one():
    matrix = torch.randn(8, 12, dtype=torch.float64)
    triples = [(2.0, -1.5, 0.5), (3.0, -4.0, 2.0), reference.JORDAN]
    expected = matrix / matrix.norm()
    for a, b, c in triples:
        gram = expected @ expected.mT
        expected = a * expected + b * gram @ expected + c * gram @ gram @ expected
    for form in FORMS:
        result = orthogonalize(matrix, ns_steps=3, ns_coefficients=triples, form=form)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_named_sets_match_the_tuples_that_they_stand_for():
    matrix = torch.randn(8, 12, dtype=torch.float64)
    assert torch.equal(orthogonalize(matrix), orthogonalize(matrix, ns_coefficients=reference.JORDAN))
    convergent = orthogonalize(matrix, ns_coefficients="convergent")
    assert torch.equal(convergent, orthogonalize(matrix, ns_coefficients=(15 / 8, -10 / 8, 3 / 8)))
    assert {"jordan", "convergent", "polar_express"} <= set(COEFFICIENTS)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"ns_coefficients": "jordon"}, "'jordan'"),
        ({"ns_coefficients": "polar-express"}, "'polar_express'"),
        ({"form": "grams"}, "'gram'"),
        ({"ns_coefficients": [(2.0, -1.5, 0.5)] * 4}, "5"),
        ({"ns_coefficients": (2.0, -1.5)}, "triple"),
        ({"ns_coefficients": [(2.0, -1.5, 0.5, 0.1)] * 5}, "triple"),
        ({"ns_steps": 0}, "ns_steps"),
        ({"ns_steps": -1}, "ns_steps"),
    ],
)
def test_orthogonalize_refuses_a_bad_option_naming_the_remedy(options, named):
    with pytest.raises(ValueError, match=named) as caught:
        orthogonalize(torch.randn(4, 6), **options)
    assert "\n" not in str(caught.value)


def test_orthogonalize_refuses_a_vector():
    with pytest.raises(ValueError, match="shape"):
        orthogonalize(torch.randn(5))


@pytest.mark.parametrize("shape", [(64, 64), (64, 80), (64, 512), (512, 64), (768, 3072)])
def test_auto_matches_the_form_with_fewer_flops(shape):
    m, n = shape
    forms = {form: flops(m, n, 5, form) for form in ("plain", "gram")}
    assert flops(m, n, 5, "auto") == min(forms.values())
    assert flops(m, n, 5, "auto") == flops(n, m, 5, "auto")
    cheaper = min(forms, key=forms.get)
    if m * n < 100_000:  # the large one is only counted
        matrix = torch.randn(shape)
        assert torch.equal(orthogonalize(matrix, form="auto"), orthogonalize(matrix, form=cheaper))


def test_flops_of_the_gram_form_are_fewer_on_long_matrices_and_more_on_square_ones():
    assert flops(64, 64 * 8, 5, "gram") < flops(64, 64 * 8, 5, "plain")
    assert flops(64, 64, 5, "gram") > flops(64, 64, 5, "plain")


def test_flops_of_the_plain_form_match_a_count_by_hand():
    m, n, steps = 16, 40, 5  # too small for blocks: G = XX', G G, and u X per step
    assert flops(m, n, steps, "plain") == steps * (2 * m * m * n + 2 * m**3 + 2 * m * m * n)
