"""Gradients reduced to the owners of matrices, under DDP on gloo ranks, against training with all-reduced gradients."""

import copy
import io
from functools import cache

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from optimizers import RuleOptimizer, build_optimizer, count_bytes, probe
from optimizers.to_owners import add_traffic

RULES: dict[str, dict] = {
    "olion": {},
    "muon": {},
    "adamuon": {},
    "normuon": {},
    "lionmuon": {"period": 2},
    "curvature": {},
    "polargrad": {},
    "polarsgdm": {"order": "polar_first"},
}
WAYS = ("all_reduced", "to_owners")
STEPS, CLIP, WIDTH, HIDDEN, VOCABULARY = 4, 0.05, 12, 20, 16
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks4():
    with Ranks(4) as ranks:
        yield ranks


class Net(nn.Module):
    """Embedding, five hidden matrices (one idle, one transposed in memory), a norm and a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH, bias=False)
        self.mixer, self.idle, self.turned = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.turned.weight = nn.Parameter(self.turned.weight.detach().T.contiguous().T)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.down(self.up(x).relu())
        x = x + self.turned(self.mixer(self.norm(x)))
        return nn.functional.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


MATRICES = ("up.weight", "down.weight", "mixer.weight", "idle.weight", "turned.weight")


@cache  # making a group is a collective of all ranks
def pairs() -> list:
    return [dist.new_group([0, 1]), dist.new_group([2, 3])]


def build(
    way: str, rule: str = "olion", dtype: torch.dtype = torch.float32, group=None, coarse: bool = True, **options
) -> tuple[DistributedDataParallel, RuleOptimizer]:
    """Return a model in several buckets, and its optimizer.

    coarse: gradients are multiples of 1/4096, whose sums are exact in any order.
    """
    torch.manual_seed(0)
    net = Net().to(dtype)
    for param in net.parameters() if coarse else ():
        param.register_hook(lambda grad: (grad * 4096).round() / 4096)
    ddp = DistributedDataParallel(net, process_group=group, find_unused_parameters=True, bucket_cap_mb=0.002)
    return ddp, build_optimizer(ddp, rule, lr=0.02, gradients=way, **RULES.get(rule, {}), **options)


def batch(step: int, micro: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + dist.get_rank())
    return torch.randint(VOCABULARY, (2, 9), generator=generator)


def take_step(ddp: DistributedDataParallel, optimizer: RuleOptimizer, step: int) -> float:
    """Accumulate two micro-batches, clip and step; return the norm."""
    with ddp.no_sync():
        ddp(batch(step)).backward()
    ddp(batch(step, 1)).backward()
    norm = clip_grad_norm_(ddp.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def whole_params(ddp: DistributedDataParallel) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in ddp.module.named_parameters()}


def trained(way: str, rule: str, **options) -> tuple[dict[str, Tensor], list[float], int]:
    ddp, optimizer = build(way, rule, **options)
    norms = [take_step(ddp, optimizer, step) for step in range(STEPS)]
    return whole_params(ddp), norms, optimizer.state_size()


def both(rule: str, dtype: torch.dtype, coarse: bool, in_pairs: bool = False) -> list:
    group = pairs()[dist.get_rank() // 2] if in_pairs else None
    return [trained(way, rule, dtype=dtype, coarse=coarse, group=group) for way in WAYS]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- Parameters, norms and state


@pytest.mark.parametrize("rule", RULES)
def test_exact_sums_give_the_bits_of_all_reduced_training(ranks4, rule):
    saved = 0
    for (wanted, norms, size), (found, norms_found, size_found) in ranks4(both, rule, torch.float32, True):
        assert max(norms) > CLIP  # it clips
        assert norms_found == norms
        assert equal(found, wanted)
        saved += size - size_found
    momenta = 4 * sum(wanted[name].numel() for name in MATRICES)
    # Of four ranks one keeps each momentum, unless it is of directions, which are on all ranks.
    assert saved == (0 if rule == "polarsgdm" else 3 * momenta)


def test_two_ranks_give_the_bits_of_all_reduced_training(ranks4):
    for (wanted, norms, _), (found, norms_found, _) in ranks4(both, "olion", torch.float32, False, True):
        assert norms_found == norms
        assert equal(found, wanted)


def both_narrow(rule: str) -> list:
    narrow = {"dtype": torch.bfloat16, "coarse": False, "group": pairs()[dist.get_rank() // 2]}
    narrow |= {"state_dtype": "int8_stochastic", "weight_rounding": "compensated"}
    return [trained(way, rule, **narrow) for way in WAYS]


@pytest.mark.parametrize("rule", ["olion", "polarsgdm"])
def test_two_ranks_in_int8_and_bfloat16_give_the_bits_of_all_reduced_training(ranks4, rule):
    for (wanted, norms, _), (found, norms_found, _) in ranks4(both_narrow, rule):
        assert norms_found == norms
        assert equal(found, wanted)


def test_four_ranks_match_all_reduced_training_but_for_the_order_of_sums(ranks4):
    for (wanted, norms, _), (found, norms_found, _) in ranks4(both, "muon", torch.float64, False):
        assert norms_found == pytest.approx(norms, rel=1e-12)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-11)


def gradients() -> tuple[dict[str, str], dict[str, int], dict[str, float]]:
    """Return the types of the gradients, the owners, and the norms of the owned ones."""
    ddp, optimizer = build("to_owners")
    ddp(batch(0)).backward()
    grads = {name: param.grad for name, param in ddp.module.named_parameters()}
    owners = {entry.name: entry.owner for entry in optimizer.plan.entries if entry.owner_only}
    norms = {name: torch.linalg.vector_norm(grads[name]).item() for name in owners if grads[name] is not None}
    return {name: type(grad).__name__ for name, grad in grads.items()}, owners, norms


def test_only_the_owner_has_a_gradient_and_all_ranks_know_its_norm(ranks4):
    found = ranks4(gradients)
    for rank, (kinds, owners, norms) in enumerate(found):
        assert owners.keys() == set(MATRICES)
        assert norms == found[0][2] and len(norms) == 4 and min(norms.values()) > 0
        for name, kind in kinds.items():
            here = owners.get(name) in (None, rank)
            assert kind == ("NoneType" if name.startswith("idle") else "Tensor" if here else "Elsewhere")


def scaled(way: str) -> tuple[dict[str, Tensor], list[float]]:
    """Train by GradScaler; at step 1 the gradient of one matrix is infinite on rank 2."""
    ddp, optimizer = build(way, group=dist.group.WORLD)
    scaler, scales = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    for step in range(STEPS):
        factor = torch.inf if (step, dist.get_rank()) == (1, 2) else 1
        broken = ddp.module.down.weight.register_hook(lambda grad, factor=factor: grad * factor)
        scaler.scale(ddp(batch(step))).backward()
        broken.remove()
        scaler.unscale_(optimizer)
        clip_grad_norm_(ddp.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return whole_params(ddp), scales


def test_gradscaler_skips_the_steps_of_all_reduced_training_on_all_ranks(ranks4):
    wanted, found = ranks4(scaled, "all_reduced"), ranks4(scaled, "to_owners")
    for (params, scales), (params_found, scales_found) in zip(wanted, found, strict=True):
        assert scales == scales_found == [1024.0, 512.0, 512.0, 512.0]
        assert equal(params_found, params)


# --- Loading, measuring, counting


def loaded() -> tuple[bool, bool, str]:
    """Load states by load_state_dict: of all-reduced training, back into that, and rank 0's alone."""
    ddp, optimizer = build("all_reduced")
    take_step(ddp, optimizer, 0)
    twins = [build(way) for way in ("to_owners", "all_reduced")]
    source = optimizer
    for twin, of_twin in twins:
        twin.load_state_dict(ddp.state_dict())
        of_twin.load_state_dict(copy.deepcopy(source.state_dict()))
        source = of_twin
    owners = twins[0][1]
    assert owners.state_size() < optimizer.state_size()
    bytes_of = io.BytesIO()
    torch.save(owners.state_dict(), bytes_of)
    saved = [bytes_of.getvalue()]
    dist.broadcast_object_list(saved)
    from_rank_0 = torch.load(io.BytesIO(saved[0]), weights_only=False)
    with pytest.raises(ValueError, match="must be its owner's") as caught:
        owners.load_state_dict(from_rank_0)
    error = str(caught.value)
    for pair in [(ddp, optimizer), *twins]:
        take_step(*pair, 1)
    params = [whole_params(each) for each in (ddp, *(twin for twin, _ in twins))]
    return equal(params[0], params[1]), equal(params[0], params[2]), error


def test_states_load_from_and_into_all_reduced_training(ranks4):
    for into, back, error in ranks4(loaded):
        assert into and back and "\n" not in error


def measured(way: str) -> dict:
    ddp, optimizer = build(way)
    take_step(ddp, optimizer, 0)
    ddp(batch(1)).backward()
    found = probe(optimizer)
    return {name: value for name, value in found.items() if name != "probe/ms"}


def test_probes_match_those_of_all_reduced_training(ranks4):
    for wanted, found in zip(ranks4(measured, "all_reduced"), ranks4(measured, "to_owners"), strict=True):
        assert any(name.endswith("cosine") for name in wanted)
        assert found == wanted


def counted() -> tuple[dict, dict, dict, dict]:
    """Return the bytes of a backward pass and a step, counted and planned, sent and received."""
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Net(), find_unused_parameters=True)
    optimizer = build_optimizer(ddp, "olion", lr=0.02, gradients="to_owners")
    with count_bytes() as traffic:
        ddp(batch(0)).backward()
        optimizer.step()
    planned = optimizer.plan.traffic()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    sizes = [param.nbytes for param in params]
    add_traffic(planned, sizes, optimizer.plan.entries, dist.get_world_size(), dist.get_rank())
    kinds = ("gradients", "norms", "directions")
    return tuple({kind: each[kind] for kind in kinds} for t in (traffic, planned) for each in (t.sent, t.received))


def test_bytes_are_as_planned_and_half_of_an_all_reduce_s(ranks4):
    found = ranks4(counted)
    for sent, received, sent_planned, received_planned in found:
        assert (sent, received) == (sent_planned, received_planned)
    sizes = {name: 4 * param.numel() for name, param in Net().named_parameters()}
    owned = sum(sizes[name] for name in MATRICES)
    rest = sum(sizes.values()) - owned
    assert sum(each[0]["gradients"] for each in found) == 3 * owned + 4 * 2 * 3 * rest // 4


# --- Refusals


def refused() -> list[str]:
    """Return the errors of what gradients on owners alone cannot do."""
    ddp, optimizer = build("to_owners")
    taken = DistributedDataParallel(Net(), find_unused_parameters=True)
    build_optimizer(taken, lr=0.02, gradients="to_owners")
    attempts = [
        lambda: build_optimizer(Net(), lr=0.02, gradients="to_owners"),
        lambda: build("to_owners", "lion"),
        lambda: build("to_owners", "muon", line_search="armijo"),
        lambda: build_optimizer(taken, lr=0.02, gradients="to_owners"),
        lambda: build_optimizer(ddp, lr=0.02, gradients="owners"),
        lambda: copy.deepcopy(optimizer),
    ]
    found = []
    for attempt in attempts:
        with pytest.raises(ValueError) as caught:
            attempt()
        found.append(str(caught.value))
    return found


def test_what_needs_gradients_everywhere_is_refused_in_one_line(ranks4):
    wanted = (
        "needs a DistributedDataParallel model, got Net",
        "needs a rule with directions",
        "without a line search",
        "one that has one already",
        "gradients must be 'all_reduced' or 'to_owners'; got 'owners'",
        "copy its state by",
    )
    for errors in ranks4(refused):
        for error, words in zip(errors, wanted, strict=True):
            assert words in error and "\n" not in error
