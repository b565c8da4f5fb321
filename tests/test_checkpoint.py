"""Checkpoints: restored bit for bit, refused if damaged or foreign, and kept when a save fails."""

import json
import pickle
import random
import resource
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from common import checkpoint
from common.checkpoint import CheckpointError, load, read_extra, save
from common.group_options import decode, encode
from common.manifest import Damaged, verify_manifest, write_manifest
from tests.ranks import spawn


def build(width=6, seed=0, optimizer_class=torch.optim.AdamW, **options):
    """A tiny model with dropout, so that training also depends on the random state."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.5), nn.Linear(width, 2))
    decayed, others = [], []
    for parameter in model.parameters():
        (decayed if parameter.ndim == 2 else others).append(parameter)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return model, optimizer_class(groups, lr=1e-2, **options)


def train(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(5, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def everything(model, optimizer):
    """The values that a refused load must not change; they compare with ==."""
    tensors = [*model.state_dict().values(), *(t for s in optimizer.state.values() for t in s.values())]
    groups = [{**group, "params": len(group["params"])} for group in optimizer.param_groups]
    return [tensor.tolist() for tensor in tensors], groups, torch.get_rng_state().tolist(), random.getstate()


def damage(path):
    """Overwrite a checkpoint's tensors in place: its sizes stay."""
    file = path / "__0_0.distcp"
    file.write_bytes(b"\x00" * file.stat().st_size)


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [(torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.SGD, {})],
)
def test_resumed_training_matches_uninterrupted_bit_for_bit(tmp_path, optimizer_class, options):
    model, optimizer = build(optimizer_class=optimizer_class, **options)
    train(model, optimizer, 3)
    optimizer.param_groups[0]["lr"] = 3e-3
    save(tmp_path, 3, model, optimizer, {"config": {"lr": 1e-2}})
    expected = train(model, optimizer, 4)

    resumed, resumed_optimizer = build(seed=1, optimizer_class=optimizer_class, **options)
    assert load(tmp_path, resumed, resumed_optimizer) == {"step": 3, "config": {"lr": 1e-2}}
    assert resumed_optimizer.param_groups[0]["lr"] == 3e-3
    assert train(resumed, resumed_optimizer, 4) == expected
    assert everything(resumed, resumed_optimizer) == everything(model, optimizer)


def test_load_restores_the_draws_of_every_generator(tmp_path):
    model, optimizer = build()
    save(tmp_path, 0, model, optimizer, {})
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    load(tmp_path, model, optimizer)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_save_before_the_first_step_leaves_adamw_as_it_was(tmp_path):
    model, optimizer = build()
    save(tmp_path, 0, model, optimizer, {})
    assert not optimizer.state
    expected = train(model, optimizer, 2)
    resumed, resumed_optimizer = build(seed=1)
    load(tmp_path, resumed, resumed_optimizer)
    assert not resumed_optimizer.state
    assert train(resumed, resumed_optimizer, 2) == expected


def test_load_of_the_model_alone_matches_the_saved_weights(tmp_path):
    model, optimizer = build()
    train(model, optimizer, 1)
    save(tmp_path, 1, model, optimizer, {})
    other, _ = build(seed=1)
    assert load(tmp_path, other) == {"step": 1}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_load_keeps_the_dtype_that_the_state_was_built_with(tmp_path):
    """torch's own load_state_dict would turn a bf16 momentum into fp32."""
    model, optimizer = build(optimizer_class=torch.optim.SGD, momentum=0.9)
    train(model, optimizer, 1)
    for state in optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].bfloat16()
    expected = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    save(tmp_path, 1, model, optimizer, {})
    for state in optimizer.state.values():
        state["momentum_buffer"].zero_()
    load(tmp_path, model, optimizer)
    restored = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert all(a.dtype == torch.bfloat16 and torch.equal(a, b) for a, b in zip(restored, expected, strict=True))


def test_load_gives_none_where_there_is_no_checkpoint(tmp_path):
    model, optimizer = build()
    assert load(tmp_path / "absent", model, optimizer) is None
    assert read_extra(tmp_path / "absent") is None


def test_read_extra_gives_the_newest_step_and_extra(tmp_path):
    model, optimizer = build()
    save(tmp_path, 9, model, optimizer, {"name": "nine"})
    save(tmp_path, 10, model, optimizer, {"name": "ten"})
    assert read_extra(tmp_path) == {"step": 10, "name": "ten"}


def test_load_of_a_truncated_checkpoint_warns_and_uses_the_one_before(tmp_path, capsys):
    model, optimizer = build()
    train(model, optimizer, 1)
    save(tmp_path, 1, model, optimizer, {})
    expected = everything(model, optimizer)
    train(model, optimizer, 1)
    newest = save(tmp_path, 2, model, optimizer, {})
    with open(newest / "__0_0.distcp", "r+b") as file:
        file.truncate(100)
    assert load(tmp_path, model, optimizer) == {"step": 1}
    assert everything(model, optimizer) == expected
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and warning.startswith("warning: ") and "100 bytes instead of" in warning


def test_load_of_an_unreadable_checkpoint_warns_and_uses_the_one_before(tmp_path, capsys):
    model, optimizer = build()
    save(tmp_path, 1, model, optimizer, {})
    expected = everything(model, optimizer)
    train(model, optimizer, 1)
    damage(save(tmp_path, 2, model, optimizer, {}))
    fresh, fresh_optimizer = build(seed=1)
    assert load(tmp_path, fresh, fresh_optimizer) == {"step": 1}
    assert everything(fresh, fresh_optimizer) == expected
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and warning.startswith("warning: ") and "step-00000002" in warning


@pytest.mark.parametrize("kind", ["truncated", "unreadable", "no manifest"])
def test_load_with_every_checkpoint_damaged_refuses_and_changes_nothing(tmp_path, kind):
    model, optimizer = build()
    train(model, optimizer, 1)
    path = save(tmp_path, 1, model, optimizer, {})
    if kind == "truncated":
        (path / ".metadata").write_bytes(b"")
    elif kind == "unreadable":
        damage(path)
    else:
        (path / "manifest.json").unlink()
    fresh, fresh_optimizer = build(seed=1)
    before = everything(fresh, fresh_optimizer)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
        load(tmp_path, fresh, fresh_optimizer)
    assert everything(fresh, fresh_optimizer) == before


def two_checkpoints(folder):
    """Checkpoints of steps 1 and 2, the newest first, and the model's state at step 1."""
    model, optimizer = build()
    train(model, optimizer, 1)
    first = save(folder, 1, model, optimizer, {"of": "one"})
    expected = everything(model, optimizer)
    train(model, optimizer, 1)
    return save(folder, 2, model, optimizer, {"of": "two"}), first, expected


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_load_after_any_flipped_bit_names_the_file_and_matches_the_checkpoint_before(tmp_path, capsys, name):
    """In a manifest, a bit of white space or of a key's case may go unnoticed: it changes nothing that is read."""
    newest, _, expected = two_checkpoints(tmp_path)
    whole, bits = (newest / name).read_bytes(), random.Random(5)
    seen = 0
    for _ in range(25):
        flip(newest / name, bits.randrange(8 * len(whole)))
        fresh, fresh_optimizer = build(seed=1)
        loaded = load(tmp_path, fresh, fresh_optimizer)
        warning = capsys.readouterr().err
        if loaded == {"step": 1, "of": "one"}:
            seen += 1
            assert everything(fresh, fresh_optimizer) == expected
            assert warning.count("\n") == 1 and "step-00000002" in warning and name in warning
        else:
            assert name == "manifest.json" and loaded == {"step": 2, "of": "two"} and not warning
        (newest / name).write_bytes(whole)
    assert seen == 25 if name != "manifest.json" else seen > 15


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_load_with_a_file_of_another_step_matches_the_checkpoint_before(tmp_path, capsys, name):
    newest, first, expected = two_checkpoints(tmp_path)
    shutil.copy(first / name, newest / name)
    fresh, fresh_optimizer = build(seed=1)
    assert load(tmp_path, fresh, fresh_optimizer) == {"step": 1, "of": "one"}
    assert everything(fresh, fresh_optimizer) == expected
    assert "step-00000002 is damaged" in capsys.readouterr().err


def test_every_damaged_file_is_named(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a", "b", "sub/c", "d"):
        (tmp_path / name).write_text(f"this is {name}")
    assert write_manifest(tmp_path, {"step": 3})["step"] == 3
    assert verify_manifest(tmp_path)["step"] == 3
    for name in ("a", "sub/c"):
        flip(tmp_path / name, 9)
    with pytest.raises(Damaged, match=r"SHA-256 differs: a, sub/c$"):
        verify_manifest(tmp_path)
    assert verify_manifest(tmp_path, checksums=False)["step"] == 3
    (tmp_path / "b").unlink()
    (tmp_path / "d").write_text("")
    with pytest.raises(Damaged, match="b is missing; d has 0 bytes instead of 9"):
        verify_manifest(tmp_path)


def test_without_checksums_sizes_alone_are_compared(tmp_path):
    model, optimizer = build()
    path = save(tmp_path, 1, model, optimizer, {}, checksums=False)
    assert all(file["sha256"] is None for file in verify_manifest(path)["files"].values())
    assert load(tmp_path, model, optimizer) == {"step": 1}
    with open(path / "__0_0.distcp", "ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="bytes instead of"):
        load(tmp_path, model, optimizer, checksums=False)


def rewritten(change):
    """Return a function that rewrites a manifest with a fitting SHA-256, as a foreign program could."""

    def rewrite(path):
        manifest = verify_manifest(path)
        (path / "manifest.json").unlink()
        change(manifest)
        contents = {key: value for key, value in manifest.items() if key != "files"}
        write_manifest(path, contents)

    return rewrite


def text(content):
    return lambda path: (path / "manifest.json").write_text(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        *[(text(each), "manifest") for each in ("", "[]", "null", "5", '"x"', "{}", '{"manifest": 5, "sha256": 6}')],
        (text("[" * 100_000), "cannot be read"),
        (text("9" * 5000), "cannot be read"),
        (text('{"format": 1, "step": 2}'), "format 1, of an older version"),
        (rewritten(lambda m: m.update(step=10**9)), "of step 1000000000"),
        (rewritten(lambda m: m.update(step=None)), "of step None"),
        (rewritten(lambda m: m.update(tensors=[])), "must hold tensors"),
        (rewritten(lambda m: m.pop("groups")), "must hold groups"),
        (rewritten(lambda m: m.update(extra=3)), "must hold extra"),
        (rewritten(lambda m: m.update(groups=[3])), "groups"),
        (rewritten(lambda m: m.update(groups=[{"rule": "AdamW"}])), "groups"),
        (rewritten(lambda m: m.update(tensors={"model.0.weight": 5})), "tensors"),
    ],
)
def test_load_of_a_manifest_of_another_shape_warns_and_matches_the_checkpoint_before(tmp_path, capsys, spoil, message):
    newest, _, expected = two_checkpoints(tmp_path)
    spoil(newest)
    fresh, fresh_optimizer = build(seed=1)
    assert load(tmp_path, fresh, fresh_optimizer) == {"step": 1, "of": "one"}
    assert everything(fresh, fresh_optimizer) == expected
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "step-00000002 is damaged" in warning and message in warning
    assert read_extra(tmp_path) == {"step": 1, "of": "one"}


class Payload:
    """Runs code when it is unpickled: harmless, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def poison_metadata(path, mark):
    (path / ".metadata").write_bytes(pickle.dumps(Payload(mark)))


def poison_planner_data(path, mark):
    metadata = checkpoint.dcp.FileSystemReader(path).read_metadata()
    metadata.planner_data = Payload(mark)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def poison_entries(path, mark):
    """Replace every entry, weights and random states alike, by an object that torch would unpickle."""
    keys = checkpoint.dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {key: Payload(mark) for key in keys}
        checkpoint.dcp.save(state, storage_writer=checkpoint.dcp.FileSystemWriter(path), no_dist=True)
    mark.unlink(missing_ok=True)


@pytest.mark.parametrize("poison", [poison_metadata, poison_planner_data, poison_entries])
def test_nothing_in_a_checkpoint_is_executed(tmp_path, poison):
    """The manifest fits the poisoned files, as a stranger's would."""
    model, optimizer = build()
    path, mark = save(tmp_path / "checkpoints", 1, model, optimizer, {}), tmp_path / "executed"
    manifest = verify_manifest(path)
    poison(path, mark)
    contents = {key: value for key, value in manifest.items() if key != "files"}
    write_manifest(path, contents)
    before = everything(model, optimizer)
    assert read_extra(path.parent) == {"step": 1}
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
        load(path.parent, model, optimizer)
    assert not mark.exists()
    assert everything(model, optimizer) == before


def test_metadata_that_reads_another_folder_is_refused(tmp_path):
    model, optimizer = build()
    path = save(tmp_path, 1, model, optimizer, {})
    manifest = verify_manifest(path)
    content = (path / ".metadata").read_bytes()
    assert content.count(b"__0_0.distcp") == 1
    (path / ".metadata").write_bytes(content.replace(b"__0_0.distcp", b"../_0.distcp"))
    write_manifest(path, {key: value for key, value in manifest.items() if key != "files"})
    with pytest.raises(CheckpointError, match="files of its folder"):
        load(tmp_path, model, optimizer)


@pytest.mark.parametrize(
    "value", [1, 0.1, float("inf"), True, None, "x", (0.9, (1, 2)), [1, (2,)], torch.bfloat16, {"a": (1,)}]
)
def test_group_options_come_back_equal_from_json(value):
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value and type(back) is type(value)


def test_a_group_option_that_cannot_be_saved_is_refused_before_writing(tmp_path):
    model, optimizer = build()
    optimizer.param_groups[0]["made_by"] = object()
    with pytest.raises(TypeError, match="object"):
        save(tmp_path, 1, model, optimizer, {})
    assert not list(tmp_path.iterdir())


def test_load_into_another_model_refuses_and_changes_nothing(tmp_path):
    model, optimizer = build(width=6)
    train(model, optimizer, 1)
    save(tmp_path, 1, model, optimizer, {})
    wider, wider_optimizer = build(width=8)
    before = everything(wider, wider_optimizer)
    with pytest.raises(CheckpointError) as refusal:
        load(tmp_path, wider, wider_optimizer)
    assert everything(wider, wider_optimizer) == before
    message = str(refusal.value)
    assert "another model (3 differences: model.0.bias is [6], here [8]; model.0.weight" in message
    assert "\n" not in message


def test_load_into_another_rule_with_the_same_state_refuses_and_changes_nothing(tmp_path):
    """Muon and OLion keep the same buffers, so only the rule's name tells them apart."""
    model, optimizer = build(optimizer_class=torch.optim.SGD, momentum=0.9)
    optimizer.param_groups[0]["rule"] = "olion"
    train(model, optimizer, 1)
    save(tmp_path, 1, model, optimizer, {})
    optimizer.param_groups[0]["rule"] = "muon"
    train(model, optimizer, 1)
    before = everything(model, optimizer)
    with pytest.raises(CheckpointError, match=r"another optimizer \(2 differences: 0.weight is olion, here muon"):
        load(tmp_path, model, optimizer)
    assert everything(model, optimizer) == before


def test_load_into_a_fresh_optimizer_of_another_class_refuses_and_makes_no_state(tmp_path):
    model, optimizer = build()
    train(model, optimizer, 1)
    save(tmp_path, 1, model, optimizer, {})
    other, other_optimizer = build(optimizer_class=torch.optim.SGD, momentum=0.9)
    before = everything(other, other_optimizer)
    with pytest.raises(CheckpointError, match=r"0.bias is AdamW, here SGD"):
        load(tmp_path, other, other_optimizer)
    assert not other_optimizer.state
    assert everything(other, other_optimizer) == before


def test_load_into_other_param_groups_refuses(tmp_path):
    model, optimizer = build()
    save(tmp_path, 1, model, optimizer, {})
    with pytest.raises(CheckpointError, match="other param groups"):
        load(tmp_path, model, torch.optim.AdamW(model.parameters()))


def test_save_on_a_full_disk_keeps_the_old_checkpoint_and_says_so_in_one_line(tmp_path):
    model, optimizer = build(width=2000)
    train(model, optimizer, 1)
    save(tmp_path, 1, model, optimizer, {})
    before = everything(model, optimizer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # the file has about 200,000 bytes
    try:
        with pytest.raises(CheckpointError) as failure:
            save(tmp_path, 2, model, optimizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(failure.value)
    assert "step 2 was not saved" in message and "File too large" in message and "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load(tmp_path, model, optimizer) == {"step": 1}
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("stage", ["write_data", "finish"])
def test_save_that_fails_at_any_stage_keeps_the_old_checkpoint(tmp_path, monkeypatch, stage):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    model, optimizer = build()
    save(tmp_path, 1, model, optimizer, {})
    target = checkpoint.dcp.FileSystemWriter if stage == "write_data" else checkpoint
    monkeypatch.setattr(target, stage, no_space)
    with pytest.raises(CheckpointError, match=r"No space left on device.*earlier ones are untouched"):
        save(tmp_path, 2, model, optimizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load(tmp_path, model, optimizer) == {"step": 1}


def test_save_refuses_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Not a directory"):
        save(tmp_path / "file" / "checkpoints", 1, *build(), {})


def test_save_keeps_the_last_k_and_removes_those_of_later_steps(tmp_path):
    model, optimizer = build()
    for step in (1, 2, 3, 4):
        save(tmp_path, step, model, optimizer, {}, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (2, 3, 4)]
    save(tmp_path, 3, model, optimizer, {"again": True}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    assert read_extra(tmp_path) == {"step": 3, "again": True}
    with pytest.raises(ValueError, match="keep must be at least 1"):
        save(tmp_path, 4, model, optimizer, {}, keep=0)


def test_remains_of_a_killed_save_are_not_loaded_and_are_removed(tmp_path):
    model, optimizer = build()
    path = save(tmp_path, 1, model, optimizer, {})
    shutil.copytree(path, tmp_path / ".partial-step-00000002")
    assert load(tmp_path, model, optimizer) == {"step": 1}
    save(tmp_path, 3, model, optimizer, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_save_refuses_an_extra_that_json_cannot_hold_before_writing(tmp_path):
    with pytest.raises(TypeError):
        save(tmp_path, 1, *build(), {"model": object()})
    assert not list(tmp_path.iterdir())


def optimizer_of(model):
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return torch.optim.SGD([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2, momentum=0.9)


def save_and_go_on(rank, folder, sharded):
    model, _ = build()
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = optimizer_of(model)
    torch.manual_seed(7)  # the same batches on both ranks, as if DDP had reduced the gradients
    train(model, optimizer, 2)
    random.seed(rank)
    save(folder, 2, model, optimizer, {})
    train(model, optimizer, 2)
    draw = random.random()
    assert load(folder, model, optimizer) == {"step": 2}
    assert random.random() == draw  # each rank has its own state back
    torch.manual_seed(8)
    (folder / f"losses-{rank}.json").write_text(json.dumps(train(model, optimizer, 2)))


def fail_on_rank_one(rank, folder):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    model, optimizer = build()
    save(folder, 1, model, optimizer, {})
    if rank == 1:
        checkpoint.dcp.FileSystemWriter.write_data = no_space
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(folder, 2, model, optimizer, {})
    assert load(folder, model, optimizer) == {"step": 1}


def run_on_two_ranks(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    save_and_go_on(rank, folder / "replicated", sharded=False)
    save_and_go_on(rank, folder / "fsdp2", sharded=True)
    fail_on_rank_one(rank, folder / "failed")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The checkpoints of two gloo ranks, written in one run: starting processes takes most of the time."""
    folder = tmp_path_factory.mktemp("two_ranks")
    spawn(run_on_two_ranks, (folder,), 2)
    return folder


@pytest.mark.parametrize("layout", ["replicated", "fsdp2"])
def test_one_process_going_on_from_two_ranks_matches_their_losses(two_ranks, layout):
    model, _ = build(seed=1)
    optimizer = optimizer_of(model)
    train(model, optimizer, 1)
    assert load(two_ranks / layout, model, optimizer) == {"step": 2}
    assert random.random() == random.Random(0).random()  # the state of rank 0
    torch.manual_seed(8)
    losses = train(model, optimizer, 2)
    for rank in (0, 1):
        assert json.loads((two_ranks / layout / f"losses-{rank}.json").read_text()) == losses


def test_save_that_fails_on_one_rank_keeps_the_old_checkpoint_on_all(two_ranks):
    assert [path.name for path in (two_ranks / "failed").iterdir()] == ["step-00000001"]
