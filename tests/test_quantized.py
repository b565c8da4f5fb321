"""Averages in int8, and the rounding of bfloat16 weights: against float64, float32 and one process."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from optimizers import RULES, RuleOptimizer, count_bytes, probe
from optimizers.quantized import decoded, encode, peaks_of
from optimizers.rounding import joined, uniform

# The option that holds the decay of the average, and the average's name.
DECAYS = {"olion": 0.98, "lion": 0.99, "lionmuon": 0.99, "adamw": 0.9, "signum": 0.9, "polarsgdm": 0.9}
every_rule = pytest.mark.parametrize("rule", RULES)
in_int8 = pytest.mark.parametrize("dtype", ["int8", "int8_stochastic"])


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(rule: str, start: Tensor, **options) -> tuple[nn.Parameter, RuleOptimizer]:
    param = nn.Parameter(start.clone())
    return param, RuleOptimizer([("w", param)], rule, **options)


def train(param: nn.Parameter, optimizer: RuleOptimizer, steps: range) -> None:
    for step in steps:
        param.grad = drawn(step, *param.shape).to(param.dtype)
        optimizer.step()


def momentum_of(optimizer: RuleOptimizer, param: nn.Parameter) -> tuple[Tensor, Tensor]:
    state = optimizer.state[param]
    name = "exp_avg" if "exp_avg" in state else "momentum"
    return decoded(state[name], state[f"{name}_scale"], torch.float64), state[f"{name}_scale"].double()


# --- int8


def test_codes_match_values_to_half_a_step_or_a_step_at_random():
    values = drawn(0, 6, 500) * torch.logspace(-20, 20, 6)[:, None]
    values[2] = 0
    values[4, 7] = torch.nan
    codes, scales = torch.empty(6, 500, dtype=torch.int8), torch.empty(6, 1)
    for numbers, steps in ((None, 0.5), (uniform(values, "key"), 1.0)):
        encode(codes, scales, values, peaks_of(values, 1), numbers)
        got = decoded(codes, scales, torch.float32).double()
        assert got[4].isnan().all() and got[2].eq(0).all()
        # 1e-5 of a step: float32's rounding of a quotient of at most 127.
        error = (got - values.double()).abs() / scales.double()
        assert error[[0, 1, 3, 5]].max() <= steps + 1e-5


def test_rounding_at_random_matches_the_value_on_average():
    values = torch.full((1, 4000), 0.3)
    values[0, 0] = 127.0  # so that a step is 1
    codes, scales = torch.empty(1, 4000, dtype=torch.int8), torch.empty(1, 1)
    encode(codes, scales, values, peaks_of(values, 1), uniform(values, "key"))
    # Five standard deviations of the mean of 4,000 zeros and ones.
    assert abs(codes[0, 1:].double().mean().item() - 0.3) < 5 * (0.3 * 0.7 / 4000) ** 0.5
    assert not torch.equal(uniform(values, "key"), uniform(values, "another"))


@in_int8
@every_rule
def test_averages_in_int8_match_float64_within_the_steps_of_their_rows(rule, dtype):
    # The average of polar factors instead of gradients is another test's.
    param, optimizer = build(rule, drawn(99, 12, 20), lr=0.0, state_dtype=dtype)
    keep, expected, bound = DECAYS.get(rule, 0.95), torch.zeros(12, 20, dtype=torch.float64), 0.0
    for step in range(8):
        train(param, optimizer, range(step, step + 1))
        expected = keep * expected + (1 - keep) * drawn(step, 12, 20).double()
        got, scales = momentum_of(optimizer, param)
        # Each rounding errs by half a step, or by one; earlier errors decay as the average does.
        bound = keep * bound + (0.5 if dtype == "int8" else 1.0) * scales
        assert ((got - expected).abs() <= 1.001 * bound + 1e-6).all()


@every_rule
def test_first_step_in_int8_matches_the_first_in_float32(rule):
    params = []
    for dtype in (None, "int8"):
        param, optimizer = build(rule, drawn(99, 12, 20), lr=0.01, state_dtype=dtype)
        train(param, optimizer, range(1))
        params.append(param.detach())
    assert torch.equal(*params)  # what is rounded is read at the next step


def test_polar_factors_are_averaged_in_int8():
    kept = []
    for dtype in (None, "int8"):
        param, optimizer = build("polargrad", drawn(99, 12, 20), lr=0.0, order="polar_first", state_dtype=dtype)
        train(param, optimizer, range(5))
        kept.append(optimizer.state[param]["momentum"].double() if dtype is None else momentum_of(optimizer, param)[0])
    scales = momentum_of(optimizer, param)[1]
    assert ((kept[0] - kept[1]).abs() <= 5 * 0.5 * 1.3 * scales).all()  # rows grow: earlier steps are no longer ones


@every_rule
def test_bytes_of_state_in_int8_match_arithmetic(rule):
    _, optimizer = build(rule, torch.zeros(64, 96), state_dtype="int8")
    squares = 4 * 64 * 96 if rule in ("adamuon", "adamw") else 0
    others = {"normuon": 4 * 64, "adamw": 4}.get(rule, 0)  # a number per row, a count of steps
    assert optimizer.state_size() == 64 * 96 + 4 * 64 + squares + others


def test_vectors_and_squares_stay_in_float32():
    vector, optimizer = build("lion", torch.zeros(9, dtype=torch.bfloat16), state_dtype="int8")
    assert {buffer.dtype for buffer in optimizer.state[vector].values()} == {torch.float32}
    matrix, optimizer = build("adamw", torch.zeros(9, 4, dtype=torch.bfloat16), state_dtype="int8")
    train(matrix, optimizer, range(2))
    assert optimizer.state[matrix]["exp_avg"].dtype == torch.int8
    assert optimizer.state[matrix]["exp_avg_sq"].dtype == torch.float32


def test_a_probe_in_int8_matches_one_of_the_decoded_average():
    found = []
    for dtype in ("int8", None):
        param, optimizer = build("muon", drawn(99, 12, 20), state_dtype="int8")
        train(param, optimizer, range(3))
        if dtype is None:
            average, (param, optimizer) = momentum_of(optimizer, param)[0], build("muon", param.detach())
            optimizer.state[param]["momentum"].copy_(average)
        param.grad = drawn(3, 12, 20)
        found.append({key: value for key, value in probe(optimizer).items() if key != "probe/ms"})
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"state_dtype": "int4"}, "state_dtype must be"),
        ({"weight_rounding": "up"}, "weight_rounding must be"),
        ({"weight_rounding": "stochastic"}, "needs bfloat16 weights"),
    ],
)
def test_build_refuses_what_cannot_be_in_one_line(options, said):
    with pytest.raises(ValueError, match=said) as caught:
        build("olion", torch.zeros(6, 4), **options)
    assert "\n" not in str(caught.value)


def test_a_state_in_float32_is_refused_where_int8_is_kept():
    _, optimizer = build("olion", torch.zeros(6, 4), state_dtype="int8")
    with pytest.raises(ValueError, match="momentum_scale") as caught:
        optimizer.load_state_dict(build("olion", torch.zeros(6, 4))[1].state_dict())
    assert "\n" not in str(caught.value)


# --- the rounding of weights


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("rule", ["lion", "adamw"])
def test_decay_of_bfloat16_matches_float64_unless_rounded_to_the_nearest(rule, rounding):
    """400 steps of decay by 3e-4 leave 0.887 of the norm; to the nearest, all of it, and torch's AdamW does so too."""
    start = drawn(0, 64, 64).bfloat16()
    options = {"lr": 3e-3, "weight_decay": 0.1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        param, optimizer = build(rule, start, weight_rounding=rounding, **options)
        fp64, others = (build("lion", start.to(dtype), **options) for dtype in (torch.float64, torch.float32))
    assert [str(each.message)[:33] for each in caught] == ["bfloat16 weights do not decay: lr"] * (
        rounding == "nearest"
    )
    for each, stepped in ((param, optimizer), fp64, others):
        each.grad = torch.zeros_like(each)
        for _ in range(400):
            stepped.step()
    expected = fp64[0].detach()
    assert expected.norm() / start.double().norm() == pytest.approx(0.9997**400, rel=1e-12)
    norm = param.detach().double().norm() / start.double().norm()
    if rounding == "nearest":
        assert torch.equal(param, start)
        twin = nn.Parameter(start.clone())
        theirs = torch.optim.AdamW([twin], **options)
        twin.grad = torch.zeros_like(twin)
        for _ in range(400):
            theirs.step()
        assert torch.equal(twin, start)
    elif rounding == "compensated":  # half a unit in the last place, and 400 roundings in float32
        torch.testing.assert_close(param.detach().double(), expected, rtol=2.0**-8 + 400 * 2.0**-24, atol=0)
        assert norm == pytest.approx(0.9997**400, rel=1e-3)
    else:
        # A step has a variance of at most p (1 - p) units of 2^-7 squared, p = 3e-4 / 2^-8 at most: 0.045 of an entry
        # after 400 steps, and 1/64 of that of the norm of 4,096 entries. Five standard deviations.
        assert norm == pytest.approx(0.9997**400, abs=5 * 0.045 / 64)


@pytest.mark.parametrize("rule", ["lion", "olion", "adamw", "adamuon"])
def test_compensated_weights_match_float32_bit_for_bit(rule):
    start, options = drawn(7, 12, 20).bfloat16(), {"lr": 1e-3, "weight_decay": 0.1}
    if rule != "adamw":  # AdamW has no dtype of state but the weights'
        options["state_dtype"] = torch.float32
    else:
        options["state_dtype"] = "int8"
    param, optimizer = build(rule, start, weight_rounding="compensated", **options)
    wide, others = build(rule, start.float(), **options)
    for step in range(20):
        param.grad = drawn(step, 12, 20).bfloat16()
        wide.grad = param.grad.float()
        optimizer.step()
        others.step()
    assert torch.equal(joined(param.detach(), optimizer.state[param]["weight_remainder"]), wide)
    torch.testing.assert_close(param.detach().float(), wide.detach(), rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_a_resumed_run_matches_an_uninterrupted_one_bit_for_bit(rounding):
    options = {"lr": 1e-3, "weight_rounding": rounding, "state_dtype": "int8_stochastic"}
    param, optimizer = build("olion", drawn(7, 12, 20).bfloat16(), **options)
    train(param, optimizer, range(4))
    twin, resumed = build("olion", param.detach(), **options)
    resumed.load_state_dict(optimizer.state_dict())
    for each in ((param, optimizer), (twin, resumed)):
        train(*each, range(4, 8))
    assert torch.equal(param, twin)
    assert all(torch.equal(optimizer.state[param][key], value) for key, value in resumed.state[twin].items())


def test_the_rest_of_a_group_inherits_the_rounding_of_weights():
    params = [nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "rule": "adamw"}]
    optimizer = RuleOptimizer(groups, "olion", weight_rounding="stochastic")
    assert [group["weight_rounding"] for group in optimizer.param_groups] == ["stochastic"] * 2


# --- layouts, on gloo ranks

SHAPES = {"uneven": (18, 10), "few": (3, 12), "small": (7, 5)}  # on 4 ranks "few" leaves an empty shard
PLACEMENTS = {
    "rows": [Shard(0)],
    "columns": [Shard(1)],
    "both": [Shard(0), Shard(1)],
    "both, columns first": [Shard(1), Shard(0)],
    "hsdp": [Replicate(), Shard(0)],
    "hsdp of columns": [Shard(1), Replicate()],
    "fsdp x tp": [_StridedShard(0, split_factor=2), Shard(0)],
    "ddp": None,
    "alone": None,
}
OPTIONS = {"lr": 1e-3, "weight_decay": 0.1, "weight_rounding": "stochastic", "state_dtype": "int8_stochastic"}
RESHARD = [("rows", "columns"), ("columns", "ddp"), ("ddp", "fsdp x tp"), ("fsdp x tp", "both"), ("both", "rows")]


class Tensors(nn.Module):
    """Parameters of one layout, trained by one rule."""

    def __init__(self, layout: str, rule: str):
        super().__init__()
        placements = PLACEMENTS[layout]
        mesh = placements and _mesh(len(placements))
        self.place = lambda whole: distribute_tensor(whole, mesh, placements, src_data_rank=None) if mesh else whole
        starts = {name: drawn(i, *shape).bfloat16() for i, (name, shape) in enumerate(SHAPES.items())}
        self.held = nn.ParameterDict({name: self.place(start) for name, start in starts.items()})
        group = dist.group.WORLD if layout == "ddp" else None
        wide = {"ns_dtype": torch.float32} if RULES[rule].direct else {}
        self.optimizer = RuleOptimizer(self.named_parameters(), rule, process_group=group, **OPTIONS, **wide)

    def train(self, steps: int) -> None:  # type: ignore[override]
        for step in range(steps):
            for i, param in enumerate(self.parameters()):
                param.grad = self.place(drawn(10 * step + i, *param.shape).bfloat16())
            self.optimizer.step()

    def wholes(self) -> dict[str, Tensor]:
        found = {}
        for name, param in self.named_parameters():
            for key, tensor in {"": param.detach(), **self.optimizer.state[param]}.items():
                found[name, key] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
        return found


_meshes: dict[int, DeviceMesh] = {}


def _mesh(axes: int) -> DeviceMesh:
    if axes not in _meshes:
        _meshes[axes] = DeviceMesh("cpu", torch.arange(4).view([4] if axes == 1 else [2, 2]))
    return _meshes[axes]


def on_every_layout(rule: str, folder: Path) -> None:
    """Assert that codes, scales and weights match one process, that bytes match the plan, and checkpoints load."""
    alone = Tensors("alone", rule)
    alone.train(3)
    expected = alone.wholes()
    trained: dict[str, Tensors] = {}
    for layout in PLACEMENTS:
        trained[layout] = model = Tensors(layout, rule)
        with count_bytes() as traffic:
            model.train(3)
        plan = model.optimizer.plan.traffic()
        assert traffic.received["scales"] == 3 * plan.received["scales"], layout
        assert bool(plan.received["scales"]) == (
            layout in ("columns", "both", "both, columns first", "hsdp of columns")
        )
        for (name, key), tensor in model.wholes().items():
            # Signs next to 0 may turn where products are cut otherwise; averages are of gradients alone.
            if key or rule == "lion":
                assert torch.equal(tensor, expected[name, key]), (layout, name, key)
    for source, target in RESHARD:
        path = folder / f"{rule} {source}"
        dcp.save(get_optimizer_state_dict(trained[source], trained[source].optimizer), checkpoint_id=path)
        other = Tensors(target, rule)
        state = get_optimizer_state_dict(other, other.optimizer)
        dcp.load(state, checkpoint_id=path)
        set_optimizer_state_dict(other, other.optimizer, state)
        assert other.optimizer.param_groups[0]["steps"] == 3
        for (name, key), tensor in other.wholes().items():
            assert not key or torch.equal(tensor, expected[name, key]), (source, target, name, key)


@pytest.mark.slow
def test_codes_scales_and_rounded_weights_do_not_depend_on_the_layout(tmp_path):
    with Ranks(4) as ranks:
        for rule in ("lion", "olion"):
            ranks(on_every_layout, rule, tmp_path)
