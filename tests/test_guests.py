"""Optimizers of pytorch_optimizer train matrices beside AdamW, and resume; without the package one line says so."""

import sys

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from common import checkpoint
from optimizers import build_optimizer
from optimizers.guests import GUESTS, Guest

every_guest = pytest.mark.parametrize("name", GUESTS)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.Linear(8, 11))


def build(model: nn.Module, name: str) -> Guest:
    return build_optimizer(model, name, lr=1e-2, adamw_lr=2e-2, weight_decay=0.1)


def train(model: nn.Module, optimizer: Guest, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()


def test_a_guest_without_its_package_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ValueError, match="soap needs the package pytorch_optimizer") as caught:
        build(network(), "soap")
    assert "\n" not in str(caught.value)


@every_guest
def test_a_guest_steps_matrices_as_its_package_does_and_the_rest_by_adamw(name):
    package = pytest.importorskip("pytorch_optimizer")
    model, twin = network(), network()
    optimizer = build(model, name)
    kind, options = GUESTS[name]
    matrices = [twin[1].weight, twin[3].weight]
    theirs = getattr(package, kind)(matrices, lr=1e-2, weight_decay=0.1, **options)
    for step in range(3):
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
            other.grad = param.grad.clone()
        optimizer.step()
        theirs.step()
    assert torch.equal(model[1].weight, twin[1].weight) and torch.equal(model[3].weight, twin[3].weight)
    assert {group["rule"] for group in optimizer.param_groups if "rule" in group} == {"adamw"}
    assert optimizer.state_size() > 0 and not torch.equal(model[0].weight, twin[0].weight)


@every_guest
@pytest.mark.parametrize("how", ["checkpoint", "state dict"])
def test_a_resumed_guest_matches_one_that_went_on(name, how, tmp_path):
    pytest.importorskip("pytorch_optimizer")
    model, twin = network(), network()
    optimizer, resumed = build(model, name), build(twin, name)
    train(model, optimizer, range(3))
    if how == "checkpoint":
        checkpoint.save(tmp_path, 3, model, optimizer, extra={})
        assert checkpoint.load(tmp_path, twin, resumed)["step"] == 3
    else:
        twin.load_state_dict(model.state_dict())
        resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(3, 6))
    train(twin, resumed, range(3, 6))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_guest_refuses_dtensors_and_unknown_options(tmp_path):
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ValueError, match="soap has no option 'momenta'"):
        build_optimizer(network(), "soap", lr=1e-2, momenta=0.9)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, mesh = network(), init_device_mesh("cpu", (1,))
        model[1].weight = nn.Parameter(distribute_tensor(model[1].weight.detach(), mesh, [Replicate()]))
        with pytest.raises(ValueError, match="plain tensors"):
            build(model, "soap")
    finally:
        torch.distributed.destroy_process_group()
