"""scripts.problems: objectives against autograd and linear algebra, runs against plain loops, PolarGrad's theorem."""

import json
import sys

import pytest
import torch
from torch.autograd.functional import hessian

from common.launch import main_guard
from optimizers import RuleOptimizer
from scripts.problems import __main__ as program
from scripts.problems import isotropy, objectives, theorem
from scripts.problems.objectives import PROBLEMS, gaussian
from scripts.problems.running import DECAYED, METHODS, Method, newton, run, scores, tune

SEEDS = (0, 5)
SMALL = {"quadratic": (6, 3), "logistic": (6, 3), "completion": (8, 6, 2, 0.8)}
MUON = Method("Muon", "muon", {"ns_form": "svd"})


def small(name, seeds=SEEDS):
    return PROBLEMS[name](seeds, *SMALL[name])


def hessians(problem, params):
    """The Hessian (d, d) of each seed, by autograd."""
    shape = params[0].shape[1:]

    def value(flat, seed):
        moved = params[0].clone()
        moved[seed] = flat.view(shape)
        return problem.value([moved])[seed]

    return torch.stack([hessian(lambda flat, s=s: value(flat, s), params[0][s].flatten()) for s in range(len(SEEDS))])


@pytest.mark.parametrize("name", ["quadratic", "logistic"])
def test_convex_problems_match_their_hessian_and_are_solved_by_newton(name):
    problem = small(name)
    point = [gaussian(SEEDS, 6, 3)]
    curvature = torch.linalg.eigvalsh(hessians(problem, point))  # (S, d)
    assert float(curvature.max()) <= 1 + 1e-9  # the gradient's Lipschitz constant, or a bound of it
    if problem.convexity is not None:
        torch.testing.assert_close(curvature[:, -1], torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(curvature[:, 0], problem.convexity)
    param = point[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(problem.value([param]).sum(), param)
    step = torch.linalg.solve(hessians(problem, point), grad.flatten(1))
    if bool((problem.value([point[0] - step.view_as(grad)]) <= problem.value(point)).all()):
        torch.testing.assert_close(problem.newton(point)[0], point[0] - step.view_as(grad))
    course = newton(problem, 30)
    assert float(course.gap[0].min()) > 1e-3
    assert float(course.gap[-1].abs().max()) < 1e-12 and float(course.norm[-1].max()) < 1e-7


def test_newton_halves_a_step_that_overshoots():
    """If labels have a margin, weights are small and a full step is far too long."""
    problem = small("logistic")
    far = [4 * gaussian(SEEDS, 6, 3)]
    param = far[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(problem.value([param]).sum(), param)
    full = far[0] - torch.linalg.solve(hessians(problem, far), grad.flatten(1)).view_as(grad)
    assert bool((problem.value([full]) > problem.value(far)).any())
    assert bool((problem.value(problem.newton(far)) < problem.value(far)).all())


def test_completion_is_solved_by_its_factors_alone():
    problem = small("completion")
    assert float(problem.value([gaussian(SEEDS, 8, 2), gaussian(SEEDS, 6, 2)]).max()) < 1e-30
    assert float(problem.value(problem.start).min()) > 0.1
    torch.testing.assert_close(
        problem.value([torch.zeros_like(each) for each in problem.start]), torch.full((2,), 0.5, dtype=torch.float64)
    )


PLAIN_LOOPS = [(method, method.rule != "olion") for method in METHODS if method.rule != "curvature"]


@pytest.mark.parametrize(("method", "decays"), PLAIN_LOOPS, ids=[method.label for method, _ in PLAIN_LOOPS])
def test_a_run_at_many_rates_matches_a_plain_loop_at_each(method, decays):
    problem, steps, rates = small("completion"), 8, [0.01, 0.25]
    course = run(problem, method, rates, decays, steps)
    assert tuple(course.gap.shape) == (steps + 1, 2, 2)
    for place, seed in ((0, 1), (1, 0)):
        params = [each[seed].clone().requires_grad_() for each in problem.start]
        optimizer = RuleOptimizer(params, method.rule, **method.options | {"lr": 1.0, "weight_decay": 0.0})
        for step in range(steps):
            whole = [torch.stack([each] * 2) for each in params]
            problem.value(whole)[seed].backward()
            optimizer.param_groups[0]["lr"] = rates[place] * (DECAYED ** (step / steps) if decays else 1)
            optimizer.step()
            optimizer.zero_grad()
        last = problem.value([torch.stack([each] * 2) for each in params])[seed]
        assert float(course.gap[-1, place, seed]) == pytest.approx(float(last.detach()), rel=1e-6)


def test_rates_that_diverge_are_left_out_and_a_best_at_the_edge_is_reported():
    problem = small("quadratic")
    course = run(problem, Method("Lion", "lion"), [0.01, 1e6], False, 5)
    assert bool(course.gap[1:, 0].isfinite().all()) and bool(course.gap[-1, 1].isnan().all())
    assert scores(problem, course)[1].tolist() == [float("inf")] * 2
    assert tune(problem, MUON, True, 40, [1e-3, 0.1, 10.0]).bracketed
    edge = tune(problem, MUON, True, 40, [1e-4, 1e-3])
    assert edge.rate == 1e-3 and not edge.bracketed


def test_the_measured_gradient_matches_its_formula():
    """G = A' (A X B - C) B' / L of the quadratic problem."""
    problem = small("quadratic")
    course = run(problem, MUON, [0.1], False, 0)
    a, b, c = gaussian(SEEDS, 12, 6), gaussian(SEEDS, 3, 7), gaussian(SEEDS, 12, 7)
    largest = (torch.linalg.matrix_norm(a, 2) * torch.linalg.matrix_norm(b, 2)).square()
    grad = a.mT @ (0 - c) @ b.mT / largest.view(-1, 1, 1)
    torch.testing.assert_close(course.norm[0, 0], torch.linalg.matrix_norm(grad))
    torch.testing.assert_close(course.condition[0, 0], torch.linalg.cond(grad))


def test_polargrad_keeps_the_theorem_s_rate_on_a_strongly_convex_problem():
    """Every step shrinks f - f* by the bound, to the rounding of gaps that are 1e-10 of the first."""
    found = theorem.check(objectives.quadratic((0, 1, 2), 10, 5), 120)
    for promised in found:
        assert bool((promised >= 1 - 1e-4).all())
        assert bool(promised[:100].isfinite().all())
    assert float(found.by_rank.min()) < 100  # the bound is of this order, not trivial


@pytest.mark.parametrize("structure", isotropy.STRUCTURES)
def test_the_dial_turns_the_gradient_from_haar_to_its_structure(structure):
    problem = isotropy.problem(structure, (0,), (0.0, 1.0))
    param = problem.start[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(problem.value([param]).sum(), param)
    haar, worst = grad
    assert bool((haar.abs() > 1e-12).all())
    there = worst.abs() > 1e-9 * worst.abs().max()
    if structure == "aligned":
        assert there.nonzero().tolist() == [[k, k] for k in range(isotropy.RANK)]
    if structure == "rows":
        assert bool(there[:8].all()) and not bool(there[8:].any())
    if structure == "blocks":
        torch.testing.assert_close(isotropy.blocks_of(worst), worst, rtol=0, atol=1e-12)
        assert int(there.sum()) == worst.numel() // isotropy.BLOCKS
    if structure == "columns":
        norms = worst.norm(dim=0)
        assert float(norms.max() / norms.min()) > 3 * float(haar.norm(dim=0).max() / haar.norm(dim=0).min())


def test_isotropy_matches_the_definition_at_the_first_step():
    """Of the first momentum, which is the gradient: eps = sqrt(r) ||m - mean m|| / ||Q||_1, m_k = u_k' sign(Q) v_k."""
    quadratics = isotropy.problem("rows", (0, 1), (0.0, 0.9))
    eps, flatness = isotropy.isotropy(quadratics, torch.tensor([1.0, 0.5]), 1)
    param = quadratics.start[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(quadratics.value([param]).sum(), param)
    for place, matrix in enumerate(grad):
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        q = u @ vh
        m = (u * (q.sign() @ vh.mT)).sum(0)
        known = 16**0.5 * (m - m.mean()).norm() / q.abs().sum()
        haar = ((torch.pi / 2 - 1) * 16 / q.numel()) ** 0.5
        assert float(eps.flatten()[place]) == pytest.approx(float(known / haar), rel=1e-6)
        assert float(flatness.flatten()[place]) == pytest.approx(float(q.abs().sum()) / (16 * q.numel()) ** 0.5)


def test_rank_correlation_matches_spearman_s_formula():
    x, y = torch.tensor([1.0, 5.0, 2.0, 9.0, 7.0]), torch.tensor([2.0, 1.0, 3.0, 8.0, 4.0])
    assert isotropy.rank_correlation(x, y) == pytest.approx(1 - 6 * (1 + 4 + 1 + 0 + 0) / (5 * 24))


@pytest.mark.slow
def test_the_program_records_what_it_draws_and_refuses(tmp_path, monkeypatch, capsys):
    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["problems", *arguments, "--out", str(tmp_path)])
        main_guard(program.main)

    monkeypatch.setattr(program, "METHODS", METHODS[2:5])
    start("completion", "--steps", "5", "--seeds", "0", "1")
    record = json.loads((tmp_path / "problems_completion.json").read_text())
    assert (tmp_path / "problems_completion.png").stat().st_size > 10_000
    assert "OLion" in capsys.readouterr().out and len(record["methods"]["Muon"]["decaying"]["gap"]) == 2
    for wrong in (["cubic"], ["quadratic", "--steps", "0"], ["quadratic", "--seeds", "1", "1"]):
        with pytest.raises(SystemExit):
            start(*wrong)
        assert len(capsys.readouterr().err.splitlines()) == 1
