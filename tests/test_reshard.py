"""One small model in each layout: trained as in one process; checkpoints load across layouts.

Everything is in float64, so that a difference is an error and not rounding: a sum in another order is 1e-16 off, and
hardly flips a sign.
"""

import copy
import itertools
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from optimizers import RuleOptimizer, build_optimizer

SAVED, STEPS = 5, 10
WIDTH, HIDDEN, VOCABULARY = 10, 18, 13  # nothing divides by 4
# Ranks of a layout, and the routes that its hidden matrices take.
LAYOUTS = {
    "1 process": (1, {"local"}),
    "2 ddp": (2, {"replicated"}),
    "4 owners": (4, {"replicated"}),
    "2 fsdp": (2, {"sharded"}),
    "4 fsdp": (4, {"sharded"}),
    "2x2 hsdp": (4, {"hsdp"}),
    "2x2 fsdp x tp": (4, {"sharded"}),
}
# Every pair of four layouts; the others from and to one or two of them.
PAIRS = [
    *itertools.product(("1 process", "2 ddp", "4 fsdp", "2x2 hsdp"), repeat=2),
    *itertools.permutations(("4 fsdp", "2 fsdp"), 2),
    *itertools.permutations(("4 owners", "1 process"), 2),
    *itertools.permutations(("4 owners", "2x2 hsdp"), 2),
    ("2 ddp", "4 owners"),
    ("4 owners", "4 owners"),
    *itertools.permutations(("4 fsdp", "2x2 fsdp x tp"), 2),
]
FORMS = {"plain": StateDictOptions(), "flattened": StateDictOptions(flatten_optimizer_state_dict=True)}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # "1 process" has no group
TOLERANCE = 1e-10  # of losses near 2.6, after ten steps of rounding at 1e-16


@pytest.fixture(scope="module")
def run():
    """Run a function of (layout, ...) on as many ranks as the layout has; returns one result per rank."""
    with Ranks(2) as ranks2, Ranks(4) as ranks4:
        pools = {2: ranks2, 4: ranks4}

        def run_on(function, layout: str, *arguments) -> list:
            size, _ = LAYOUTS[layout]
            return pools[size](function, layout, *arguments) if size > 1 else [function(layout, *arguments)]

        yield run_on


class Tiny(nn.Module):
    """Embedding, three hidden matrices, a norm and a head: the roles of a real model."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.up, self.down = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, width, bias=False)
        self.mixer = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.down(F.gelu(self.up(x)))
        x = x + self.mixer(self.norm(x))
        return self.head(x)


@cache  # a mesh makes groups, on all ranks
def mesh_of(layout: str) -> DeviceMesh:
    shape = (2, 2) if layout.startswith("2x2") else (LAYOUTS[layout][0],)
    return init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[: len(shape)])


def build(layout: str, lr: float = 0.02, width: int = WIDTH) -> tuple[nn.Module, RuleOptimizer]:
    torch.manual_seed(0)
    model = Tiny(width).double()
    if layout.endswith(("ddp", "owners")):
        model = DistributedDataParallel(model)
    elif layout.endswith("fsdp x tp"):
        parallelize_module(model, mesh_of(layout)["inner"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh_of(layout)["outer"])
    elif layout != "1 process":
        for module in (model.up, model.down):
            fully_shard(module, mesh=mesh_of(layout))
        fully_shard(model, mesh=mesh_of(layout))
    gradients = "to_owners" if layout.endswith("owners") else "all_reduced"
    return model, build_optimizer(model, "olion", lr=lr, adamw_lr=lr / 2, gradients=gradients)


def train(layout: str, model: nn.Module, optimizer: RuleOptimizer, steps: range) -> list[float]:
    """Take steps on the same global batches, whatever the layout, and return their losses over the whole batch."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if layout.endswith("tp"):  # the two ranks of a tensor parallel pair see the same
        rank, size = rank // 2, size // 2
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCABULARY, (8, 6), generator=generator)[rank::size]  # (8 / size, 6)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    return losses


class Run(NamedTuple):
    """The results of a rank: losses, whole parameters, and the routes of its matrices."""

    losses: list[float]
    params: dict[str, Tensor]
    routes: set[str]


def train_and_save(layout: str, folder: Path) -> Run:
    """Train from the start without a break, and save on the way."""
    model, optimizer = build(layout)
    losses = train(layout, model, optimizer, range(SAVED))
    for form, options in FORMS.items():
        model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.save(state, checkpoint_id=folder / layout / form)
    losses += train(layout, model, optimizer, range(SAVED, STEPS))
    params = {name.removeprefix("module."): param.detach() for name, param in model.named_parameters()}
    params = {name: param.full_tensor() if isinstance(param, DTensor) else param for name, param in params.items()}
    return Run(losses, params, {entry.route for entry in optimizer.plan.entries if entry.rule == "olion"})


def load_and_train(layout: str, checkpoint: Path, form: str) -> list[float]:
    """Load into another model and optimizer, of another rate, and return the losses from there on."""
    model, optimizer = build(layout, lr=1.0)
    for param in model.parameters():
        nn.init.zeros_(param)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=FORMS[form])
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=checkpoint / form)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=FORMS[form]
    )
    return train(layout, model, optimizer, range(SAVED, STEPS))


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    """Return (the folder of a layout's checkpoints, its uninterrupted run's results on each rank), of one run each."""
    folder = tmp_path_factory.mktemp("reshard")
    return cache(lambda layout: (folder / layout, run(train_and_save, layout, folder)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_matches_one_process(uninterrupted, layout):
    _, [alone] = uninterrupted("1 process")
    assert abs(alone.losses[-1] - alone.losses[0]) > 0.01  # it moves
    _, runs = uninterrupted(layout)
    for run in runs:
        assert run.routes == LAYOUTS[layout][1]
        assert run.losses == pytest.approx(alone.losses, abs=TOLERANCE)
        assert run.params.keys() == alone.params.keys()
        for name, param in run.params.items():
            torch.testing.assert_close(param, alone.params[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_losses_after_loading_match_the_uninterrupted_run(run, uninterrupted, source, target):
    _, [alone] = uninterrupted("1 process")
    checkpoint, _ = uninterrupted(source)
    for form in FORMS:
        for losses in run(load_and_train, target, checkpoint, form):
            assert losses == pytest.approx(alone.losses[SAVED:], abs=TOLERANCE), form


def losses_of_twins(layout: str) -> list[list[float]]:
    """Copy a run's state into other models in each way that reads no file; return the losses of all from there on."""
    model, optimizer = build(layout)
    train(layout, model, optimizer, range(SAVED))
    forms = [*FORMS.values(), StateDictOptions(full_state_dict=True)]
    if layout.endswith(("tp", "owners")):
        forms.pop()  # torch 2.13 can neither cut a whole tensor into uneven _StridedShards nor gather from one rank
    pairs = [build(layout, lr=1.0) for _ in ("state_dict", *forms)]
    (_, through_torch), *through_dcp = pairs
    through_torch.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for twin, options in zip(through_dcp, forms, strict=True):
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        set_optimizer_state_dict(*twin, state, options=options)
    for twin, _ in pairs:
        twin.load_state_dict(copy.deepcopy(model.state_dict()))
    return [train(layout, *pair, range(SAVED, STEPS)) for pair in [(model, optimizer), *pairs]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_after_load_state_dict_match_the_run_it_was_copied_from(run, layout):
    for losses, *losses_of_others in run(losses_of_twins, layout):
        assert losses_of_others == [losses] * len(losses_of_others)


# --- A state that does not fit


def copied(optimizer: RuleOptimizer) -> tuple[dict, list]:
    """Return copies of all buffers this rank holds, by parameter and name, and the groups' options."""
    state = {
        (index, key): (buffer.to_local() if isinstance(buffer, DTensor) else buffer).clone()
        for index, buffers in enumerate(optimizer.state.values())
        for key, buffer in buffers.items()
    }
    return state, [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]


def refusals(layout: str) -> list[tuple[str, bool]]:
    """Load states that do not fit, in every way of loading; return the errors, and whether nothing changed."""
    model, optimizer = build(layout)
    wider = build(layout, lr=1.0, width=12)
    train(layout, model, optimizer, range(1))
    train(layout, *wider, range(1))
    attempts = [lambda: optimizer.load_state_dict(wider[1].state_dict())]
    for options in FORMS.values():
        of_wider = get_optimizer_state_dict(*wider, options=options)
        without = get_optimizer_state_dict(model, optimizer, options=options)
        if "state" in without:
            without["state"]["up.weight"] = {}
        else:
            del without["state.up.weight.momentum"]
        for state in (of_wider, without):
            attempts.append(partial(set_optimizer_state_dict, model, optimizer, state, options=options))
    results = []
    before, groups = copied(optimizer)
    for attempt in attempts:
        with pytest.raises(ValueError) as caught:
            attempt()
        after, groups_after = copied(optimizer)
        same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        results.append((str(caught.value), same and groups == groups_after))
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing(run, layout):
    for errors in run(refusals, layout):
        for error, unchanged in errors:
            assert "up.weight" in error and "\n" not in error
            assert unchanged
