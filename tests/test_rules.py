"""Each update rule against its float64 reference, and against other implementations."""

from functools import partial

import lion_pytorch
import pytest
import reference
import torch
import torch.optim._muon as torch_muon
from torch import Tensor, nn

from optimizers import AdaMuon, AdamW, Curvature, Lion, LionMuon, Muon, NorMuon, OLion, PolarGrad, PolarSGDM, Signum
from optimizers.qdwh import qdwh

STEPS = 12
LEARNING_RATE = 0.05  # large, so that one wrong sign moves an entry far above any rounding

# case -> (rows, columns, rank or None for full, zero rows, zero columns)
CASES = {
    "tall": (48, 16, None, [], []),
    "wide": (16, 48, None, [], []),
    "square": (32, 32, None, [], []),
    "one row": (1, 24, None, [], []),
    "rank-deficient tall": (40, 24, 5, [], []),
    "rank-deficient wide": (24, 40, 5, [], []),
    "zero rows tall": (40, 24, None, [0, 17, 39], []),
    "zero rows wide": (24, 40, None, [0, 11, 23], []),
    "zero columns": (24, 40, None, [], [0, 19]),
    "all zero": (24, 16, 0, [], []),
}
# Rules whose direction is orthogonalized: zero rows, ns_steps and ns_dtype are tested of these alone.
ORTHOGONALIZED = {
    "olion": (OLion, reference.olion),
    "muon": (Muon, reference.muon),
    "adamuon": (AdaMuon, reference.adamuon),
    "normuon": (NorMuon, reference.normuon),
    "lionmuon": (LionMuon, reference.lionmuon),
}
RULES = ORTHOGONALIZED | {
    "curvature": (partial(Curvature, power=4.0, iterations=0), reference.curvature),
    "polargrad": (partial(PolarGrad, ns_form="auto"), reference.polargrad),
    "polargrad, polar first": (
        partial(PolarGrad, ns_form="auto", order="polar_first"),
        partial(reference.polargrad, order="polar_first"),
    ),
    "lion": (Lion, reference.lion),
    "signum": (Signum, reference.signum),
    "adamw": (AdamW, reference.adamw),
}


def problem(case: str) -> tuple[Tensor, list[Tensor]]:
    """A float32-representable matrix and STEPS gradients whose zeros and column space stay the same."""
    rows, columns, rank, zero_rows, zero_columns = CASES[case]
    generator = torch.Generator().manual_seed(sorted(CASES).index(case))
    left = torch.randn(rows, max(rank or 0, 1), generator=generator)
    gradients = []
    for _ in range(STEPS):
        gradient = torch.randn(rows, columns, generator=generator)
        if rank is not None:  # one column space for all steps: the momentum is rank-deficient too
            gradient = left @ torch.randn(left.shape[1], columns, generator=generator) * (rank > 0)
        gradient[zero_rows] = 0
        gradient[:, zero_columns] = 0
        gradients.append(gradient)
    return torch.randn(rows, columns, generator=generator), gradients


def run(optimizer_class, start: Tensor, gradients: list[Tensor], **options):
    """Step through the gradients; return the parameter and its state."""
    parameter = nn.Parameter(start.clone())
    optimizer = optimizer_class([parameter], **options)
    for gradient in gradients:
        parameter.grad = gradient.to(start.dtype)
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


def run_reference(rule, start: Tensor, gradients: list[Tensor], **options):
    parameter, state = start.double(), {}
    for gradient in gradients:
        parameter, state = rule(parameter, gradient, state, **options)
    return parameter, state


def assert_state_equals(state: dict, expected: dict, **tolerance):
    for name, value in expected.items():
        if name.startswith("_"):  # the reference's own
            continue
        torch.testing.assert_close(torch.as_tensor(state[name]).double(), torch.as_tensor(value).double(), **tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RULES)
def test_rule_in_float64_matches_reference(name, case):
    optimizer_class, rule = RULES[name]
    start, gradients = problem(case)
    options = {"lr": LEARNING_RATE, "weight_decay": 0.1}
    parameter, state = run(optimizer_class, start.double(), gradients, **options)
    expected, expected_state = run_reference(rule, start, gradients, **options)
    # Rounding only: 2e-16 times the slope of five steps at zero, 3.4445^5 = 485.
    torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-11)
    assert_state_equals(state, expected_state, rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [name for name in RULES if name != "olion"])
def test_rule_in_float32_matches_reference(name, case):
    optimizer_class, rule = RULES[name]
    start, gradients = problem(case)
    options = {"lr": LEARNING_RATE, "weight_decay": 0.1}
    parameter, state = run(optimizer_class, start, gradients, **options)
    expected, expected_state = run_reference(rule, start, gradients, **options)
    # 6e-8 times the slope 485 of Newton-Schulz at zero, on steps of LEARNING_RATE * O(1), STEPS times.
    largest = max(float(torch.linalg.svdvals(gradient.double()).sum()) for gradient in gradients)
    size = max(1.0, largest) if name.startswith("polargrad") else 1.0  # its steps are of the nuclear norm's size
    torch.testing.assert_close(parameter.double(), expected, rtol=0, atol=2e-5 * size)
    assert_state_equals(state, expected_state, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_olion_in_float32_matches_reference_where_the_sign_is_certain(case):
    start, gradients = problem(case)
    parameter, state = run(OLion, start, gradients, lr=LEARNING_RATE, weight_decay=0.1)
    expected, expected_state = run_reference(reference.olion, start, gradients, lr=LEARNING_RATE, weight_decay=0.1)
    assert_state_equals(state, expected_state, rtol=0, atol=1e-6)

    # A sign may flip only where float32's rounding, times the slope 485, can carry the entry across zero.
    # Entries that are exactly zero are certain too: they must not move.
    certain = torch.ones_like(start, dtype=torch.bool)
    moments = {}
    for gradient in gradients:
        mixture, momentum = reference.olion_mixture(gradient, moments)
        moments = {"momentum": momentum}
        size = reference.newton_schulz(mixture).abs()
        certain &= (size == 0) | (size > 1e-4 * size.max())
    assert certain.double().mean() > 0.98  # the test says something about nearly all entries
    # 2e-6: float32's rounding of STEPS updates of a parameter of about 3
    torch.testing.assert_close(parameter.double()[certain], expected[certain], rtol=0, atol=2e-6)


@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("ns_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["zero rows tall", "zero rows wide"])
@pytest.mark.parametrize("name", ORTHOGONALIZED)
def test_zero_rows_stay_exactly_still_but_for_weight_decay(name, case, ns_dtype, form):
    start, gradients = problem(case)
    zero_rows = CASES[case][3]
    options = {"lr": LEARNING_RATE, "ns_dtype": ns_dtype, "ns_form": form}
    parameter, _ = run(ORTHOGONALIZED[name][0], start, gradients, weight_decay=0.0, **options)
    assert torch.equal(parameter[zero_rows], start[zero_rows])
    assert (parameter != start).any(dim=1).sum() == len(start) - len(zero_rows)  # all other rows moved

    parameter, _ = run(ORTHOGONALIZED[name][0], start, gradients, weight_decay=0.1, **options)
    decayed = start[zero_rows].double() * (1 - LEARNING_RATE * 0.1) ** STEPS
    torch.testing.assert_close(parameter[zero_rows].double(), decayed, rtol=STEPS * 1.2e-7, atol=0)


@pytest.mark.parametrize("zero_rows", [[], [0], [1, 5, 30]])
def test_olion_step_with_zeros_has_the_root_mean_square_of_its_scale(zero_rows):
    gradient = torch.randn(32, 24, dtype=torch.float64)
    gradient[zero_rows] = 0
    start = torch.zeros_like(gradient)
    parameter, _ = run(OLion, start, [gradient], lr=1.0, weight_decay=0.0, scale=0.3)
    torch.testing.assert_close(parameter.square().mean().sqrt().item(), 0.3, rtol=1e-12, atol=0)
    entry = 0.3 * (32 / (32 - len(zero_rows))) ** 0.5  # gamma = scale * sqrt(entries / nonzero entries)
    nonzero = parameter[gradient.abs().sum(dim=1) > 0].abs()
    torch.testing.assert_close(nonzero, torch.full_like(nonzero, entry), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ORTHOGONALIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_all_zero_gradient_leaves_the_parameter_finite_and_still(name, dtype):
    start = torch.randn(12, 8)
    parameter, _ = run(
        ORTHOGONALIZED[name][0], start, [torch.zeros(12, 8)] * 2, lr=1.0, weight_decay=0.0, ns_dtype=dtype
    )
    assert torch.equal(parameter, start)


@pytest.mark.parametrize("case", ["tall", "wide", "square"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
def test_muon_around_the_orthogonalization_matches_torch_exactly(monkeypatch, case, nesterov, adjust_lr_fn):
    """With torch's bf16 Newton-Schulz replaced by the float64 reference, all the rest must be equal."""
    monkeypatch.setattr(
        torch_muon,
        "_zeropower_via_newtonschulz",
        lambda gradient, coefficients, steps, eps: reference.newton_schulz(gradient, steps, coefficients, eps),
    )
    start, gradients = problem(case)
    options = {"lr": 0.02, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn, "momentum": 0.9}
    ours, _ = run(Muon, start.double(), gradients, **options)
    theirs, _ = run(torch.optim.Muon, start.double(), gradients, **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", ["tall", "wide", "square"])
@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
def test_muon_in_bfloat16_matches_torch(case, adjust_lr_fn):
    start, gradients = problem(case)
    start = torch.zeros_like(start)  # so that the result is the sum of the updates
    options = {"lr": 0.02, "weight_decay": 0.0, "adjust_lr_fn": adjust_lr_fn}
    ours, _ = run(Muon, start, gradients, ns_dtype=torch.bfloat16, **options)
    theirs, _ = run(torch.optim.Muon, start, gradients, **options)
    # bf16 keeps 8 bits: each of the 15 products rounds by up to 0.4 %, and the two orders of work differ.
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(7,), (16, 12), (2, 3, 4, 5), ()])
def test_adamw_matches_torch(shape, weight_decay, dtype, tolerance):
    start = torch.randn(shape, dtype=dtype)
    gradients = [torch.randn(shape, dtype=dtype) for _ in range(STEPS)]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    ours, _ = run(AdamW, start, gradients, **options)
    theirs, _ = run(torch.optim.AdamW, start, gradients, **options)
    # Fused and plain kernels round differently: a few units in the last place of entries of about 1 to 3.
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_adamw_defaults_match_torch():
    start, gradients = torch.randn(16, 12), [torch.randn(16, 12) for _ in range(STEPS)]
    ours, _ = run(AdamW, start, gradients)
    theirs, _ = run(torch.optim.AdamW, start, gradients)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # rounding, as above


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lion_matches_lion_pytorch(weight_decay, dtype, tolerance):
    start = torch.randn(16, 12, dtype=dtype)
    gradients = [torch.randn(16, 12, dtype=dtype) for _ in range(STEPS)]
    options = {"lr": 1e-2, "betas": (0.95, 0.98), "weight_decay": weight_decay}
    ours, _ = run(Lion, start, gradients, **options)
    theirs, _ = run(lion_pytorch.Lion, start, gradients, **options)
    # A step moves an entry by 1e-2, so any wrong sign shows; the rest is rounding of entries of 1 to 3.
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_lion_defaults_match_lion_pytorch():
    start, gradients = torch.randn(16, 12), [torch.randn(16, 12) for _ in range(STEPS)]
    ours, _ = run(Lion, start, gradients)
    theirs, _ = run(lion_pytorch.Lion, start, gradients)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # rounding; the default step is 1e-4


def test_lion_with_scale_and_composed_beta_matches_the_sign_of_olions_mixture():
    """Lion's old-buffer mix with 0.95 * 0.98 = 0.931 is OLion's new-buffer mix with (0.95, 0.98)."""
    start, gradients = problem("square")
    ours, _ = run(Lion, start.double(), gradients, lr=LEARNING_RATE, betas=(0.931, 0.98), scale=0.2)
    expected, moments = start.double(), {}
    for gradient in gradients:
        mixture, momentum = reference.olion_mixture(gradient, moments, (0.95, 0.98))
        moments = {"momentum": momentum}
        expected = expected - LEARNING_RATE * 0.2 * mixture.sign()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ORTHOGONALIZED)
def test_options_are_read_by_matching_the_reference_away_from_the_defaults(name):
    optimizer_class, rule = ORTHOGONALIZED[name]
    start, gradients = problem("tall")
    options = {
        "lr": 0.03,
        "weight_decay": 0.3,
        "ns_steps": 3,
        "ns_coefficients": (15 / 8, -10 / 8, 3 / 8),
    } | {
        "olion": {"betas": (0.8, 0.7), "scale": 0.5},
        "muon": {"momentum": 0.8, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
        "adamuon": {"momentum": 0.8, "eps": 1e-3, "scale": 0.5},
        "normuon": {"betas": (0.8, 0.7), "eps": 1e-3, "scale": 0.5},
        "lionmuon": {"betas": (0.8, 0.7), "period": 3, "sign_scale": 0.3, "scale": 0.5},
    }[name]
    ours, _ = run(optimizer_class, start.double(), gradients, **options)
    expected, _ = run_reference(rule, start, gradients, **options)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)  # rounding, as above


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_signum_without_momentum_steps_by_the_sign_of_the_gradient(weight_decay):
    start, gradients = problem("wide")
    ours, _ = run(Signum, start.double(), gradients[:1], lr=0.5, momentum=0.0, weight_decay=weight_decay)
    expected = start.double() * (1 - 0.5 * weight_decay) - 0.5 * gradients[0].sign()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-15)


def test_lionmuon_of_period_one_matches_muon_with_lions_average():
    start, gradients = problem("tall")
    ours, _ = run(LionMuon, start.double(), gradients, lr=0.1, period=1, betas=(0.0, 0.0))
    options = {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.0}
    theirs, _ = run(Muon, start.double(), gradients, lr=0.1, **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["tall", "zero rows wide"])
def test_signed_muon_matches_olion_with_equal_betas(case):
    start, gradients = problem(case)
    ours, _ = run(Muon, start.double(), gradients, lr=0.1, momentum=0.9, signed=True)
    theirs, _ = run(OLion, start.double(), gradients, lr=0.1, betas=(0.9, 0.9))
    assert torch.equal(ours, theirs)


def test_curvature_of_power_two_matches_the_normalized_gradient_and_signed_its_sign():
    start, gradients = problem("wide")
    zero = torch.zeros_like(start, dtype=torch.float64)
    options = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "power": 2.0, "iterations": 0}
    ours, _ = run(Curvature, zero, gradients[:1], **options)
    torch.testing.assert_close(ours, -reference.to_rms(gradients[0].double(), 0.2), rtol=1e-12, atol=1e-12)
    ours, _ = run(Curvature, zero, gradients[:1], signed=True, **options)
    torch.testing.assert_close(ours, -0.2 * gradients[0].double().sign(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", ["momentum_first", "polar_first"])
@pytest.mark.parametrize("name", ["polargrad", "polarsgdm"])
def test_polargrad_by_full_qdwh_matches_the_svd_for_matrices_of_full_rank(name, order):
    optimizer_class = {"polargrad": PolarGrad, "polarsgdm": PolarSGDM}[name]
    start, gradients = problem("tall")
    options = {"lr": LEARNING_RATE, "weight_decay": 0.1, "momentum": 0.8, "order": order}
    ours, _ = run(optimizer_class, start.double(), gradients, ns_form="qdwh", inner_steps=0, **options)
    expected, _ = run_reference(reference.polargrad, start, gradients, exact=True, **options)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)  # rounding, of updates of about 30


@pytest.mark.parametrize("order", ["momentum_first", "polar_first"])
def test_polargrad_shrinks_in_proportion_to_the_gradient_as_muon_does_not(order):
    start, gradients = problem("tall")
    zero = torch.zeros_like(start, dtype=torch.float64)
    steps = {}
    for size in (1.0, 1e-3, 1e-6):
        shrunk = [size * gradient.double() for gradient in gradients[:3]]
        for optimizer_class, options in ((PolarGrad, {"order": order, "eps": 1e-30}), (Muon, {"weight_decay": 0.0})):
            parameter, _ = run(optimizer_class, zero, shrunk, lr=0.1, momentum=0.5, **options)
            steps[optimizer_class, size] = parameter
    for size in (1e-3, 1e-6):
        torch.testing.assert_close(steps[PolarGrad, size], size * steps[PolarGrad, 1.0], rtol=1e-9, atol=0)
        assert steps[Muon, size].norm() > 0.5 * steps[Muon, 1.0].norm()


def test_two_steps_of_qdwh_leave_singular_values_between_a_third_and_one():
    u, v = (torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q for _ in range(2))
    matrix = (u * torch.logspace(0, -6, 20, dtype=torch.float64)) @ v
    values = torch.linalg.svdvals(qdwh(matrix.float()[None], steps=2)[0])
    assert (values > 0.3).all() and (values < 1 + 1e-5).all()


@pytest.mark.parametrize("order", ["momentum_first", "polar_first"])
def test_signed_polargrad_has_entries_of_its_scale(order):
    start, gradients = problem("zero rows wide")
    zero = torch.zeros_like(start, dtype=torch.float64)
    options = {"lr": 1.0, "order": order, "momentum": 0.0, "ns_form": "svd", "signed": True, "scale": 0.3}
    ours, _ = run(PolarGrad, zero, gradients[:1], **options)
    signs = reference.polar_factor(gradients[0]).sign()
    expected = reference.to_rms(signs, 0.3) if order == "momentum_first" else 0.3 * signs
    signs[(reference.polar_factor(gradients[0]).abs() < 1e-12)] = 0  # rows of rounding
    wanted = -expected * signs.abs()
    moved = signs != 0
    torch.testing.assert_close(ours[moved], wanted[moved], rtol=1e-12, atol=0)
