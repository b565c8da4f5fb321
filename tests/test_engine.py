"""The optimizer class that runs every rule: state, groups, options, and torch's own tools."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from optimizers import RULES as REGISTERED
from optimizers import (
    AdaMuon,
    AdamW,
    Lion,
    LionMuon,
    Muon,
    OLion,
    RuleOptimizer,
    UpdateRule,
    build_optimizer,
    count_bytes,
    register,
    wire,
)

RULES = {"olion": OLion, "muon": Muon, "adamuon": AdaMuon, "lion": Lion, "adamw": AdamW}
MATRIX_RULES = {name: RULES[name] for name in ("olion", "muon", "adamuon")}
BUFFERS = {
    "olion": {"momentum"},
    "muon": {"momentum"},
    "adamuon": {"momentum", "second_moment"},
    "lion": {"momentum"},
    "adamw": {"exp_avg", "exp_avg_sq", "step"},
}
every_rule = pytest.mark.parametrize("name", RULES)
every_matrix_rule = pytest.mark.parametrize("name", MATRIX_RULES)


def matrices(*shapes, dtype=torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def set_gradients(parameters, seed: int) -> None:
    """Give the parameters gradients that depend on the seed and on their order and shapes alone."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def train(optimizer, parameters, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        set_gradients(parameters, step)
        optimizer.step()


def values(parameters) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def clones(parameters) -> list[nn.Parameter]:
    return [nn.Parameter(parameter.detach().clone()) for parameter in parameters]


def assert_all_equal(left: list[Tensor], right: list[Tensor]) -> None:
    """Equal bit for bit."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def assert_one_line(caught) -> None:
    assert "\n" not in str(caught.value)


# --- State


@every_rule
def test_state_made_at_build_matches_the_parameters_layout(name):
    plain, transposed = torch.randn(6, 4), torch.randn(4, 6).T  # (6, 4) both, of other strides
    parameters = [nn.Parameter(plain), nn.Parameter(transposed)]
    optimizer = RULES[name](parameters)
    for parameter in parameters:
        state = optimizer.state[parameter]
        assert set(state) == BUFFERS[name]
        for key in set(state) - {"step"}:
            buffer = state[key]
            assert (buffer.shape, buffer.dtype, buffer.device) == (
                parameter.shape,
                parameter.dtype,
                parameter.device,
            )
            assert buffer.stride() == parameter.stride()
            assert not buffer.any()


@every_rule
def test_state_keys_match_before_and_after_a_step(name):
    parameters = matrices((6, 4))
    optimizer = RULES[name](parameters)
    before = set(optimizer.state[parameters[0]])
    train(optimizer, parameters, 2)
    assert set(optimizer.state[parameters[0]]) == before


@every_rule
def test_state_of_a_group_added_later_matches_the_first_groups(name):
    first, second = matrices((6, 4), (4, 6))
    optimizer = RULES[name]([first])
    optimizer.add_param_group({"params": [second], "lr": 0.5})
    assert set(optimizer.state[second]) == BUFFERS[name]
    assert optimizer.param_groups[1]["lr"] == 0.5
    before = values([second])
    train(optimizer, [first, second], 1)
    assert not torch.equal(before[0], second)


@every_rule
def test_step_leaves_gradients_and_aliases_nothing(name):
    """After a step no two of parameters, gradients and state share memory, and no gradient has changed."""
    parameters = matrices((6, 4), (6, 4), (4, 6))
    optimizer = RULES[name](parameters)
    for step in range(2):
        set_gradients(parameters, step)
        expected = [parameter.grad.clone() for parameter in parameters]
        addresses = [parameter.grad.data_ptr() for parameter in parameters]
        assert optimizer.step() is None
        assert_all_equal([parameter.grad for parameter in parameters], expected)
        assert [parameter.grad.data_ptr() for parameter in parameters] == addresses
    tensors = [*parameters, *(parameter.grad for parameter in parameters)]
    tensors += [buffer for parameter in parameters for buffer in optimizer.state[parameter].values()]
    for one, other in itertools.combinations([t for t in tensors if isinstance(t, Tensor)], 2):
        assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


@every_rule
def test_parameters_frozen_or_without_a_gradient_stay_as_they_are(name):
    moving, frozen, idle = matrices((6, 4), (6, 4), (6, 4))
    frozen.requires_grad_(False)
    optimizer = RULES[name]([moving, frozen, idle], lr=0.1, weight_decay=0.5)
    before = values([moving, frozen, idle])
    idle_state = copy.deepcopy(optimizer.state[idle])
    train(optimizer, [moving], 2)
    assert_all_equal(values([frozen, idle]), before[1:])
    assert not torch.equal(moving, before[0])
    for key, value in optimizer.state[idle].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(idle_state[key]))


@every_rule
def test_a_parameter_whose_gradient_comes_and_goes_matches_one_stepped_alone(name):
    alone, other = matrices((6, 4), (6, 4))
    (twin,) = clones([alone])
    together, single = RULES[name]([alone, other]), RULES[name]([twin])
    for step in range(4):
        set_gradients([alone], step)
        set_gradients([other], step + 100)
        set_gradients([twin], step)
        if step == 1:
            alone.grad = None
            other.grad = None
            twin.grad = None
        if step == 2:
            other.grad = None
        together.step()
        single.step()
    torch.testing.assert_close(alone, twin, rtol=0, atol=1e-6)  # batched and single products may round apart


@pytest.mark.parametrize("name", ["olion", "muon", "adamuon", "lion"])
def test_state_dtype_is_kept_through_steps_and_a_state_dict_round_trip(name):
    parameters = matrices((6, 4))
    twins = clones(parameters)
    optimizer, resumed = (RULES[name](each, state_dtype=torch.bfloat16) for each in (parameters, twins))
    train(optimizer, parameters, 3)
    assert optimizer.state[parameters[0]]["momentum"].dtype == torch.bfloat16
    assert parameters[0].dtype == torch.float32
    resumed.load_state_dict(optimizer.state_dict())
    loaded = resumed.state[twins[0]]["momentum"]
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded, optimizer.state[parameters[0]]["momentum"])


@pytest.mark.parametrize("name", ["olion", "muon", "lion"])
def test_momentum_in_bfloat16_matches_float32_to_its_rounding(name):
    parameters = matrices((16, 12))
    twins = clones(parameters)
    train(RULES[name](parameters, lr=0.01, weight_decay=0.0), parameters, 1)
    optimizer = RULES[name](twins, lr=0.01, weight_decay=0.0, state_dtype=torch.bfloat16)
    train(optimizer, twins, 1)
    update, expected = (torch.cat([p.detach().flatten() for p in each]) for each in (twins, parameters))
    # One step: the momentum rounds by 2^-9, so hardly a sign may differ.
    assert (update - expected).abs().gt(1e-3).double().mean() < 0.02


@pytest.mark.parametrize("name", ["olion", "muon", "adamuon", "lion"])
def test_state_wider_than_the_parameter_is_kept_through_a_state_dict_round_trip(name):
    parameters = matrices((6, 4), dtype=torch.bfloat16)
    twins = clones(parameters)
    optimizer, resumed = (RULES[name](each, state_dtype=torch.float32) for each in (parameters, twins))
    for buffer in optimizer.state[parameters[0]].values():
        buffer.normal_()  # bits that bf16 has not
    resumed.load_state_dict(optimizer.state_dict())
    for key, buffer in optimizer.state[parameters[0]].items():
        assert buffer.dtype == torch.float32
        assert torch.equal(resumed.state[twins[0]][key], buffer)


@pytest.mark.parametrize("name", ["olion", "muon", "lion"])
def test_state_wider_than_the_parameter_averages_in_its_own_precision(name):
    """In bf16 an average that keeps 0.99 stops moving 1 / 256 short; kept in float32 it must not."""
    parameters = matrices((6, 4), dtype=torch.bfloat16)
    optimizer = RULES[name](parameters, lr=0.0, state_dtype=torch.float32)
    group = optimizer.param_groups[0]
    keep = group["momentum"] if name == "muon" else group["betas"][1]
    expected = torch.zeros(6, 4)
    for step in range(20):
        set_gradients(parameters, step)
        expected = keep * expected + (1 - keep) * parameters[0].grad.float()
        optimizer.step()
    # 1e-5: float32's rounding of 20 averages of entries of about 1, far below bf16's 4e-3.
    torch.testing.assert_close(optimizer.state[parameters[0]]["momentum"], expected, rtol=1e-5, atol=1e-6)


@every_rule
def test_state_size_matches_the_bytes_of_the_buffers(name):
    optimizer = RULES[name](matrices((6, 4), (4, 6)))
    matrices_kept = {"adamuon": 2, "adamw": 2}.get(name, 1)
    steps_kept = 2 * 4 if name == "adamw" else 0  # one float32 count per parameter
    assert optimizer.state_size() == matrices_kept * 2 * 24 * 4 + steps_kept


# --- Groups


@every_matrix_rule
def test_groups_with_their_own_rule_match_separate_optimizers(name):
    weight, bias, table = matrices((6, 4), (6,), (10, 4))
    twins = clones([weight, bias, table])
    together = RULES[name](
        [
            {"params": [weight], "weight_decay": 0.1},
            {"params": [table, bias], "rule": "adamw", "lr": 0.03, "betas": (0.9, 0.95), "weight_decay": 0.0},
        ],
        lr=0.02,
    )
    separate = [
        RULES[name]([twins[0]], lr=0.02, weight_decay=0.1),
        AdamW([twins[2], twins[1]], lr=0.03, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    assert [group["rule"] for group in together.param_groups] == [name, "adamw"]
    for step in range(3):
        set_gradients([weight, bias, table], step)
        set_gradients(twins, step)
        together.step()
        for optimizer in separate:
            optimizer.step()
    assert_all_equal(values([weight, bias, table]), values(twins))


def test_a_group_of_another_rule_takes_that_rules_defaults():
    """The options of the class (lr apart) are its own rule's, and say nothing about another rule's group."""
    weight, bias = matrices((6, 4), (6,))
    optimizer = OLion([{"params": [weight]}, {"params": [bias], "rule": "adamw"}], lr=0.02)
    (twin,) = clones([bias])
    train(optimizer, [bias], 3)
    group = optimizer.param_groups[1]
    train(AdamW([twin], lr=group["lr"], weight_decay=group["weight_decay"]), [twin], 3)
    assert_all_equal(values([bias]), values([twin]))
    assert "ns_steps" not in group


@every_rule
def test_named_parameters_match_plain_ones(name):
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False))
    twin = copy.deepcopy(model)
    named, plain = RULES[name](model.named_parameters()), RULES[name](twin.parameters())
    assert named.param_groups[0]["param_names"] == ["0.weight", "1.weight"]
    train(named, list(model.parameters()), 3)
    train(plain, list(twin.parameters()), 3)
    assert_all_equal(values(model.parameters()), values(twin.parameters()))


@every_matrix_rule
@pytest.mark.parametrize("form", ["plain", "gram"])
def test_same_shape_matrices_in_one_batch_match_one_optimizer_each(name, form):
    shapes = [(6, 4), (4, 6), (6, 4), (6, 4), (5, 5), (4, 6)]
    parameters = matrices(*shapes, dtype=torch.float64)
    twins = clones(parameters)
    together = RULES[name](parameters, lr=0.1, ns_form=form)
    separate = [RULES[name]([twin], lr=0.1, ns_form=form) for twin in twins]
    for step in range(4):
        set_gradients(parameters, step)
        set_gradients(twins, step)
        together.step()
        for optimizer in separate:
            optimizer.step()
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, twin, rtol=0, atol=1e-11)  # batched products may round apart


def test_matrices_of_mixed_precision_match_one_optimizer_each():
    parameters = matrices((6, 4), (6, 4)) + matrices((6, 4), dtype=torch.float64)
    twins = clones(parameters)
    train(OLion(parameters, lr=0.1), parameters, 1)
    generator_order = OLion([{"params": [twin]} for twin in twins], lr=0.1)
    train(generator_order, twins, 1)
    for parameter, twin in zip(parameters, twins, strict=True):
        assert parameter.dtype == twin.dtype
        torch.testing.assert_close(parameter, twin, rtol=0, atol=1e-6)  # float32's rounding


# --- Tensors that are not one matrix


@pytest.mark.parametrize("qkv_dim", [0, 1])
@pytest.mark.parametrize(("qkv_split", "sizes"), [(3, (8, 8, 8)), ((4, 1, 1), (16, 4, 4)), ((1, 2, 3), (4, 8, 12))])
@every_matrix_rule
def test_qkv_split_matches_separate_matrices(name, qkv_split, sizes, qkv_dim):
    fused = matrices((24, 8) if qkv_dim == 0 else (8, 24), dtype=torch.float64)
    parts = [nn.Parameter(part.clone()) for part in fused[0].detach().split(sizes, dim=qkv_dim)]
    split = RULES[name](fused, lr=0.1, qkv_split=qkv_split, qkv_dim=qkv_dim)
    separate = RULES[name](parts, lr=0.1)
    for step in range(3):
        set_gradients(fused, step)
        for part, gradient in zip(parts, fused[0].grad.split(sizes, dim=qkv_dim), strict=True):
            part.grad = gradient.clone()
        split.step()
        separate.step()
    torch.testing.assert_close(fused[0].detach(), torch.cat(values(parts), qkv_dim), rtol=0, atol=1e-11)  # rounding


@every_matrix_rule
def test_as_matrices_batch_matches_one_matrix_each(name):
    batch = matrices((2, 3, 6, 4), dtype=torch.float64)
    parts = [nn.Parameter(part.clone()) for part in batch[0].detach().reshape(6, 6, 4)]
    batched, separate = RULES[name](batch, lr=0.1, as_matrices="batch"), RULES[name](parts, lr=0.1)
    for step in range(3):
        set_gradients(batch, step)
        for part, gradient in zip(parts, batch[0].grad.reshape(6, 6, 4), strict=True):
            part.grad = gradient.clone()
        batched.step()
        separate.step()
    result = torch.stack(values(parts)).reshape(2, 3, 6, 4)
    torch.testing.assert_close(batch[0].detach(), result, rtol=0, atol=1e-11)  # rounding


@every_matrix_rule
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_as_matrices_flatten_matches_the_flattened_matrix(name, memory_format):
    kernel = torch.randn(8, 3, 2, 2, dtype=torch.float64).contiguous(memory_format=memory_format)
    convolution, flat = nn.Parameter(kernel), nn.Parameter(kernel.reshape(8, 12).clone())
    flattened, plain = RULES[name]([convolution], lr=0.1, as_matrices="flatten"), RULES[name]([flat], lr=0.1)
    for step in range(3):
        set_gradients([flat], step)
        gradient = flat.grad.reshape(8, 3, 2, 2).contiguous(memory_format=memory_format)
        convolution.grad = gradient
        flattened.step()
        plain.step()
    torch.testing.assert_close(convolution.detach().reshape(8, 12), flat.detach(), rtol=0, atol=1e-11)  # rounding


@every_matrix_rule
def test_strides_of_parameter_and_gradient_do_not_matter(name):
    straight = matrices((6, 4), dtype=torch.float64)
    transposed = [nn.Parameter(straight[0].detach().T.clone().T)]  # column-major
    optimizers = RULES[name](straight, lr=0.1), RULES[name](transposed, lr=0.1)
    for step in range(3):
        set_gradients(straight, step)
        transposed[0].grad = straight[0].grad.clone()  # row-major, unlike its parameter
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(transposed[0], straight[0], rtol=0, atol=1e-11)  # rounding


# --- Refusals


@every_rule
@pytest.mark.parametrize(
    "options, named",
    [
        ({"lr": -1e-3}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ],
)
def test_build_refuses_a_negative_rate(name, options, named):
    with pytest.raises(ValueError, match=named) as caught:
        RULES[name](matrices((6, 4)), **options)
    assert_one_line(caught)


@pytest.mark.parametrize(
    "name, options, named",
    [
        ("olion", {"betas": (0.95, 1.0)}, "betas"),
        ("olion", {"betas": (-0.1, 0.98)}, "betas"),
        ("olion", {"ns_coefficients": "jordon"}, "'jordan'"),
        ("olion", {"ns_form": "grams"}, "'gram'"),
        ("olion", {"ns_steps": 0}, "ns_steps"),
        ("olion", {"eps": -1.0}, "eps"),
        ("olion", {"scale": -0.2}, "scale"),
        ("olion", {"as_matrices": "flat"}, "'flatten'"),
        ("olion", {"qkv_split": 0}, "qkv_split"),
        ("olion", {"qkv_split": 4}, "qkv_split=4 must divide the rows"),  # 6 rows are not 4 blocks
        ("olion", {"qkv_split": 3, "qkv_dim": 1}, "qkv_split=3 must divide the columns"),  # nor 4 columns 3
        ("muon", {"qkv_split": (32, 8, 8)}, "into 48 equal parts; use the number of heads"),
        ("muon", {"qkv_split": (6,)}, "two or more positive numbers"),
        ("muon", {"qkv_split": (7, -1)}, "two or more positive numbers"),
        ("adamuon", {"qkv_split": (1.0, 2)}, "qkv_split must be a whole number or a list"),
        ("olion", {"qkv_dim": 2}, "qkv_dim must be 0"),
        ("muon", {"momentum": 1.5}, "momentum"),
        ("muon", {"adjust_lr_fn": "match_rms_adam"}, "match_rms_adamw"),
        ("muon", {"ns_coefficients": (1.0, 2.0)}, "ns_coefficients"),
        ("adamuon", {"eps": -1e-8}, "eps"),
        ("lion", {"betas": (0.9, 1.1)}, "betas"),
        ("adamw", {"eps": -1e-8}, "eps"),
    ],
)
def test_build_refuses_a_bad_option_naming_it(name, options, named):
    with pytest.raises(ValueError, match=named) as caught:
        RULES[name](matrices((6, 4)), **options)
    assert_one_line(caught)


@every_rule
def test_build_refuses_an_unknown_group_option_naming_the_nearest(name):
    with pytest.raises(ValueError, match="'weight_decay'") as caught:
        RULES[name]([{"params": matrices((6, 4)), "weight_decy": 0.1}])
    assert "weight_decy" in str(caught.value)
    assert_one_line(caught)


@every_rule
def test_build_refuses_an_unknown_keyword(name):
    with pytest.raises((TypeError, ValueError), match="weight_decy") as caught:
        RULES[name](matrices((6, 4)), weight_decy=0.1)
    assert_one_line(caught)


def test_build_refuses_an_unknown_rule_naming_the_nearest():
    with pytest.raises(ValueError, match="'adamw'") as caught:
        OLion([{"params": matrices((6, 4)), "rule": "adamv"}])
    assert_one_line(caught)


@every_matrix_rule
@pytest.mark.parametrize("shape, remedy", [((6,), "AdamW"), ((), "AdamW"), ((2, 6, 4), "as_matrices")])
def test_build_refuses_a_tensor_that_is_not_a_matrix_saying_what_to_do(name, shape, remedy):
    with pytest.raises(ValueError, match=remedy) as caught:
        RULES[name](matrices(shape))
    assert_one_line(caught)


@every_matrix_rule
@pytest.mark.parametrize("option", ["batch", "flatten"])
def test_as_matrices_still_refuses_a_vector(name, option):
    with pytest.raises(ValueError, match="AdamW"):
        RULES[name](matrices((6,)), as_matrices=option)


def test_a_group_added_later_is_refused_like_one_at_build():
    optimizer = OLion(matrices((6, 4)))
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": matrices((4, 6)), "lr": -1.0})
    with pytest.raises(ValueError, match="AdamW"):
        optimizer.add_param_group({"params": matrices((6,))})
    assert len(optimizer.param_groups) == 1


# --- Registered rules


@pytest.fixture
def registry(monkeypatch):
    """Let a test register rules that no other test sees."""
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


def averaged(name: str = "averaged", **parts) -> UpdateRule:
    """A rule whose direction is its momentum, halved by `refine`: written in plain torch, one tensor at a time."""

    def prepare(gradients, state, group):
        for momentum, gradient in zip(state["momentum"], gradients, strict=True):
            momentum.mul_(group["keep"]).add_(gradient, alpha=1 - group["keep"])
        return [momentum.clone() for momentum in state["momentum"]]

    def refine(directions, state, group):
        return [direction.mul_(0.5) for direction in directions]

    defaults = {"lr": 0.1, "weight_decay": 0.0, "keep": 0.9}
    return UpdateRule(
        **{"name": name, "defaults": defaults, "state": ("momentum",), "prepare": prepare, "refine": refine} | parts
    )


def test_a_registered_rule_matches_its_formula(registry):
    register(averaged())
    parameters = matrices((6, 4), (3,))
    expected = [value.double() for value in values(parameters)]
    momenta = [torch.zeros_like(value) for value in expected]
    optimizer = RuleOptimizer(parameters, "averaged", weight_decay=0.5)
    for step in range(4):
        train(optimizer, parameters, 1, first=step)
        for i, parameter in enumerate(parameters):
            momenta[i] = 0.9 * momenta[i] + 0.1 * parameter.grad.double()
            expected[i] = (1 - 0.1 * 0.5) * expected[i] - 0.1 * 0.5 * momenta[i]
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.double(), value, rtol=0, atol=1e-6)  # float32's rounding


def test_a_registered_matrix_rule_whose_direction_is_its_argument_leaves_its_state_apart(registry):
    defaults = {"lr": 0.1, "weight_decay": 0.0, "keep": 0.9, "qkv_split": 1, "as_matrices": None}
    register(averaged(defaults=defaults, direct=lambda stack, group: stack))
    parameters, twins = matrices((6, 4), (6, 4)), []
    twins = clones(parameters)
    register(averaged("elementwise"))
    optimizer, plain = RuleOptimizer(parameters, "averaged"), RuleOptimizer(twins, "elementwise")
    train(optimizer, parameters, 3)
    train(plain, twins, 3)
    assert_all_equal(values(parameters), values(twins))  # refine writes to directions, never to the momentum


def test_a_registered_rule_trains_a_model_through_build_optimizer(registry):
    register(averaged())
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = build_optimizer(model, "averaged", lr=0.5, keep=0.5, weight_decay=0.0)
    assert {group["rule"] for group in optimizer.param_groups} == {"averaged", "adamw"}
    inputs = torch.randn(64, 4)
    targets = inputs.prod(dim=1, keepdim=True).tanh()
    losses = []
    for _ in range(60):
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    "parts, named",
    [
        ({"name": "olion"}, "olion"),
        ({"defaults": {"lr": 0.1}}, "weight_decay"),
        ({"prepare": None}, "prepare"),
        ({"whole_step": lambda *arguments: None}, "whole_step"),
    ],
)
def test_register_refuses_a_rule_that_cannot_run(registry, parts, named):
    with pytest.raises(ValueError, match=named) as caught:
        register(averaged(**parts))
    assert_one_line(caught)


# --- torch's own tools


@every_rule
@pytest.mark.parametrize("through", ["a file", "memory"])
def test_load_state_dict_continues_bit_for_bit(name, through, tmp_path):
    parameters = matrices((6, 4), (6, 4), (4, 6))
    optimizer = RULES[name](parameters, lr=0.02)
    train(optimizer, parameters, 3)
    saved = optimizer.state_dict()
    if through == "a file":
        torch.save(saved, tmp_path / "state.pt")
        saved = torch.load(tmp_path / "state.pt", weights_only=True)
    twins = clones(parameters)
    resumed = RULES[name](twins, lr=0.5)  # the rate comes with the state
    resumed.load_state_dict(saved)
    train(optimizer, parameters, 3, first=3)
    train(resumed, twins, 3, first=3)
    assert_all_equal(values(parameters), values(twins))


def refusal_of_state(optimizer, parameters, foreign, others) -> str:
    """Train both, load `foreign`'s state into `optimizer`, check that nothing changed; return the error's words."""
    train(optimizer, parameters, 2)
    train(foreign, others, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError) as caught:
        optimizer.load_state_dict(foreign.state_dict())
    assert_one_line(caught)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, value in before["state"][0].items():
        assert torch.equal(after["state"][0][key], value)
    return str(caught.value).lower()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_resumed_lionmuon_takes_up_its_period_where_it_was(steps):
    parameters = matrices((6, 4), (4, 6))
    optimizer = LionMuon(parameters, lr=0.1, period=3)
    train(optimizer, parameters, steps)
    twins = clones(parameters)
    resumed = LionMuon(twins, lr=0.1, period=3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, parameters, 4, first=steps)
    train(resumed, twins, 4, first=steps)
    assert_all_equal(values(parameters), values(twins))


@pytest.mark.parametrize("name, other", list(itertools.permutations(RULES, 2)))
def test_state_of_another_rule_is_refused_and_changes_nothing(name, other):
    parameters, others = matrices((6, 4)), matrices((6, 4))
    error = refusal_of_state(RULES[name](parameters), parameters, RULES[other](others, lr=0.5), others)
    assert name in error and other in error


@every_rule
@pytest.mark.parametrize("shapes", [[(4, 6)], [(6, 4), (6, 4)]])
def test_state_of_another_model_is_refused_and_changes_nothing(name, shapes):
    parameters, others = matrices((6, 4)), matrices(*shapes)
    refusal_of_state(RULES[name](parameters), parameters, RULES[name](others, lr=0.5), others)


@every_rule
def test_closure_is_run_with_gradients_and_its_loss_returned(name):
    parameters = matrices((6, 4))
    twins = clones(parameters)
    optimizer, plain = RULES[name](parameters), RULES[name](twins)

    def closure():
        optimizer.zero_grad()
        loss = parameters[0].square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == twins[0].square().sum().item()
    twins[0].square().sum().backward()
    plain.step()
    assert_all_equal(values(parameters), values(twins))


@every_rule
def test_a_scheduled_rate_matches_the_rate_set_by_hand(name):
    parameters = matrices((6, 4))
    twins = clones(parameters)
    scheduled, manual = RULES[name](parameters, lr=0.1), RULES[name](twins, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 1 / (1 + step))
    for step in range(3):
        manual.param_groups[0]["lr"] = 0.1 * (1 / (1 + step))
        train(scheduled, parameters, 1, first=step)
        train(manual, twins, 1, first=step)
        scheduler.step()
    assert_all_equal(values(parameters), values(twins))


@every_rule
def test_grad_scaler_matches_unscaled_steps_and_skips_infinite_ones(name):
    parameters = matrices((6, 4))
    twins = clones(parameters)
    scaled, plain = RULES[name](parameters), RULES[name](twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # a power of two: exact
    for factor in (1.0, float("inf"), 1.0):
        scaled.zero_grad()
        scaler.scale((parameters[0].sin() * factor).sum()).backward()
        scaler.step(scaled)
        scaler.update()
        if factor == 1.0:
            plain.zero_grad()
            twins[0].sin().sum().backward()
            plain.step()
    assert_all_equal(values(parameters), values(twins))


@every_rule
def test_deepcopy_continues_alike_and_apart(name):
    model = nn.Linear(4, 6, bias=False)
    optimizer = RULES[name](model.parameters())
    train(optimizer, list(model.parameters()), 2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    train(optimizer, list(model.parameters()), 2, first=2)
    assert not torch.equal(model.weight, twin_model.weight)
    train(twin, list(twin_model.parameters()), 2, first=2)
    assert_all_equal(values(model.parameters()), values(twin_model.parameters()))


@every_rule
def test_zero_grad_clears_gradients_and_the_next_step_does_nothing(name):
    parameters = matrices((6, 4))
    optimizer = RULES[name](parameters)
    train(optimizer, parameters, 1)
    optimizer.zero_grad()
    assert parameters[0].grad is None
    before = values(parameters)
    optimizer.step()
    assert_all_equal(values(parameters), before)


@every_rule
def test_options_changed_in_the_group_are_read_at_the_next_step(name):
    parameters = matrices((6, 4))
    optimizer = RULES[name](parameters, lr=0.1, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 0.0
    before = values(parameters)
    train(optimizer, parameters, 1)
    assert_all_equal(values(parameters), before)


@every_rule
def test_parameters_in_bfloat16_move_and_stay_in_bfloat16(name):
    parameters = matrices((6, 4), dtype=torch.bfloat16)
    optimizer = RULES[name](parameters, lr=0.1)
    before = values(parameters)
    train(optimizer, parameters, 2)
    assert parameters[0].dtype == torch.bfloat16
    assert parameters[0].isfinite().all() and not torch.equal(parameters[0], before[0])


@pytest.mark.gpu
@every_rule
def test_steps_on_cuda_match_the_cpu(name):
    parameters = matrices((24, 16), (16, 24), (24, 16))
    twins = [nn.Parameter(parameter.detach().cuda()) for parameter in parameters]
    options = {"lr": 1e-3} | ({"ns_dtype": torch.float32} if name in MATRIX_RULES else {})
    on_cpu, on_cuda = RULES[name](parameters, **options), RULES[name](twins, **options)
    train(on_cpu, parameters, 3)
    train(on_cuda, twins, 3)
    for parameter, twin in zip(parameters, twins, strict=True):
        # A flipped sign moves an entry by 2e-4 or more: float32's rounding may flip hardly any.
        near = (parameter - twin.cpu()).abs() < 1e-5
        assert near.double().mean() > 0.99


def test_nested_byte_counts_end_with_their_own_block(monkeypatch):
    monkeypatch.setattr(wire.dist, "all_reduce", lambda values, operation, group: None)
    monkeypatch.setattr(wire.dist, "get_world_size", lambda group: 2)  # a ring of two sends all bytes once, each way
    with count_bytes() as outer:
        with count_bytes() as inner:
            wire.all_reduce(torch.zeros(1), [None], "norms")
        wire.all_reduce(torch.zeros(3), [None], "norms")
    assert (inner.total_sent, inner.total_received) == (4, 4)
    assert (outer.total_sent, outer.total_received) == (16, 16)


def test_state_of_a_frozen_parameter_matches_after_torch_sets_it():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    optimizer = OLion(model.parameters())
    model[1].weight.requires_grad_(False)
    train(optimizer, [model[0].weight], 2)
    saved = get_optimizer_state_dict(model, optimizer)
    other = OLion(model.parameters())
    set_optimizer_state_dict(model, other, saved)
    assert torch.equal(other.state[model[0].weight]["momentum"], optimizer.state[model[0].weight]["momentum"])
    assert not other.state[model[1].weight]["momentum"].any()


def test_options_of_a_loaded_state_match_those_it_was_saved_with():
    (weight,) = matrices((6, 4))
    (twin,) = clones([weight])
    split, whole = OLion([weight], qkv_split=3), OLion([twin])
    split.load_state_dict(whole.state_dict())
    for optimizer, param in ((split, weight), (whole, twin)):
        train(optimizer, [param], 2)
    assert torch.equal(weight, twin)


def test_a_loaded_option_out_of_range_refuses_and_changes_nothing():
    (weight,) = matrices((6, 4))
    optimizer = OLion([weight])
    state = optimizer.state_dict()
    state["param_groups"][0]["ns_steps"] = 0
    with pytest.raises(ValueError, match="ns_steps"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["ns_steps"] == 5


@pytest.mark.parametrize("constructor", [OLion, AdamW])
def test_process_group_of_another_type_is_refused(constructor):
    with pytest.raises(ValueError, match="process_group"):
        constructor(matrices((6, 4)), process_group="nonsense")
