"""Every rule on every layout of its parameters, over gloo ranks, against one process that holds all of it."""

import re
import zlib
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from optimizers import RULES as REGISTERED
from optimizers import OLion, RuleOptimizer, count_bytes
from optimizers.polar import flops

STEPS, LR, DECAY = 4, 0.05, 0.1  # 4: every pattern of zero and missing gradients
POLAR_FIRST = "polargrad, polar first"
# Rules with a `direct`, whose matrices are sent; RULES has the elementwise ones too. BUFFERS counts a rule's state.
MATRIX_RULES = ("olion", "muon", "adamuon", "normuon", "lionmuon", "curvature", "polargrad", POLAR_FIRST, "polarsgdm")
RULES = (*MATRIX_RULES, "lion", "signum", "adamw")
BUFFERS = {"adamuon": 2, "adamw": 2}  # of a parameter's size; 1 in the other rules

# Hard shapes, by options of their param group: on 4 ranks most cut unevenly, and "few" and "row" leave empty
# shards. The four of (7, 5) are sent together. The large one is there for the number of its signs.
GROUPS = [
    (
        {},
        {
            "square": (16, 16),
            "twin": (16, 16),
            "tall": (33, 8),
            "wide": (8, 33),
            "uneven": (18, 10),
            "few": (3, 12),
            "row": (1, 9),
            "frozen": (7, 5),
            "idle": (7, 5),
            "sometimes": (7, 5),
            "zero": (7, 5),
            "large": (128, 96),
        },
    ),
    ({"as_matrices": "batch"}, {"batch": (4, 6, 5), "uneven batch": (5, 6, 4)}),
    ({"as_matrices": "flatten"}, {"convolution": (6, 3, 2, 2)}),
    ({"qkv_split": 3}, {"fused": (24, 8), "fused across shards": (18, 10)}),
    ({"qkv_split": (4, 1, 1)}, {"grouped": (18, 10), "grouped twin": (18, 10), "grouped, wide": (6, 20)}),
    ({"qkv_split": 3, "qkv_dim": 1}, {"fused columns": (10, 18)}),
    ({"qkv_split": (4, 1, 1), "qkv_dim": 1}, {"grouped columns": (7, 12)}),
]
SHAPES = {name: shape for _, shapes in GROUPS for name, shape in shapes.items()}


class Layout(NamedTuple):
    """The expected route, global ranks as a mesh, and the placements that the parameters take in turn.

    Without placements they are plain tensors, the same on every rank.
    """

    route: str
    mesh: list
    placements: list | None = None


LAYOUTS = {
    "replicated on 2": Layout("replicated", [0, 1]),
    "replicated on 4": Layout("replicated", [0, 1, 2, 3]),
    "replicated on 1 and 3": Layout("replicated", [1, 3]),
    "rows": Layout("sharded", [0, 1, 2, 3], [[Shard(0)]]),
    "columns": Layout("sharded", [0, 1, 2, 3], [[Shard(1)]]),
    "rows on 1 and 3": Layout("sharded", [1, 3], [[Shard(0)]]),
    "tensor parallel": Layout("sharded", [0, 1, 2, 3], [[Shard(0)], [Shard(1)], [Replicate()]]),
    "hsdp": Layout("hsdp", [[0, 1], [2, 3]], [[Replicate(), Shard(0)]]),
    "hsdp, neighbours apart": Layout("hsdp", [[0, 2], [1, 3]], [[Replicate(), Shard(0)]]),
    "hsdp, neighbours replicate": Layout("hsdp", [[0, 1], [2, 3]], [[Shard(1), Replicate()]]),
    "replicated dtensors": Layout("replicated", [0, 1, 2, 3], [[Replicate()]]),
    "replicated on two axes": Layout("replicated", [[0, 1], [2, 3]], [[Replicate(), Replicate()]]),
    "rows and columns": Layout("sharded", [[0, 1], [2, 3]], [[Shard(0), Shard(1)], [Shard(1), Shard(0)]]),
    "fsdp x tp": Layout("sharded", [[0, 1], [2, 3]], [[_StridedShard(0, split_factor=2), Shard(0)]]),
    "three axes": Layout("hsdp", [[[0], [1]], [[2], [3]]], [[Shard(0), Replicate(), Shard(1)]]),
}
# Of each kind of message one rule runs on every layout: signs, and a cast with a number per matrix. The others share
# their routes and codecs, and run on one layout per route.
ON_EVERY_LAYOUT = ("olion", "polargrad")
ONE_PER_ROUTE = ("replicated on 4", "rows", "columns", "hsdp", "fsdp x tp")
RULES_ON = {layout: RULES if layout in ONE_PER_ROUTE else ON_EVERY_LAYOUT for layout in LAYOUTS}
PAIRS = [(rule, layout) for layout, rules in RULES_ON.items() for rule in rules]
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_rule = pytest.mark.parametrize("rule", RULES)


@pytest.fixture(scope="module")
def ranks4():
    with Ranks(4) as ranks:
        yield ranks


# --- Jobs of the ranks, and of one process as the reference


def options_of(rule: str):
    return REGISTERED[rule.split(",")[0]].defaults


def exact(rule: str) -> dict:
    """Options under which messages and computation are in float32 or wider, with packed signs."""
    known, signs = options_of(rule), REGISTERED[rule.split(",")[0]].signs
    wide = ("ns_dtype",) if signs else ("ns_dtype", "wire_dtype")
    return {name: torch.float32 for name in wide if name in known}


def draw(name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + step)
    return torch.randn(SHAPES[name], generator=generator)


def gradient(name: str, step: int) -> Tensor | None:
    """The whole gradient at a step: noise, with rows, columns or whole steps of zeros in some."""
    if name in ("frozen", "idle") or (name == "sometimes" and step % 2):
        return None
    grad = draw(name, step)
    if name == "zero" or (name == "uneven" and step % 3 == 0) or (name == "large" and step % 3 == 1):
        grad.zero_()
    if name in ("square", "fused"):
        grad[3] = 0
    if name == "tall" and step % 2:
        grad[2] = 0
    if name == "wide":
        grad[:, 5] = 0
    return grad


@cache  # making a group or a mesh is a collective of all ranks
def group_of(layout: str) -> dist.ProcessGroup:
    return dist.new_group(LAYOUTS[layout].mesh)


@cache
def mesh_of(layout: str) -> DeviceMesh:
    return DeviceMesh("cpu", LAYOUTS[layout].mesh)


def placed(layout: str | None) -> Callable[[str, Tensor], Tensor]:
    """Return the function that puts a whole tensor, equal on all ranks, into the layout."""
    if layout is None or LAYOUTS[layout].placements is None:
        return lambda name, whole: whole
    mesh, turns = mesh_of(layout), LAYOUTS[layout].placements

    def place(name: str, whole: Tensor) -> Tensor:
        placements = turns[list(SHAPES).index(name) % len(turns)]
        return distribute_tensor(whole, mesh, placements, src_data_rank=None)

    return place


@cache  # a DTensor costs more to make than to step
def placed_gradient(layout: str | None, name: str, step: int) -> Tensor | None:
    grad = gradient(name, step)
    return None if grad is None else placed(layout)(name, grad)


def local_of(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).clone()


class Job:
    """Parameters of these names under one rule and layout; layout None is one process by itself."""

    def __init__(self, rule: str, layout: str | None, names=tuple(SHAPES), **options):
        self.layout, self.place = layout, placed(layout)
        self.params = {name: nn.Parameter(self.place(name, draw(name, -1))) for name in names}
        if "frozen" in names:
            self.params["frozen"].requires_grad_(False)
        groups = [
            {"params": [(name, self.params[name]) for name in shapes if name in names]}
            | (how if rule in MATRIX_RULES else {})
            for how, shapes in GROUPS
        ]
        group = group_of(layout) if layout and not LAYOUTS[layout].placements else None
        options = {"lr": LR, "weight_decay": DECAY, "process_group": group} | options
        if rule == POLAR_FIRST:
            rule, options = "polargrad", options | {"order": "polar_first"}
        self.optimizer = RuleOptimizer([group for group in groups if group["params"]], rule, **options)

    def step(self, number: int, poisoned: tuple[str, ...] = ()) -> None:
        for name, param in self.params.items():
            param.grad = placed_gradient(self.layout, name, number)
            if name in poisoned:
                grad = gradient(name, number)
                grad.view(-1)[7] = torch.nan
                param.grad = self.place(name, grad)
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of this rank: parameters by name, their states by "name.buffer"."""
        held = dict(self.params)
        for name, param in self.params.items():
            held |= {f"{name}.{key}": buffer for key, buffer in self.optimizer.state[param].items()}
        # Numbers per row have the layout of the rows, not the parameter's: whole tensors are compared.
        wholes = {
            key: held.pop(key).full_tensor() for key in list(held) if ".row_" in key and isinstance(held[key], DTensor)
        }
        return {key: local_of(tensor) for key, tensor in held.items()} | wholes

    def cut(self, wholes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share of a whole tensor."""
        return {
            key: local_of(self.place(key.split(".")[0], whole)) if whole.ndim and ".row_" not in key else whole
            for key, whole in wholes.items()
        }


def is_member(layout: str) -> bool:
    """Return whether this rank is in the layout; a collective of all ranks, which make its group or mesh."""
    group_of(layout) if LAYOUTS[layout].placements is None else mesh_of(layout)
    return dist.get_rank() in torch.tensor(LAYOUTS[layout].mesh)


def train(rule: str, layout: str | None, options: dict, names=tuple(SHAPES), steps: int = STEPS) -> Job:
    job = Job(rule, layout, names, **options)
    for step in range(steps):
        job.step(step)
    return job


@cache
def local(rule: str) -> dict[str, Tensor]:
    return train(rule, None, exact(rule)).tensors()


Held = dict[str, Tensor]


def compared(rule: str, layout: str, options: dict, wholes: Held) -> tuple[Held, Held] | None:
    """Return this rank's tensors after all steps, and the expected ones; None outside the layout."""
    if not is_member(layout):
        return None
    job = train(rule, layout, options)
    return job.tensors(), job.cut(wholes)


def members(results: list, layout: str) -> list:
    """The results of the layout's ranks; the others must have none."""
    ranks = sorted(torch.tensor(LAYOUTS[layout].mesh).flatten().tolist())
    assert [rank for rank, result in enumerate(results) if result is not None] == ranks
    return [results[rank] for rank in ranks]


def differing(results: list[tuple[Held, Held]], tolerance: float) -> int:
    """Count entries, over all ranks, that differ from the expected ones by more than the tolerance."""
    count = 0
    for got, want in results:
        assert got.keys() == want.keys()
        for key in want:
            assert got[key].shape == want[key].shape and got[key].dtype == want[key].dtype, key
            count += int((~torch.isclose(got[key], want[key], rtol=0, atol=tolerance, equal_nan=True)).sum())
    return count


def entries(results: list[tuple[Held, Held]]) -> int:
    return sum(tensor.numel() for _, want in results for tensor in want.values())


def assert_replicas_equal(results: list[tuple[Held, Held]]) -> None:
    """Replicas on two ranks are equal bit for bit."""
    for i, (first, wanted) in enumerate(results):
        for second, wanted_there in results[:i]:
            for key in first:
                if torch.equal(wanted[key], wanted_there[key]):
                    assert torch.equal(first[key], second[key]), key


def only(results: list[tuple[Held, Held]], keep: Callable[[str], bool]) -> list[tuple[Held, Held]]:
    return [tuple({key: held[key] for key in held if keep(key)} for held in pair) for pair in results]


# --- The result does not depend on the layout


@pytest.mark.parametrize(("rule", "layout"), PAIRS)
def test_steps_match_one_process(ranks4, rule, layout):
    results = members(ranks4(compared, rule, layout, exact(rule), local(rule)), layout)
    assert_replicas_equal(results)
    params, momenta = only(results, lambda key: "." not in key), only(results, lambda key: key.endswith("momentum"))
    # Elementwise, but where polar factors are averaged, which round as their products are batched.
    assert differing(momenta, 1e-4 if rule == POLAR_FIRST else 0.0) == 0
    if rule in ("lion", "signum"):
        assert differing(params, 0.0) == 0
    elif rule == "adamw":
        # torch's fused kernel rounds once where it is vectorized, and twice in the last entries of a tensor, which
        # are others in a shard: an ulp per step, of numbers below 8.
        assert differing(results, STEPS * 5e-7) == 0
    elif rule == "olion":
        # A step moves every entry by LR x 0.2 or more, so a difference of 1e-3 is a sign that differed at some step.
        # Products batched or cut otherwise round otherwise, and may flip the sign of an entry next to 0.
        turned = differing(params, 1e-3)
        assert turned <= (0 if "replicated" in layout else 1e-5 * STEPS * entries(params))
        if not turned:
            assert differing(params, 0.0) == 0
    else:
        # Newton-Schulz grows float32's rounding, 6e-8, up to 3.4445 times per step on small singular values, to 3e-5
        # of an entry's size, and an update is LR times that. AdaMuon divides by the entry's own size, so that of an
        # entry next to 0 it takes the sign.
        tolerance = STEPS * LR * 3e-5
        if rule.startswith("polar"):
            tolerance *= 1000  # the nuclear norm of "large", 128 x 96 normal entries, is 900
        assert differing(params, tolerance) <= (0 if rule != "adamuon" else 1e-5 * STEPS * entries(params))
        assert differing(only(results, lambda key: key.endswith("second_moment")), tolerance) == 0


@pytest.mark.parametrize("layout", ["replicated on 4", "hsdp"])
@pytest.mark.parametrize("rule", ["muon", "adamuon"])
def test_directions_in_bfloat16_match_one_process_to_their_rounding(ranks4, rule, layout):
    results = members(ranks4(compared, rule, layout, {}, local(rule)), layout)
    assert_replicas_equal(results)
    params = only(results, lambda key: "." not in key)
    # bfloat16 rounds by at most 2^-9 of an entry; entries of D are below 1.3 sqrt(m / n) in Muon, and below
    # 0.2 / sqrt(1 - 0.95) times a few in AdaMuon, whose second moment is of rounded directions, too.
    assert differing(params, STEPS * LR * 2**-9 * 3) == 0
    assert differing(params, STEPS * LR * 3e-5) > entries(params) / 10  # or the message was not in bfloat16


def compared_signed(layout: str) -> tuple[Held, Held] | None:
    """Muon with a sign, and OLion with its betas; three steps."""
    if not is_member(layout):
        return None
    muon = train("muon", layout, {"momentum": 0.9, "signed": True, "ns_dtype": torch.float32}, steps=3)
    return muon.tensors(), train("olion", layout, {"betas": (0.9, 0.9), "ns_dtype": torch.float32}, steps=3).tensors()


@pytest.mark.parametrize("layout", ["replicated on 4", "hsdp", "fsdp x tp"])
def test_signed_muon_matches_olion_on_the_wire_too(ranks4, layout):
    assert differing(members(ranks4(compared_signed, layout), layout), 0.0) == 0


def received_by_lionmuon(layout: str) -> list[int]:
    """Bytes that this rank receives at each of four steps."""
    is_member(layout)
    job, received = Job("lionmuon", layout, DENSE), []
    for step in range(4):
        with count_bytes() as traffic:
            job.step(step)
        received.append(traffic.total_received)
    return received


@pytest.mark.parametrize("layout", ["replicated on 4", "rows", "fsdp x tp"])
def test_lionmuon_receives_nothing_at_every_second_step(ranks4, layout):
    for first, second, third, fourth in ranks4(received_by_lionmuon, layout):
        assert first == third > 0 and second == fourth == 0


def stepped_in_half_precision(layout: str) -> list[Tensor]:
    """Take one step of more signs than float16 can count; return this rank's tensors, and the expected ones."""
    whole = torch.randn(300, 1001, generator=torch.Generator().manual_seed(1)).half()
    mesh, placements = mesh_of(layout), LAYOUTS[layout].placements[0]
    cut, alone = nn.Parameter(distribute_tensor(whole, mesh, placements)), nn.Parameter(whole)
    for param in (cut, alone):
        param.grad = param.detach().clone()
        OLion([param], lr=1.0, weight_decay=0.0).step()
    return [local_of(cut), local_of(distribute_tensor(alone.detach(), mesh, placements))]


@pytest.mark.parametrize("layout", ["rows", "rows and columns"])
def test_a_step_in_half_precision_matches_one_process(ranks4, layout):
    for got, want in ranks4(stepped_in_half_precision, layout):
        assert torch.equal(got, want)


def stepped_with_a_narrow_state(process_group: bool) -> list[Tensor]:
    """Two equal matrices, the first without a gradient, with a state of fewer bits than theirs."""
    params = [nn.Parameter(draw("square", number)) for number in (0, 1)]
    group = dist.group.WORLD if process_group else None
    optimizer = OLion(params, lr=1.0, state_dtype=torch.bfloat16, process_group=group)
    params[1].grad = draw("square", 2)
    optimizer.step()
    return [param.detach() for param in params]


def test_a_missing_gradient_leaves_the_precision_of_other_matrices(ranks4):
    for held in ranks4(stepped_with_a_narrow_state, True):
        for got, want in zip(held, stepped_with_a_narrow_state(False), strict=True):
            assert torch.equal(got, want)


# --- Messages


def packed_and_unpacked(layout: str) -> tuple[Held, Held, int]:
    """Train with signs packed and not; return both and the bytes of zeros that did not fit beside the signs."""
    # Directions without a past: with b2 = 0 a row of zeros in the gradient is one in the direction.
    options, names = exact("olion") | {"betas": (0.95, 0.0)}, ("square", "tall", "uneven", "large")
    with count_bytes() as traffic:
        packed = train("olion", layout, options, names, steps=15).tensors()
    unpacked = train("olion", layout, options | {"wire_dtype": torch.float32}, names, steps=15).tensors()
    return packed, unpacked, traffic.sent["zeros"] + traffic.received["zeros"]


@pytest.mark.parametrize("layout", ["replicated on 4", "rows", "hsdp"])
def test_packed_signs_match_unpacked_ones_bit_for_bit_after_15_steps(ranks4, layout):
    for packed, unpacked, zeros in ranks4(packed_and_unpacked, layout):
        assert zeros > 0
        assert differing([(packed, unpacked)], 0.0) == 0


def train_poisoned(rule: str, layout: str | None) -> Job:
    job = Job(rule, layout, ("square", "twin", "tall", "fused across shards"), **exact(rule))
    for step in range(3):
        job.step(step, poisoned=("square", "fused across shards") if step == 1 else ())
    return job


def compared_poisoned(rule: str, layout: str, wholes: Held) -> tuple[Held, Held]:
    is_member(layout)
    job = train_poisoned(rule, layout)
    return job.tensors(), job.cut(wholes)


@pytest.mark.parametrize("layout", ["replicated on 4", "rows", "hsdp", "fsdp x tp"])
@pytest.mark.parametrize("rule", ["olion", "muon"])
def test_a_gradient_of_nan_reaches_its_matrix_on_every_rank_and_no_other(ranks4, rule, layout):
    wholes = train_poisoned(rule, None).tensors()
    assert wholes["square"].isnan().all() and wholes["twin"].isfinite().all() and wholes["tall"].isfinite().all()
    blocks = wholes["fused across shards"].view(3, -1).isnan()
    assert blocks[0].all() and not blocks[1:].any()
    assert differing(ranks4(compared_poisoned, rule, layout, wholes), 1e-5) == 0


DENSE = ("twin", "few", "row", "large", "batch", "uneven batch", "convolution", "fused across shards")
DENSE += ("grouped", "fused columns", "grouped columns")


PRECISIONS = {"": {}, " in bfloat16": {"ns_dtype": torch.bfloat16}, " in int8": {"to_owner_dtype": "int8"}}


def measured(layout: str) -> dict[str, tuple] | None:
    """Return, by rule, the bytes counted in a step, those of the plan, and those counted after the block."""
    if not is_member(layout):
        return None
    found = {}
    for rule in RULES_ON[layout]:
        for label, options in PRECISIONS.items():
            if options and rule not in ("olion", "muon"):
                continue
            job = Job(rule, layout, DENSE, **options)
            with count_bytes() as traffic:
                job.step(0)
            counted = dict(traffic.sent), dict(traffic.received)
            job.step(1)
            planned = job.optimizer.plan.traffic()
            after = dict(traffic.sent), dict(traffic.received)
            found[rule + label] = counted, (dict(planned.sent), dict(planned.received)), after
    return found


@every_layout
def test_bytes_counted_match_the_plan_and_stop_with_the_block(ranks4, layout):
    for found in members(ranks4(measured, layout), layout):
        for rule, (counted, planned, after) in found.items():
            assert counted == planned == after, rule
            assert bool(counted[1]) == (rule.partition(" in ")[0] in MATRIX_RULES)


def eight_matrices(rule: str, layout: str) -> tuple[dict, dict]:
    """Step 8 matrices of 256 x 256 once: bytes sent and received by kind."""
    is_member(layout)
    params = [nn.Parameter(placed(layout)("large", torch.randn(256, 256))) for _ in range(8)]
    group = group_of(layout) if LAYOUTS[layout].placements is None else None
    optimizer = RuleOptimizer(params, rule, process_group=group)
    for param in params:
        param.grad = placed(layout)("large", torch.randn(256, 256))
    with count_bytes() as traffic:
        optimizer.step()
    return dict(traffic.sent), dict(traffic.received)


def test_bytes_under_ddp_match_one_bit_per_entry_a_sixteenth_of_muon(ranks4):
    others = 6 * 256 * 256  # entries of the matrices that the three other ranks own
    for (_, olion), (_, muon), (_, adamw) in zip(
        *(ranks4(eight_matrices, rule, "replicated on 4") for rule in ("olion", "muon", "adamw")), strict=True
    ):
        assert 1 <= 8 * sum(olion.values()) / others <= 1.02
        assert 8 * sum(muon.values()) / others == 16
        assert not adamw


# Of each of 8 matrices a rank holds e = 2^14 entries on 4 shards, 2^15 on 2. To owners: float32, 4 bytes.
SHARD = 2**14
BYTES = {
    # Two of the 8 are mine: to and from three ranks.
    "rows": {"to owners": (6 * 4 * SHARD, 2 * 3 * 4 * SHARD), "bits": (2 * 3 * SHARD, 6 * SHARD)},
    # My row of two ranks owns 4 of the 8, 2 of them mine; then its messages to me go on to the rank below.
    "hsdp": {
        "to owners": (2 * 4 * 2 * SHARD, 2 * 4 * 2 * SHARD),
        "bits": (2 * 2 * SHARD + 4 * 2 * SHARD, 2 * 2 * SHARD + 4 * 2 * SHARD),
    },
}


@pytest.mark.parametrize("layout", BYTES)
def test_bytes_of_shards_match_arithmetic(ranks4, layout):
    inward, entries = BYTES[layout]["to owners"], BYTES[layout]["bits"]
    for sent, received in ranks4(eight_matrices, "muon", layout):
        assert (sent["to owners"], received["to owners"]) == inward
        assert (sent["directions"], received["directions"]) == tuple(2 * count for count in entries)
    for sent, received in ranks4(eight_matrices, "olion", layout):
        assert (sent["to owners"], received["to owners"]) == inward
        for got, count in zip((sent["directions"], received["directions"]), entries, strict=True):
            assert count / 8 <= got <= 1.02 * count / 8


def rounded_to_int8(shard: Tensor) -> Tensor:
    """Round a shard as a message to an owner does: each 256 entries in order to 127ths of their largest."""
    blocks = shard.view(-1, 256)
    scales = blocks.abs().amax(1, keepdim=True) / 127
    return torch.where(scales > 0, (blocks / scales).round() * scales, 0.0).view(shard.shape)


# Options under which the first average is the gradient, or half of it: rounding before or after is the same.
EXACT_AVERAGES = {
    "olion": {"betas": (0.0, 0.5)},
    "muon": {"momentum": 0.5, "nesterov": False},
    "normuon": {"betas": (0.0, 0.5)},
}


def compared_in_int8(rule: str, layout: str) -> tuple[Held, Held]:
    """A first step with shards sent in int8, and one of unrounded shards whose gradients were rounded before it."""
    is_member(layout)
    options = exact(rule) | EXACT_AVERAGES[rule]
    coded, before = (
        Job(rule, layout, ("large",), to_owner_dtype="int8", **options),
        Job(rule, layout, ("large",), **options),
    )
    coded.step(0)
    (param,) = before.params.values()
    param.grad = placed_gradient(layout, "large", 0).clone()
    param.grad.to_local().copy_(rounded_to_int8(param.grad.to_local()))
    before.optimizer.step()
    return tuple({"large": job.tensors()["large"]} for job in (coded, before))


@pytest.mark.parametrize("layout", ["rows", "columns", "hsdp", "fsdp x tp"])
@pytest.mark.parametrize("rule", EXACT_AVERAGES)
def test_shards_sent_in_int8_match_gradients_rounded_before(ranks4, rule, layout):
    results = ranks4(compared_in_int8, rule, layout)
    assert_replicas_equal(results)
    assert differing(results, 0.0) == 0


def to_owners_bytes(dtype: str | None) -> int:
    is_member("rows")
    job = Job("olion", "rows", ("large",), to_owner_dtype=dtype, **exact("olion"))
    return job.optimizer.plan.traffic(1).sent["to owners"]


def test_int8_shards_send_a_quarter_of_float32s_bytes(ranks4):
    is_8_bits = ranks4(to_owners_bytes, "int8")
    for coded, plain in zip(is_8_bits, ranks4(to_owners_bytes, None), strict=True):
        assert 1 / 4 < coded / plain <= (1 + 4 / 256) / 4


# --- State, gradients, parts of a step


def facts(layout: str) -> dict[str, tuple] | None:
    """Take two steps of each rule; return the properties of state and gradients."""
    if not is_member(layout):
        return None
    found = {}
    for rule in RULES_ON[layout]:
        job = Job(rule, layout)
        job.step(0)
        before = {
            name: (param.grad, local_of(param.grad)) for name, param in job.params.items() if param.grad is not None
        }
        job.optimizer.step()
        kept = all(
            job.params[name].grad is grad and local_of(grad).equal(copy) for name, (grad, copy) in before.items()
        )
        alike, held, states, rows = True, 0, 0, 0
        for param in job.params.values():
            for key, buffer in job.optimizer.state[param].items():
                if key != "step" and not key.startswith("row_"):
                    alike &= type(buffer) is type(param.data) and buffer.shape == param.shape
                    if isinstance(param, DTensor):
                        alike &= buffer.device_mesh == param.device_mesh and buffer.placements == param.placements
                mine = buffer.to_local() if isinstance(buffer, DTensor) else buffer
                states += mine.untyped_storage().nbytes()
                rows += mine.untyped_storage().nbytes() if key.startswith("row_") else 0
                alike &= not key.startswith("row_") or mine.shape[0] in (local_of(param).shape[0], 1)
            held += local_of(param).numel()
        found[rule] = kept, alike, held, states - rows, job.optimizer.state_size() - rows
    return found


@every_layout
def test_state_has_the_parameters_layout_and_the_bytes_of_their_shards(ranks4, layout):
    for found in members(ranks4(facts, layout), layout):
        for rule, (kept, alike, held, states, reported) in found.items():
            buffers = BUFFERS.get(rule, 1)
            assert kept and alike
            assert states == reported == 4 * (buffers * held + (len(SHAPES) if rule == "adamw" else 0))


def compared_partial(rule: str) -> tuple[Held, Held]:
    """Gradients that tensor parallelism left to be summed over the replicas, against gradients already summed."""
    is_member("hsdp")
    partial, plain = Job(rule, "hsdp", DENSE, **exact(rule)), Job(rule, "hsdp", DENSE, **exact(rule))
    plain.step(0)
    for name, param in partial.params.items():
        half = plain.params[name].grad.to_local() / 2  # exact
        param.grad = DTensor.from_local(
            half, param.device_mesh, [Partial(), Shard(0)], run_check=False, shape=param.shape, stride=param.stride()
        )
    partial.optimizer.step()
    return partial.tensors(), plain.tensors()


@pytest.mark.parametrize("rule", ["olion", "lion", "adamw"])
def test_partial_gradients_match_reduced_ones(ranks4, rule):
    assert differing(ranks4(compared_partial, rule), 0.0) == 0


def compared_without_gradients(rule: str) -> tuple[Held, Held]:
    """A step without any gradient changes nothing."""
    is_member("hsdp")
    job = train(rule, "hsdp", exact(rule), DENSE, steps=2)
    before = job.tensors()
    job.optimizer.zero_grad()
    job.optimizer.step()
    return job.tensors(), before


@every_rule
def test_a_step_without_gradients_on_any_rank_leaves_all_as_it_is(ranks4, rule):
    assert differing(ranks4(compared_without_gradients, rule), 0.0) == 0


def compared_without_a_gradient_here(rule: str) -> tuple[Held, Held]:
    """Rank 1 has no gradient of its rows: the others go on as if it were zero, and rank 1's rows stay."""
    is_member("rows")
    names, held_by_1 = ("twin", "large"), {"twin": slice(4, 8), "large": slice(32, 64)}
    job, alone = Job(rule, "rows", names, **exact(rule)), Job(rule, None, names, **exact(rule))
    untouched = job.tensors()
    for name in names:
        grad = gradient(name, 0)
        job.params[name].grad = job.place(name, grad) if dist.get_rank() != 1 else None
        alone.params[name].grad = grad.index_fill(0, torch.arange(SHAPES[name][0])[held_by_1[name]], 0.0)
    job.optimizer.step()
    alone.optimizer.step()
    return job.tensors(), untouched if dist.get_rank() == 1 else job.cut(alone.tensors())


@pytest.mark.parametrize("rule", ["olion", "muon"])
def test_a_gradient_missing_on_one_rank_matches_zeros_there_and_hangs_no_one(ranks4, rule):
    assert differing(ranks4(compared_without_a_gradient_here, rule), 1e-6) == 0


# --- The plan


def planned(layout: str) -> tuple[str, dict[str, str]] | None:
    if not is_member(layout):
        return None
    plan = Job("olion", layout).optimizer.plan
    return str(plan), {entry.name: entry.route for entry in plan.entries}


@every_layout
def test_plan_names_every_parameter_and_its_route(ranks4, layout):
    for printed, routes in members(ranks4(planned, layout), layout):
        assert routes["square"] == LAYOUTS[layout].route
        lines = printed.splitlines()
        for name, shape in SHAPES.items():
            assert any(line.startswith(name) and "x".join(map(str, shape)) in line for line in lines), name


def owners(shapes: dict[str, tuple]) -> tuple[dict[str, int], float, str]:
    """Plan matrices without tensors: owner by name, the plan's own balance, and its print."""
    params = [(name, nn.Parameter(torch.empty(shape, device="meta"))) for name, shape in shapes.items()]
    plan = RuleOptimizer(params, "olion", process_group=dist.group.WORLD).plan
    return {entry.name: entry.owner for entry in plan.entries}, plan.balance(), str(plan)


GPT2_SMALL = {
    f"blocks.{block}.{name}": shape
    for name, shape in {"qkv": (2304, 768), "out": (768, 768), "up": (3072, 768), "down": (768, 3072)}.items()
    for block in range(12)
}
# Three that cost eight times one of the others: 27 matrices cannot be shared evenly by number, but by cost.
UNLIKE = {f"matrix {i}": (1024, 1024) if i < 3 else (512, 512) for i in range(27)}


@pytest.mark.parametrize("shapes", [GPT2_SMALL, UNLIKE], ids=["GPT-2 small", "unlike matrices"])
def test_owners_match_in_operations(ranks4, shapes):
    (owner_of, balance, printed), *others = ranks4(owners, shapes)
    assert all(there == owner_of for there, *_ in others)
    loads = [0.0] * 4
    for name, owner in owner_of.items():
        loads[owner] += flops(*shapes[name], device="meta")
    assert max(loads) / (sum(loads) / 4) == pytest.approx(balance) and balance < 1.05
    assert len(owner_of) == len(shapes) and all(name in printed for name in owner_of)


# --- Refusals


def zeros(*shape, dtype=torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype))


def shards(layout: str, *shape) -> nn.Parameter:
    placements = LAYOUTS[layout].placements[0]
    return nn.Parameter(distribute_tensor(torch.zeros(shape), mesh_of(layout), placements, src_data_rank=None))


def from_local(mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    return nn.Parameter(DTensor.from_local(torch.zeros(4, 6), mesh, [placement], run_check=False))


def on(rank: int, special, usual):
    return special if dist.get_rank() == rank else usual


EVERYONE, OUTSIDE = (0, 1, 2, 3), (0, 2)  # of a layout on 1 and 3
DISAGREE = "all ranks must hand the optimizer the same parameters .* rank 0 has .*, rank 1 has "
# The job, the ranks that must refuse it, and their message.
REFUSED = {
    "a group of others": (
        lambda: OLion([zeros(4, 6)], process_group=group_of("replicated on 1 and 3")),
        OUTSIDE,
        "process_group .* that this rank .* is in",
    ),
    "a mesh of others": (
        lambda: OLion([("up", shards("rows on 1 and 3", 4, 6))]),
        OUTSIDE,
        "^up: .*must be in .*[Mm]esh",
    ),
    "a mesh without groups": (
        lambda: OLion([("up", from_local(DeviceMesh("cpu", [0, 1, 2, 3], _init_backend=False), Shard(0)))]),
        EVERYONE,
        "^up: .*[Mm]esh.*init_device_mesh",
    ),
    "a mesh in no order": (
        lambda: OLion([("up", from_local(DeviceMesh("cpu", [0, 2, 1, 3]), Shard(0)))]),
        EVERYONE,
        "^up: .*mesh must number its ranks upwards",
    ),
    "a partial parameter": (
        lambda: OLion([("up", from_local(mesh_of("rows"), Partial()))]),
        EVERYONE,
        "^up: .*Partial.*redistribute",
    ),
    "another shape": (
        lambda: OLion([zeros(4, 6), on(1, zeros(6, 4), zeros(4, 6))], process_group=dist.group.WORLD),
        EVERYONE,
        DISAGREE + ".*(6, 4)",
    ),
    "another dtype": (
        lambda: OLion([on(1, zeros(4, 6, dtype=torch.bfloat16), zeros(4, 6))], process_group=dist.group.WORLD),
        EVERYONE,
        DISAGREE,
    ),
    "fewer parameters": (
        lambda: OLion([zeros(4, 6) for _ in range(on(1, 1, 2))], process_group=dist.group.WORLD),
        EVERYONE,
        DISAGREE,
    ),
    "another order": (
        lambda: OLion([(name, zeros(4, 6)) for name in on(1, "ba", "ab")], process_group=dist.group.WORLD),
        EVERYONE,
        DISAGREE,
    ),
    "another rule": (
        lambda: RuleOptimizer([zeros(4, 6)], on(1, "muon", "olion"), process_group=dist.group.WORLD),
        EVERYONE,
        DISAGREE,
    ),
    "another split": (
        lambda: OLion([zeros(12, 6)], qkv_split=on(1, 3, 1), process_group=dist.group.WORLD),
        EVERYONE,
        DISAGREE,
    ),
    "another precision on the way": (
        lambda: OLion([zeros(4, 6)], wire_dtype=on(1, torch.float32, None), process_group=dist.group.WORLD),
        EVERYONE,
        DISAGREE,
    ),
    "no matrices on one rank": (
        lambda: RuleOptimizer([zeros(4, 6)], on(1, "lion", "olion"), process_group=dist.group.WORLD),
        EVERYONE,
        DISAGREE,
    ),
    "fewer shards": (lambda: OLion([shards("rows", 4, 6) for _ in range(on(1, 1, 2))]), EVERYONE, DISAGREE),
    "fewer shards in one replica": (
        lambda: OLion([shards("hsdp", 4, 6) for _ in range(on(3, 1, 2))]),
        EVERYONE,
        "all ranks must hand the optimizer the same parameters",
    ),
    "fewer parameters on two axes": (
        lambda: OLion([shards("fsdp x tp", 4, 6) for _ in range(on(3, 1, 2))]),
        EVERYONE,
        "all ranks must hand the optimizer the same parameters",
    ),
}


def refusal(case: str) -> str | None:
    group_of("replicated on 1 and 3")
    for layout in ("rows", "hsdp", "fsdp x tp", "rows on 1 and 3"):
        mesh_of(layout)
    try:
        REFUSED[case][0]()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("case", REFUSED)
def test_build_refuses_in_one_line_on_the_ranks_concerned(ranks4, case):
    _, ranks, words = REFUSED[case]
    errors = ranks4(refusal, case)
    assert tuple(rank for rank, error in enumerate(errors) if error) == ranks
    for error in filter(None, errors):
        assert re.search(words, error) and "\n" not in error


def test_build_refuses_a_process_group_without_torch_distributed():
    with pytest.raises(ValueError, match="init_process_group") as caught:
        OLion([zeros(4, 6)], process_group="gloo")
    assert "\n" not in str(caught.value)
