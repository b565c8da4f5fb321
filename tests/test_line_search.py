"""Muon with a line search takes the first step of its list that lowers the loss as much as the slope promises."""

import itertools

import pytest
import reference
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from optimizers import Muon, build_optimizer

OPTIONS = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "ns_form": "svd", "line_search": "armijo"}


def quadratic(rows: int = 6, columns: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((9, rows), (9, columns))]
    return *drawn, torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def loss_of(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (a @ weight - b).square().sum()


def expected_step(a: Tensor, b: Tensor, start: Tensor, lr: float, c: float, shrink: float) -> tuple[float, float, int]:
    """The step of a plain loop over the formula, the nuclear norm, and the losses it took."""
    grad = a.T @ (a @ start - b)
    polar, nuclear = reference.polar_factor(grad), torch.linalg.svdvals(grad).sum()
    factor = max(1.0, start.shape[0] / start.shape[1]) ** 0.5
    step, passes = lr, 1
    while loss_of(start - step * factor * polar, a, b) > loss_of(start, a, b) - c * step * factor * nuclear:
        step, passes = step * shrink, passes + 1
    return step, factor * float(nuclear), passes


@pytest.mark.parametrize(("lr", "c", "shrink"), [(100.0, 0.1, 0.5), (100.0, 0.5, 0.8), (1e-3, 0.1, 0.5)])
def test_search_matches_a_plain_loop_over_the_formula(lr, c, shrink):
    a, b, start = quadratic()
    weight = nn.Parameter(start.clone())
    optimizer = Muon([weight], lr=lr, armijo_c=c, shrink=shrink, **OPTIONS)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(weight, a, b)
        loss.backward()
        losses.append(loss.item())
        return loss

    first = optimizer.step(closure)
    step, slope, passes = expected_step(a, b, start, lr, c, shrink)
    found = optimizer.line_search
    assert found.step == pytest.approx(step, rel=1e-12) and found.slope == pytest.approx(slope, rel=1e-10)
    assert found.passes == passes == len(losses) - 1 and first.item() == losses[0]
    grad = a.T @ (a @ start - b)
    moved = start - step * 1.5**0.5 * reference.polar_factor(grad)
    torch.testing.assert_close(weight.detach(), moved, rtol=0, atol=1e-10)
    torch.testing.assert_close(weight.grad, grad)  # of the first evaluation
    assert found.metrics()["line_search/step_over_slope"] == pytest.approx(step / slope)


def test_search_descends_to_the_minimum_at_any_largest_step():
    a, b, start = quadratic()
    weight = nn.Parameter(start.clone())
    optimizer = Muon([weight], lr=1e4, **OPTIONS)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(weight, a, b)
        loss.backward()
        return loss

    for _ in range(60):
        losses.append(optimizer.step(closure).item())
    best = loss_of(torch.linalg.lstsq(a, b).solution, a, b).item()
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert losses[-1] - best < 0.05 * (losses[0] - best)


def test_search_moves_matrices_first_and_the_rest_by_its_own_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    twin = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    twin.load_state_dict(model.state_dict())
    inputs = torch.randn(16, 5, dtype=torch.float64)
    optimizers = [
        build_optimizer(model, "muon", lr=50.0, adamw_lr=1e-2, line_search="armijo"),
        build_optimizer(twin, "muon", lr=50.0, adamw_lr=1e-2),
    ]
    for network, optimizer in zip((model, twin), optimizers, strict=True):

        def closure(network=network, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (network(inputs) - 1).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs) == (name not in ("0.weight", "2.weight")), name  # the head is AdamW's


def test_a_search_without_a_closure_is_refused_in_one_line():
    weight = nn.Parameter(torch.randn(4, 3))
    weight.grad = torch.randn(4, 3)
    with pytest.raises(ValueError, match="closure") as caught:
        Muon([weight], **OPTIONS).step()
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="shrink"):
        Muon([weight], shrink=0.0)


def searched_in_shards(group: bool) -> tuple[Tensor, float, float, int]:
    """Two steps on four ranks, each with the same data; the whole weight and the result of the second search."""
    a, b, start = quadratic()
    if group:
        weight, options = nn.Parameter(start.clone()), {"process_group": torch.distributed.group.WORLD}
    else:
        mesh = init_device_mesh("cpu", (4,))
        weight, options = nn.Parameter(distribute_tensor(start, mesh, [Shard(0)], src_data_rank=None)), {}
    optimizer = Muon([weight], lr=10.0, wire_dtype=torch.float64, **options, **OPTIONS)

    def closure():
        whole = weight.detach() if group else weight.detach().full_tensor()
        grad = a.T @ (a @ whole - b)
        weight.grad = grad if group else distribute_tensor(grad, mesh, [Shard(0)], src_data_rank=None)
        return loss_of(whole, a, b)

    for _ in range(2):
        optimizer.step(closure)
    found = optimizer.line_search
    return (weight.detach() if group else weight.detach().full_tensor()), found.step, found.slope, found.passes


@pytest.mark.slow
def test_search_on_ranks_matches_one_process():
    a, b, start = quadratic()
    weight = nn.Parameter(start.clone())
    optimizer = Muon([weight], lr=10.0, **OPTIONS)

    def closure():
        weight.grad = a.T @ (a @ weight.detach() - b)
        return loss_of(weight.detach(), a, b)

    for _ in range(2):
        optimizer.step(closure)
    found = optimizer.line_search
    with Ranks(4) as ranks:
        for group in (True, False):
            for whole, step, slope, passes in ranks(searched_in_shards, group):
                assert (step, passes) == (found.step, found.passes) and slope == pytest.approx(found.slope, rel=1e-9)
                torch.testing.assert_close(whole, weight.detach(), rtol=0, atol=1e-9)
