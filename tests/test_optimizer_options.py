"""Options, declared once in a constructor: checked, listed, and set from code and configs."""

import copy
import inspect
import math
import pickle
import re
from dataclasses import replace

import pytest
import torch
from test_engine import RULES, clones, every_rule, matrices, train, values
from torch import nn

import optimizers
from common.config import ConfigError, parse_config
from common.optimizer_config import OptimizerConfig
from common.optimizer_help import SET_ELSEWHERE, options_help
from nanoGPT.config import Config, GPTOptimizerConfig
from optimizers import RULES as REGISTERED
from optimizers import (
    AdaMuon,
    AdamW,
    Lion,
    Muon,
    OLion,
    Probe,
    RuleOptimizer,
    UpdateRule,
    build_optimizer,
    orthogonalize,
    register,
    roles_of,
)
from optimizers.polar import orthogonalize_group


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8))


def test_every_option_of_every_rule_has_a_line_of_documentation_and_a_kind():
    classes = [each for each in vars(optimizers).values() if inspect.isclass(each) and issubclass(each, RuleOptimizer)]
    rules = [REGISTERED[each.rule] for each in classes if each.rule]  # scripts that other tests import add rules
    assert len(rules) >= 11
    for rule in rules:
        for option in rule.defaults:
            assert option in rule.kinds, (rule.name, option)
            line = rf"^{option} \(.*\b{rule.name}\b.*\): \S"
            assert option in SET_ELSEWHERE or re.search(line, options_help(), re.M), (rule.name, option)


@every_rule
def test_a_constructors_signature_matches_its_groups_options(name):
    optimizer = RULES[name](matrices((6, 4)))
    parameters = inspect.signature(RULES[name]).parameters
    declared = {each: parameter.default for each, parameter in parameters.items()}
    group = optimizer.param_groups[0]
    assert set(declared) - {"params", "process_group"} == set(group) - {"params", "rule"}
    assert all(group[each] == declared[each] for each in group if each not in ("params", "rule"))


def test_a_variant_of_a_rule_is_built_as_that_variant(registry):
    register(replace(REGISTERED["olion"], name="unsigned", direct=orthogonalize_group, signs=False))
    optimizer = build_optimizer(model(), "unsigned", lr=0.1, scale=0.3)
    assert (optimizer.param_groups[0]["rule"], optimizer.param_groups[0]["scale"]) == ("unsigned", 0.3)


@every_rule
def test_an_optimizer_is_of_its_class_and_copies_and_pickles_as_such(name):
    parameters = matrices((6, 4))
    optimizer = RULES[name](parameters)
    train(optimizer, parameters, 2)
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert type(twin) is RULES[name] and type(twin).__name__ == RULES[name].__name__
        train(twin, twin.param_groups[0]["params"], 1, first=2)
    train(optimizer, parameters, 1, first=2)
    assert torch.equal(twin.param_groups[0]["params"][0], parameters[0])
    assert isinstance(build_optimizer(model(), name, lr=0.1), (RULES[name], RuleOptimizer))
    assert type(build_optimizer(model(), name, lr=0.1)) is RULES[name]


def test_print_of_an_optimizer_is_one_line_per_group():
    network = nn.Sequential(*(nn.Linear(8, 8) for _ in range(200)))
    lines = str(build_optimizer(network, "olion", lr=0.1)).splitlines()
    assert lines[0] == "OLion ("
    assert len(lines) < 8 and max(map(len, lines)) < 400
    assert "199 tensors" in str(lines) or "200 tensors" in str(lines)


@every_rule
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", math.inf),
        ("weight_decay", math.inf),
        ("scale", math.inf),
        ("eps", math.nan),
        ("ns_coefficients", [3.4, math.nan, 2.0]),
        ("ns_steps", True),
        ("nesterov", "no"),
        ("momentum", "0.9"),
        ("betas", [0.9]),
        ("betas", 0.9),
        ("ns_dtype", torch.float8_e4m3fn),
        ("ns_dtype", "int8"),
        ("state_dtype", "float8_e4m3fn"),
        ("ns_form", 3),
        ("adjust_lr_fn", "none"),
        ("qkv_split", 1.5),
    ],
)
def test_build_refuses_values_not_finite_or_of_another_type(name, option, value):
    if option not in REGISTERED[name].defaults:
        return
    for build in (lambda: RULES[name](matrices((6, 4)), **{option: value}), lambda: of_group(name, option, value)):
        with pytest.raises(ValueError, match=option) as caught:
            build()
        assert "\n" not in str(caught.value)


def of_group(name: str, option: str, value) -> RuleOptimizer:
    return RULES[name]([{"params": matrices((6, 4)), option: value}])


def test_lists_and_names_match_tuples_and_dtypes():
    optimizer = OLion(matrices((6, 4)), betas=[0.8, 0.9], ns_dtype="bfloat16", state_dtype="torch.float32")
    group = optimizer.param_groups[0]
    assert (group["betas"], group["ns_dtype"], group["state_dtype"]) == ((0.8, 0.9), torch.bfloat16, torch.float32)


def test_a_rate_as_a_tensor_matches_the_number():
    (weight,) = matrices((6, 4))
    (twin,) = clones([weight])
    train(OLion([weight], lr=torch.tensor(0.125)), [weight], 2)
    train(OLion([twin], lr=0.125), [twin], 2)
    assert torch.equal(weight, twin)


# --- Configs


def test_options_from_toml_and_command_line_match_those_from_code(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('[optimizer]\nname = "muon"\nlr = 0.1\n[optimizer.options]\nnesterov = false\nmomentum = 0.8\n')
    flags = ["--optimizer.options.momentum", "0.7", "--optimizer.options.adjust_lr_fn", "original"]
    flags += ["--optimizer.options.ns_dtype", "float32", "--optimizer.options.ns_coefficients=[2.0, -1.5, 0.5]"]
    settings = parse_config(Config, [str(path), *flags]).optimizer
    group = build_optimizer(model(), settings.name, **settings.arguments()).param_groups[0]
    expected = {"nesterov": False, "momentum": 0.7, "adjust_lr_fn": "original", "ns_dtype": torch.float32}
    assert {name: group[name] for name in expected} == expected
    assert tuple(group["ns_coefficients"]) == (2.0, -1.5, 0.5)


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [("betas", "options.betas"), ("ns-steps", "options.ns_steps"), ("ns_step", "options.ns_steps"), ("lrr", "lr")],
)
def test_an_option_without_its_table_refuses_with_the_flag_that_sets_it(flag, nearest, tmp_path):
    hint = f"; the nearest known key is 'optimizer.{nearest}'"
    with pytest.raises(ConfigError, match=rf"unknown flag '--optimizer\.{flag}'{hint}$"):
        parse_config(Config, [f"--optimizer.{flag}", "[0.9, 0.98]"])
    path = tmp_path / "config.toml"
    path.write_text(f"[optimizer]\n{flag} = 1\n")
    with pytest.raises(ConfigError, match=rf"unknown key 'optimizer\.{flag}'{hint}$"):
        parse_config(Config, [str(path)])


def test_help_lists_every_option_of_every_rule():
    listed = options_help()
    for option in ("scale", "eps", "ns_form", "nesterov", "adjust_lr_fn", "betas", "momentum", "state_dtype"):
        assert f"\n{option} (" in listed
    assert listed in GPTOptimizerConfig.__doc__ and listed in OptimizerConfig.__doc__


def test_help_of_an_inherited_option_matches_the_class_that_its_docstring_names():
    lines = {line.split(": ")[0]: line for line in options_help().split("\n\n")}
    floor = next(line for names, line in lines.items() if names.startswith("eps (") and "olion" in names)
    assert "floor of the Frobenius norm" in floor and "lionmuon" in floor and "polargrad" in floor
    assert lines["scale (polargrad, polarsgdm)"].endswith("RMS of D with `signed`.")


# --- Registered rules


@pytest.fixture
def registry():
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


def test_a_direction_that_is_no_sign_refuses_in_the_first_step_on_one_process(registry):
    register(
        UpdateRule(
            name="halves",
            defaults={"lr": 0.1, "weight_decay": 0.0},
            prepare=lambda grads, state, group: [grad.clone() for grad in grads],
            direct=lambda stack, group: stack.sign() / 2,
            signs=True,
        )
    )
    parameters = matrices((6, 4))
    before = values(parameters)
    with pytest.raises(ValueError, match=r"signs=True.*0\.5"):
        train(RuleOptimizer(parameters, "halves"), parameters, 1)
    assert torch.equal(before[0], parameters[0])


def test_a_matrix_seen_by_an_option_that_its_rule_lacks_refuses_with_the_option(registry):
    prepare, direct = (lambda grads, *_: grads), (lambda stack, group: stack)
    register(UpdateRule(name="bare", defaults={"lr": 0.1, "weight_decay": 0.0}, prepare=prepare, direct=direct))
    with pytest.raises(ValueError, match=r"^0\.weight needs as_matrices='flatten', an option that bare does not"):
        build_optimizer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4)), "bare", lr=0.1, as_matrices="flatten")


def test_numbers_per_row_without_directions_or_their_reader_refuse(registry):
    fields = {"defaults": {"lr": 0.1, "weight_decay": 0.0}, "rows": ("v",), "prepare": lambda grads, *_: grads}
    for lacking in ({"refine": lambda directions, *_: directions}, {"direct": lambda stack, group: stack}):
        with pytest.raises(ValueError, match=r"give it a direct and a refine$"):
            register(UpdateRule(name="incomplete", **fields, **lacking))


def test_a_rule_without_kinds_refuses_values_of_another_type_than_its_defaults(registry):
    register(
        UpdateRule(
            name="plain",
            defaults={"lr": 0.1, "weight_decay": 0.0, "keep": 0.9, "fast": False},
            prepare=lambda grads, state, group: [grad.clone() for grad in grads],
        )
    )
    for option, value in [("keep", math.nan), ("keep", "0.9"), ("fast", "no"), ("lr", -1.0)]:
        with pytest.raises(ValueError, match=option):
            RuleOptimizer(matrices((6, 4)), "plain", **{option: value})


def test_the_five_are_classes_of_torchs_kind():
    for optimizer_class in (OLion, Muon, AdaMuon, Lion, AdamW):
        assert issubclass(optimizer_class, torch.optim.Optimizer)


# --- Parameters


@every_rule
@pytest.mark.parametrize("shape", [(4, 0), (0, 4), (0, 0)])
def test_a_matrix_without_entries_steps(name, shape):
    parameters = matrices(shape, (4, 3))
    before = values(parameters)
    train(RULES[name](parameters, lr=0.1), parameters, 2)
    assert not torch.equal(parameters[1], before[1])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group")
@every_rule
def test_parameters_of_eight_bits_twice_or_instead_of_a_model_refuse(name):
    (weight,) = matrices((6, 4))
    tiny = nn.Parameter(torch.zeros(6, 4).to(torch.float8_e4m3fn), requires_grad=False)
    refused = {
        "float8_e4m3fn": lambda: RULES[name]([tiny]),
        "once": lambda: RULES[name]([weight, weight]),
        "nn.Module": lambda: build_optimizer([weight], name, lr=0.1),
    }
    for message, build in refused.items():
        with pytest.raises(ValueError, match=message) as caught:
            build()
        assert "\n" not in str(caught.value)


def test_groups_without_params_non_tensors_and_other_optimizers_are_refused_in_one_line():
    for call, message in [
        (lambda: OLion([{"lr": 1e-3}]), "must be a dict with params"),
        (lambda: roles_of(None), r"torch\.nn\.Module"),
        (lambda: orthogonalize([[1.0]]), "must be a tensor"),
        (lambda: orthogonalize(torch.ones(2, 4), eps=math.nan), "eps must be finite"),
        (lambda: Probe(None), "must have an optimizer"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
