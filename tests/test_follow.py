"""The optimizer follows parameters that were moved, converted or swapped after it was built, and loads by name."""

import copy

import pytest
import torch
from ranks import Ranks
from test_engine import RULES, clones, every_rule, matrices, set_gradients, train, values
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from optimizers import AdamW, Muon, OLion, build_optimizer


def model_of(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 4)).to(dtype)


def assert_equal(left, right) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


# --- One process


@every_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_converted_after_building_matches_one_converted_before(name, dtype):
    before, after = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
    after.load_state_dict(before.state_dict())
    late = RULES[name](after.parameters())
    early = RULES[name](before.to(dtype).parameters())
    after.to(dtype)
    train(early, list(before.parameters()), 3)
    train(late, list(after.parameters()), 3)
    assert_equal(values(after.parameters()), values(before.parameters()))
    assert late.state[after.weight].keys() == early.state[before.weight].keys()


@every_rule
def test_a_model_converted_in_mid_training_keeps_its_state(name):
    model = nn.Linear(6, 4, bias=False)
    optimizer = RULES[name](model.parameters())
    train(optimizer, [model.weight], 2)
    expected = {key: buffer.clone() for key, buffer in optimizer.state[model.weight].items()}
    model.double()
    state = optimizer.state_dict()["state"][0]
    for key, buffer in expected.items():
        assert torch.equal(state[key], buffer.to(state[key].dtype))
        assert state[key].dtype == (torch.float32 if key == "step" else torch.float64)
    train(optimizer, [model.weight], 1)


@every_rule
def test_channels_last_after_building_matches_before(name):
    options = {"as_matrices": "flatten"} if name in ("olion", "muon", "adamuon") else {}
    early, late = matrices((8, 3, 2, 2), dtype=torch.float64), None
    late = clones(early)
    early[0].data = early[0].data.contiguous(memory_format=torch.channels_last)
    optimizers = RULES[name](early, **options), RULES[name](late, **options)
    train(optimizers[1], late, 1)
    late[0].data = late[0].data.contiguous(memory_format=torch.channels_last)
    train(optimizers[0], early, 1)
    for step in range(1, 3):
        for optimizer, parameters in zip(optimizers, (early, late), strict=True):
            set_gradients(parameters, step)
            parameters[0].grad = parameters[0].grad.contiguous(memory_format=torch.channels_last)
            optimizer.step()
    torch.testing.assert_close(late[0], early[0], rtol=0, atol=1e-11)  # the first step's products may round apart
    state = optimizers[1].state[late[0]]
    assert all(buffer.stride() == late[0].stride() for key, buffer in state.items() if key != "step")


@every_rule
def test_parameters_swapped_in_the_groups_keep_the_state_of_their_position(name):
    parameters = matrices((6, 4), (4, 6))
    twins = clones(parameters)
    optimizer, other = RULES[name](parameters), RULES[name](twins)
    train(optimizer, parameters, 2)
    train(other, twins, 2)
    swapped = clones(parameters)
    optimizer.param_groups[0]["params"] = swapped
    train(optimizer, swapped, 2, first=2)
    train(other, twins, 2, first=2)
    assert_equal(values(swapped), values(twins))
    assert set(optimizer.state) == set(swapped)


@every_rule
def test_a_resized_parameter_refuses_before_anything_is_written(name):
    parameters = matrices((6, 4), (6, 4))
    optimizer = RULES[name](parameters)
    train(optimizer, parameters, 1)
    parameters[1].data = torch.randn(300, 400)
    before = values(parameters)
    with pytest.raises(ValueError, match=r"\(300, 400\)") as caught:
        optimizer.step()
    assert "\n" not in str(caught.value)
    assert_equal(values(parameters), before)


@every_rule
def test_foreign_group_keys_are_kept_and_another_rules_options_refused(name):
    (weight,) = matrices((6, 4))
    foreign = {"lr_scale": 0.5, "tag": "body", "max_lr": 0.1, "min_lr": 0.0, "max_momentum": 0.9, "initial_lr": 0.1}
    optimizer = RULES[name]([{"params": [weight], **foreign}])
    assert foreign.items() <= optimizer.param_groups[0].items()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=False)
    train(optimizer, [weight], 1)
    scheduler.step()
    copied = RULES[name]([{**optimizer.param_groups[0], "params": clones([weight])}])
    assert copied.param_groups[0]["max_lr"] == 0.1
    stranger = "nesterov" if name != "muon" else "betas"
    if name in ("olion", "lion", "adamw") or stranger == "betas":
        with pytest.raises(ValueError, match=stranger):
            RULES[name]([{"params": clones([weight]), stranger: True}])


# --- Loading


@every_rule
def test_load_hooks_see_what_torchs_see(name):
    parameters = matrices((6, 4))
    optimizer = RULES[name](parameters, lr=0.5)
    train(optimizer, parameters, 2)
    saved = optimizer.state_dict()
    twins = clones(parameters)
    other = RULES[name](twins)
    seen = {}

    def before(hooked, state_dict):
        seen["before"] = sorted(state_dict["state"][0])
        return {**state_dict, "param_groups": [{**state_dict["param_groups"][0], "lr": 0.25}]}

    def after(hooked):
        seen["after"] = {key: buffer.clone() for key, buffer in hooked.state[twins[0]].items()}

    other.register_load_state_dict_pre_hook(before)
    other.register_load_state_dict_post_hook(after)
    other.load_state_dict(saved)
    assert seen["before"] == sorted(saved["state"][0])
    assert all(torch.equal(seen["after"][key], saved["state"][0][key]) for key in seen["before"])
    assert other.param_groups[0]["lr"] == 0.25


@every_rule
def test_a_state_loads_by_name_where_both_have_names(name):
    parameters = matrices((6, 4), (6, 4))
    twins = clones(parameters)
    optimizer = RULES[name]([("a", parameters[0]), ("b", parameters[1])])
    train(optimizer, parameters, 2)
    other = RULES[name]([("b", twins[1]), ("a", twins[0])])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["param_names"] == ["b", "a"]
    for mine, theirs in zip(parameters, twins, strict=True):
        for key, buffer in optimizer.state[mine].items():
            assert torch.equal(buffer, other.state[theirs][key])
    stranger = RULES[name]([("a", twins[0]), ("c", twins[1])])
    with pytest.raises(ValueError, match="'c'"):
        stranger.load_state_dict(optimizer.state_dict())


@every_rule
def test_a_state_that_is_not_finite_or_no_state_refuses(name):
    parameters = matrices((6, 4))
    optimizer = RULES[name](parameters)
    train(optimizer, parameters, 1)
    before = copy.deepcopy(optimizer.state_dict())
    damaged = copy.deepcopy(before)
    next(iter(damaged["state"][0].values())).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        optimizer.load_state_dict(damaged)
    with pytest.raises(ValueError, match="param_groups"):
        optimizer.load_state_dict({})
    for key, buffer in optimizer.state_dict()["state"][0].items():
        assert torch.equal(buffer, before["state"][0][key])


# --- Several ranks


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as two:
        yield two


def _train_model(model, optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 6, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def _whole(model) -> list[torch.Tensor]:
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]


def _converted_under_ddp(name: str) -> list[torch.Tensor]:
    model = model_of()
    optimizer = build_optimizer(DistributedDataParallel(model), name, lr=0.01)
    model.double()
    _train_model(DistributedDataParallel(model), optimizer, 3)
    return _whole(model)


def _swapped_for_shards(name: str) -> list[torch.Tensor]:
    """Build, step, and shard: each param group then gets the DTensors, as from Accelerate's `prepare`."""
    model = model_of(torch.float64)
    optimizer = build_optimizer(model, name, lr=0.01)
    _train_model(model, optimizer, 1)
    place = {id(param): name for name, param in model.named_parameters()}
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model.set_force_sum_reduction_for_comms(True)
    new = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[place[id(param)]] for param in group["params"]]
    _train_model(model, optimizer, 2, first=1)
    assert "sharded" in str(optimizer.plan) or name in ("lion", "adamw")
    return _whole(model)


@pytest.mark.slow
@every_rule
@pytest.mark.parametrize("change", [_converted_under_ddp, _swapped_for_shards])
def test_changes_on_two_ranks_match_one_process(ranks, name, change):
    model = model_of(torch.float64)
    options = {"ns_dtype": torch.float64} if name in ("olion", "muon", "adamuon") else {}
    optimizer = build_optimizer(model, name, lr=0.01, **options)
    if change is _converted_under_ddp:
        model.load_state_dict(model_of().double().state_dict())
    _train_model(model, optimizer, 3)
    for result in ranks(change, name):
        for param, expected in zip(result, model.parameters(), strict=True):
            # Directions are sent in bf16: 2^-9 of an update of 0.01 x about 0.6, three times; signs exactly.
            torch.testing.assert_close(param, expected.detach(), rtol=0, atol=1e-4)


def test_an_unchanged_optimizer_plans_once(monkeypatch):
    import optimizers.engine as engine

    parameters = matrices((6, 4))
    optimizers = OLion(parameters), Muon(clones(parameters)), AdamW(clones(parameters))

    def fail(*arguments, **options):
        raise AssertionError("planned again")

    monkeypatch.setattr(engine, "make_plan", fail)
    for optimizer in optimizers:
        for step in range(2):
            set_gradients(optimizer.param_groups[0]["params"], step)
            optimizer.step()


# --- Accelerate and the Trainer


def _prepared_by_accelerate(fsdp: bool, name: str) -> tuple[list[torch.Tensor], set[str]]:
    """Build for the plain model, let Accelerate wrap or shard it, and train; the whole parameters and the routes."""
    import os

    import torch.distributed as dist
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from torch.distributed.fsdp import FSDPModule

    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # the group exists already
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True) if fsdp else None
    accelerator = Accelerator(cpu=True)
    try:
        if fsdp:  # Accelerate takes its FSDP path on accelerators only
            shared = AcceleratorState._shared_state
            shared |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        model = model_of(torch.float64)
        optimizer = build_optimizer(model, name, lr=0.01)
        model, optimizer = accelerator.prepare(model, optimizer)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo lacks the other
        _train_model(model, optimizer, 2)
        routes = {entry.route for entry in optimizer.optimizer.plan.entries if entry.flops}
        return _whole(model), routes
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["olion", "adamuon", "adamw"])
@pytest.mark.parametrize("fsdp", [False, True])
def test_an_optimizer_built_before_accelerates_prepare_matches_one_process(ranks, fsdp, name):
    pytest.importorskip("accelerate")
    model = model_of(torch.float64)
    _train_model(model, build_optimizer(model, name, lr=0.01), 2)
    for result, routes in ranks(_prepared_by_accelerate, fsdp, name):
        assert routes <= ({"sharded"} if fsdp else {"local"})
        for param, expected in zip(result, model.parameters(), strict=True):
            # AdaMuon's directions are sent in bf16: 2^-9 of an update of 0.01 x about 0.6, twice; signs exactly.
            torch.testing.assert_close(param, expected.detach(), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_trainer_resumes_to_the_same_weights(tmp_path):
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    tokens = torch.arange(64 * 8).view(64, 8) * 7 % 32
    data = [{"input_ids": row, "labels": row} for row in tokens]

    def trained(resume: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=4,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        optimizer = build_optimizer(model.double(), "olion", lr=1e-2)
        trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        return {name: value.clone() for name, value in model.state_dict().items()}

    straight, resumed = trained(False), trained(True)
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-12)
