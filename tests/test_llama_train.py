"""Llama through torchtitan: the same losses on every layout of ranks, across a kill and a resume, and fine-tuned."""

import json
import math
import os
import shutil
import signal
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.distributed._composable.replicate import replicate
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from common import UserError
from common.manifest import Damaged, verify_manifest
from Llama import arithmetic
from Llama.checkpoints import Checkpointer, find_step, newest_checkpoint
from Llama.config import JobConfig, parse_config
from Llama.metrics import Diverged, _Logger, name_of
from Llama.model import FLAVORS
from Llama.prepare import Prepare, prepare
from Llama.train import main, same_experiment, set_gradient_sync, titan, train
from scripts.curvature.subjects import open_run
from tests.ranks import Ranks

ROOT = Path(__file__).resolve().parents[1]
STDLIB, PAPER, QWEN = (
    str(ROOT / f"Llama/train_configs/{name}.toml") for name in ("stdlib", "llama2_7b", "qwen_stdlib")
)
STEPS = 2
# AdamW's step is elementwise: only the order of sums in the model differs. OLion takes signs of a quintic in it,
# of which a few of 10,000 flip with the rounding, each by the whole step. torch's norm of one large float32 tensor is
# off by 2e-4 on CPUs, which shards of it are not.
OPTIMIZERS = {"adamw": 1e-4, "olion": 5e-3, "muon": 1e-3, "adamuon": 5e-3, "lion": 5e-3}
LAYOUTS = {  # of four ranks
    "fsdp": {},
    "hsdp": {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2},
    "tp": {"tensor_parallel_degree": 4},
    "fsdp x tp": {"tensor_parallel_degree": 2},
    "ddp": {"data_parallel_replicate_degree": 4, "data_parallel_shard_degree": 1},
}
# The first step's loss and gradient know of no optimizer: they are compared tightly on every layout. test_routes.py has
# every rule on every layout.
CASES = [("olion", layout) for layout in LAYOUTS] + [("adamw", "ddp"), ("adamw", "fsdp")]
CASES += [(name, "fsdp x tp") for name in ("muon", "adamuon", "lion")]
QUICK = {
    "model.hf_assets_path": "corpus",
    "training.dataset_path": "corpus",
    "training.steps": STEPS,
    "training.seq_len": 32,
    "training.local_batch_size": 2,
    "validation.dataset_path": "corpus",
    "validation.windows": 8,
    "validation.freq": STEPS,
    "metrics.log_freq": 1,
    "metrics.wandb": "disabled",
    "lr_scheduler.warmup_steps": 1,
    "lr_scheduler.total_steps": STEPS,
    "job.group": "test",
    "checkpoint.interval": STEPS - 1,
}
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compares gloo ranks; torchtitan would take the GPUs")


def quick(folder: Path, *more: str, ranks: int = 1, config: str = STDLIB, **settings) -> JobConfig:
    """A quick run in `folder`; settings are torchtitan's, section__key, read once, not by every rank."""
    values = QUICK | {"job.dump_folder": "runs"} | {key.replace("__", "."): value for key, value in settings.items()}
    for key in ("model.hf_assets_path", "training.dataset_path", "validation.dataset_path", "job.dump_folder"):
        values[key] = folder / values[key]
    flags = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    with mock.patch.dict(os.environ, WORLD_SIZE=str(ranks)):
        return parse_config([config, *flags, *more])


def tuning(folder: Path, base: Path, *more: str, ranks: int = 1, **settings) -> JobConfig:
    """A quick fine-tuning, in micro-batches of one or two examples of unlike lengths."""
    values = {
        "training.dataset": "instructions",
        "training.dataset_path": folder / "problems",
        "training.seq_len": 128,
        "training.local_batch_size": 2 // ranks,
        "validation.dataset": "instructions",
        "validation.dataset_path": folder / "problems",
        "validation.pretrain_dataset": "text",
        "validation.pretrain_path": folder / "corpus",
        "validation.seq_len": 32,
        "fine_tuning.template": "question",
        "checkpoint.initial_load_path": base,
        "optimizer.name": "adamw",
        "optimizer.lr": 1e-2,
    }
    flags = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return quick(folder, *flags, *more, ranks=ranks, **settings)


def losses(folder: Path) -> dict[tuple[str, int], float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    keys = ("train/loss", "val/loss", "grad_norm", "val/exact_match", "val/pretrain_loss")
    return {(key, line["step"]): line[key] for line in lines for key in keys if key in line}


@pytest.fixture(scope="module", autouse=True)
def half_the_layers():
    with mock.patch.object(FLAVORS["llama2"]["debug"], "n_layers", 2):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus, and the runs of every layout on four ranks and of one rank."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "source").mkdir()
    for path in sorted((ROOT / "optimizers").glob("*.py")):
        (folder / "source" / path.name).write_text(path.read_text())
    prepare(Prepare(str(folder / "source"), folder / "corpus", vocab_size=400, val_fraction=0.2))
    with Ranks(4) as ranks:
        for name, layout in CASES:
            options = {f"parallelism__{key}": value for key, value in LAYOUTS[layout].items()}
            ranks(_train, quick(folder, ranks=4, job__group=layout, optimizer__name=name, **options))
    with Ranks(1) as rank:
        for name in OPTIMIZERS:
            rank(_train, quick(folder, job__group="alone", optimizer__name=name))
    return folder


def _train(settings: JobConfig) -> None:
    """Run Llama.train's main on a rank of tests/ranks.py, with half the layers."""
    rank = str(torch.distributed.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(torch.distributed.get_world_size())}
    titan.time.sleep = lambda seconds: None  # torchtitan's rank 0 waits at the end of each run
    FLAVORS["llama2"]["debug"].n_layers = 2
    folder = Path(settings.job.dump_folder, settings.job.group, name_of(settings))
    if settings.job.resume:
        same_experiment(folder, settings)
    train(replace(settings, job=replace(settings.job, dump_folder=str(folder))))


@pytest.fixture(scope="module")
def tuned(folder) -> Path:
    """Fine-tuning runs, of one rank and of two, from the weights of the AdamW run of one rank."""
    arithmetic.make(arithmetic.Options(folder / "problems", train=40, val=8))
    base = run_of(folder, "alone", "adamw")
    with Ranks(1) as rank:
        rank(_train, tuning(folder, base, job__group="tuned alone"))
        rank(_train, tuning(folder, base, "--fine_tuning.packing", job__group="packed alone"))
    with Ranks(2) as ranks:
        ranks(_train, tuning(folder, base, ranks=2, job__group="tuned"))
        ranks(_train, tuning(folder, base, "--fine_tuning.packing", ranks=2, job__group="packed"))
    return folder


def run_of(folder: Path, group: str, optimizer: str) -> Path:
    (run,) = (folder / "runs" / group).glob(f"{optimizer}-*")
    return run


@pytest.mark.parametrize(("optimizer", "layout"), CASES)
def test_losses_of_four_ranks_match_those_of_one(folder, optimizer, layout):
    alone, several = (losses(run_of(folder, group, optimizer)) for group in ("alone", layout))
    assert alone.keys() == several.keys()
    assert len(alone) == 2 * STEPS + 2  # and two validations, one before the first step
    for key, loss in alone.items():
        updated = OPTIMIZERS[optimizer] if key[1] > 1 else 1e-4
        tolerance = max(updated, 5e-4 if key[0] == "grad_norm" else 0)
        assert several[key] == pytest.approx(loss, abs=tolerance), key
    assert alone["val/loss", STEPS] < alone["val/loss", 0] - 0.1  # it learns


@pytest.mark.parametrize(("optimizer", "layout"), CASES)
def test_probes_of_four_ranks_match_those_of_one(folder, optimizer, layout):
    alone, several = (probes(run_of(folder, group, optimizer)) for group in ("alone", layout))
    assert alone and alone.keys() == several.keys()
    for key, value in alone.items():  # of the first step: weights alike, gradients to the rounding of float32
        assert several[key] == pytest.approx(value, rel=1e-5 if "/weight_" in key else 0.05), key


def probes(folder: Path) -> dict[str, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {key: line[key] for line in lines for key in line if key.startswith("probe/") and key != "probe/ms"}


def test_loss_of_the_curvature_script_matches_that_of_validation(folder):
    run = run_of(folder, "alone", "olion")
    subject = open_run(run, rows=8)
    assert subject.steps == [0, *range(1, STEPS + 1)] and "layers.1.attention.wq.weight" in subject.matrices
    for step in (0, STEPS):  # the initial weights are drawn again, as on one rank
        subject.load(step)
        assert subject.loss().dtype == torch.float64
        assert float(subject.loss()) == pytest.approx(losses(run)["val/loss", step], abs=1e-5)


ACCUMULATED = {  # in two micro-batches per rank
    "hsdp": LAYOUTS["hsdp"],
    "ddp": LAYOUTS["ddp"],
    "fsdp, gradients whole": {},
}


@pytest.mark.parametrize("layout", ACCUMULATED)
def test_losses_of_two_micro_batches_per_rank_match_those_of_one_rank(folder, layout):
    options = {f"parallelism__{key}": value for key, value in ACCUMULATED[layout].items()}
    options["training__gradient_sync"] = "step" if "whole" in layout else "replicas"
    group = f"{layout}, accumulated"
    with Ranks(4) as ranks:
        settings = quick(
            folder, ranks=4, job__group=group, optimizer__name="adamw", training__local_batch_size=1, **options
        )
        ranks(_train, settings)
    assert losses(run_of(folder, group, "adamw")) == pytest.approx(losses(run_of(folder, "alone", "adamw")), abs=5e-4)


def test_gradients_are_reduced_at_the_last_micro_batch_alone():
    with Ranks(2) as ranks:
        assert ranks(_meetings) == [[True, True], [True, True]]


def _meetings() -> list[bool]:
    """Return, for HSDP and DDP, whether gradients are reduced after the second of two backward passes alone."""
    mesh, found = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")), []
    rank = torch.distributed.get_rank()
    for layout in ("hsdp", "ddp"):
        model = torch.nn.Linear(3, 1, bias=False)
        model = fully_shard(model, mesh=mesh) if layout == "hsdp" else replicate(model, device_mesh=mesh["replicate"])
        grads = []
        for micro_batch in range(2):
            set_gradient_sync(model, micro_batch == 1, "replicas")
            model(torch.full((1, 3), 1.0 + rank + 10 * micro_batch)).sum().backward()
            grad = model.weight.grad
            grads.append(getattr(grad, "full_tensor", lambda grad=grad: grad)() if grad is not None else None)
        # Of one rank 1 + 11, of the other 2 + 12: the mean is 13. Before the reduction each has its own, or none.
        met = grads[0] is not None and torch.allclose(grads[0], torch.full((1, 3), 1.5))
        found.append(not met and torch.allclose(grads[1], torch.full((1, 3), 13.0)))
    return found


def test_ranks_that_were_started_otherwise_refuse_before_the_first_step(folder):
    with Ranks(2) as ranks:
        for key, value in [("debug__seed", 3), ("validation__freq", 1), ("optimizer__lr", 0.5)]:
            settings = [quick(folder, ranks=2, **{"job__group": "unlike", **more}) for more in ({}, {key: value})]
            for message in ranks(_refused_unlike, settings):
                assert f"all ranks must have the same config.{key.replace('__', '.')}; got " in message
    assert not (folder / "runs/unlike").exists()


def _refused_unlike(settings: list[JobConfig]) -> str:
    return _refused(settings[torch.distributed.get_rank()])


def test_checkpoint_that_cannot_be_written_is_one_line_with_the_cause():
    class Unbuilt(Checkpointer):
        __init__ = close = lambda self: None

    failure = CheckpointException("save", {1: _wrap_exception(OSError(28, "No space left on device"))})
    with mock.patch("torch.distributed.checkpoint.save", side_effect=failure), pytest.raises(OSError) as raised:
        Unbuilt().dcp_save({}, "runs/x/step-1", "disabled")
    assert "cannot be written to runs/x/step-1: [Errno 28] No space left on device; earlier ones" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_qwen_losses_of_shards_and_replicas_match_those_of_one_rank_and_resume(folder):
    """One table is embedding and head: its gradient is the sum of both uses."""
    shared = {"config": QWEN, "optimizer__name": "muon", "optimizer__lr": 2e-3}
    with Ranks(1) as rank:
        rank(_train, quick(folder, job__group="qwen alone", **shared))
    with Ranks(2) as ranks:
        ranks(_train, quick(folder, ranks=2, job__group="qwen fsdp", **shared))
        ddp = {f"parallelism__data_parallel_{key}_degree": degree for key, degree in (("replicate", 2), ("shard", 1))}
        ranks(_train, quick(folder, ranks=2, job__group="qwen ddp", **shared, **ddp))
        expected = losses(run_of(folder, "qwen alone", "muon"))
        for group in ("qwen fsdp", "qwen ddp"):
            assert losses(run_of(folder, group, "muon")) == pytest.approx(expected, abs=1e-3)
        shutil.rmtree(run_of(folder, "qwen fsdp", "muon") / f"checkpoint/step-{STEPS}")
        ranks(_train, quick(folder, "--job.resume", ranks=2, job__group="qwen fsdp", **shared))
    assert losses(run_of(folder, "qwen fsdp", "muon")) == pytest.approx(expected, abs=1e-3)
    assert expected["val/loss", STEPS] < expected["val/loss", 0] - 0.05


def test_resume_on_one_rank_of_a_run_of_four_matches_an_uninterrupted_run(folder):
    run = folder / "runs/resumed" / run_of(folder, "fsdp", "adamw").name
    shutil.copytree(run_of(folder, "fsdp", "adamw"), run)
    shutil.rmtree(run / f"checkpoint/step-{STEPS}")  # as if it had been killed before its end
    with Ranks(1) as rank:
        rank(_train, quick(folder, "--job.resume", job__group="resumed", optimizer__name="adamw"))
    assert (run / f"checkpoint/step-{STEPS}").exists()
    expected, found = losses(run_of(folder, "alone", "adamw")), losses(run)
    assert found == pytest.approx(expected, abs=5e-4)


def test_sigterm_saves_and_the_resumed_run_matches_an_uninterrupted_one(folder):
    settings = {"job__group": "stopped", "optimizer__name": "adamw", "checkpoint__interval": 100}
    with Ranks(2) as ranks:
        ranks(_stopped, quick(folder, ranks=2, **settings))
        run = run_of(folder, "stopped", "adamw")
        assert {path.name for path in (run / "checkpoint").iterdir()} == {"step-1"}
        assert max(step for _, step in losses(run)) == 1
        ranks(_train, quick(folder, "--job.resume", ranks=2, **settings))
    assert losses(run) == pytest.approx(losses(run_of(folder, "alone", "adamw")), abs=5e-4)


def _stopped(settings: JobConfig) -> None:
    """Train, with a signal in the first step to rank 1 alone, as if torchrun passed it on late."""
    step = titan.Trainer.train_step

    def stopped(*arguments) -> None:
        step(*arguments)
        if torch.distributed.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(titan.Trainer, "train_step", stopped):
        _train(settings)


def test_weights_that_are_not_finite_are_not_saved_and_refuse_on_all_ranks(folder):
    settings = {"job__group": "poisoned", "optimizer__name": "adamw", "metrics__log_freq": 100, "training__steps": 4}
    with Ranks(2) as ranks:  # the steps between logged ones are not looked at otherwise
        messages = ranks(_poisoned, quick(folder, ranks=2, lr_scheduler__total_steps=4, **settings))
    assert all("training needs finite weights and momentum, and after step 2 they are not" in each for each in messages)
    run = run_of(folder, "poisoned", "adamw")
    assert {path.name for path in (run / "checkpoint").iterdir()} == {"step-1"}  # the last finite one
    verify_manifest(run / "checkpoint/step-1")
    assert json.loads((run / "finished.json").read_text())["diverged"]


def _poisoned(settings: JobConfig) -> str:
    """Train, with one NaN in one weight of rank 1 after the second step."""
    step = titan.Trainer.train_step

    def poisoned(trainer, *arguments) -> None:
        step(trainer, *arguments)
        if torch.distributed.get_rank() == 1 and trainer.step == 2:
            next(trainer.model_parts[0].parameters()).data.to_local().view(-1)[0] = math.nan

    with mock.patch.object(titan.Trainer, "train_step", poisoned):
        return _refused(settings)


def test_last_validation_that_is_not_finite_is_a_divergence(tmp_path):
    settings = SimpleNamespace(
        job=SimpleNamespace(dump_folder=str(tmp_path)),
        training=SimpleNamespace(dataset="text", steps=2, global_batch_size=1, seq_len=1),
    )
    logger = _Logger(SimpleNamespace(job_config=settings), mock.Mock(), mock.Mock())
    logger.log({"validation_metrics/loss": math.nan}, 1)  # may recover
    with pytest.raises(Diverged, match="the last validation, after step 2, was nan"):
        logger.log({"validation_metrics/loss": math.nan}, 2)
    end = json.loads((tmp_path / "finished.json").read_text())
    assert end == {"step": 2, "val_loss": None, "bits_per_byte": None, "diverged": True}
    logger.log({"validation_metrics/loss": 1.5}, 2)
    assert json.loads((tmp_path / "finished.json").read_text())["val_loss"] == 1.5


def flip_a_bit(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def swap_in(newest: Path, name: str) -> None:
    shutil.copy(newest.with_name("step-1") / name, newest / name)


DAMAGES = {
    "a bit of the tensors": lambda newest: flip_a_bit(newest / "__0_0.distcp"),
    "a bit of the metadata": lambda newest: flip_a_bit(newest / ".metadata"),
    "a bit of the manifest": lambda newest: flip_a_bit(newest / "manifest.json", 0.3),
    "cut": lambda newest: (newest / "__0_0.distcp").write_bytes(b"short"),
    "gone": lambda newest: (newest / "__0_0.distcp").unlink(),
    "tensors of another step": lambda newest: swap_in(newest, "__0_0.distcp"),
    "manifest of another step": lambda newest: swap_in(newest, "manifest.json"),
    "all of another step": lambda newest: [swap_in(newest, path.name) for path in newest.with_name("step-1").iterdir()],
    "an empty list": lambda newest: (newest / "manifest.json").write_text("[]"),
    "no manifest, cut": lambda newest: [
        (newest / "manifest.json").unlink(),
        (newest / "__0_0.distcp").write_bytes(b"short"),
    ],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_checkpoint_is_passed_over_and_named(folder, tmp_path, capsys, damage):
    shutil.copytree(run_of(folder, "alone", "adamw") / "checkpoint", tmp_path / "checkpoint")
    newest = tmp_path / "checkpoint/step-2"
    assert find_step(newest.parent) == 2
    DAMAGES[damage](newest)
    capsys.readouterr()
    assert find_step(newest.parent) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and f"checkpoint {newest} is damaged and skipped" in printed
    with pytest.raises(UserError, match=r"a checkpoint must be undamaged; none in .* is"):
        find_step(newest.parent, 2)
    shutil.rmtree(newest.with_name("step-1"))
    with pytest.raises(UserError, match=r"none in .* is"):
        find_step(newest.parent)


def test_export_takes_the_newest_checkpoint_whose_sizes_match(folder, tmp_path):
    shutil.copytree(run_of(folder, "alone", "adamw") / "checkpoint", tmp_path / "checkpoint")
    assert newest_checkpoint(tmp_path).name == "step-2"
    DAMAGES["cut"](tmp_path / "checkpoint/step-2")
    assert newest_checkpoint(tmp_path).name == "step-1"


def test_resume_beside_a_damaged_checkpoint_matches_an_uninterrupted_run_and_replaces_it(folder):
    run = folder / "runs/damaged" / run_of(folder, "alone", "adamw").name
    shutil.copytree(run_of(folder, "alone", "adamw"), run)
    flip_a_bit(run / "checkpoint/step-2/__0_0.distcp")
    with pytest.raises(Damaged):
        verify_manifest(run / "checkpoint/step-2")
    with Ranks(1) as rank:
        rank(_train, quick(folder, "--job.resume", job__group="damaged", optimizer__name="adamw"))
    verify_manifest(run / "checkpoint/step-2")
    assert losses(run) == losses(run_of(folder, "alone", "adamw"))


@pytest.mark.parametrize(("several", "alone"), [("tuned", "tuned alone"), ("packed", "packed alone")])
def test_fine_tuning_losses_of_two_ranks_match_those_of_one(tuned, several, alone):
    expected, found = (losses(run_of(tuned, group, "adamw")) for group in (alone, several))
    assert expected.keys() == found.keys()
    assert found == pytest.approx(expected, abs=5e-4)  # responses of unlike lengths: no mean of means
    assert expected["val/loss", STEPS] < expected["val/loss", 0] - 0.1


def test_fine_tuning_starts_from_the_loss_that_pretraining_ended_with(tuned):
    base, run = (losses(run_of(tuned, group, "adamw")) for group in ("alone", "tuned alone"))
    assert run["val/pretrain_loss", 0] == pytest.approx(base["val/loss", STEPS], abs=1e-5)
    assert run["val/pretrain_loss", STEPS] != run["val/pretrain_loss", 0]


def test_resume_beside_an_incomplete_checkpoint_still_starts_from_the_weights(tuned):
    base = run_of(tuned, "alone", "adamw")
    run = tuned / "runs/killed" / run_of(tuned, "tuned alone", "adamw").name
    (run / "checkpoint/step-1").mkdir(parents=True)  # killed in its first save
    with Ranks(1) as rank:
        rank(_train, tuning(tuned, base, "--job.resume", job__group="killed"))
    assert losses(run) == pytest.approx(losses(run_of(tuned, "tuned alone", "adamw")), abs=1e-6)


def test_smallest_flavor_of_the_7b_config_trains_and_saves_on_four_ranks(folder):
    """bfloat16, activation checkpoints and asynchronous saving; compilation is for GPUs."""
    flags = "--model.flavor debug --compile.no-enable --training.dataset text --validation.dataset text".split()
    with Ranks(4) as ranks:
        settings = {
            "training__global_batch_size": 8,
            "training__lanes": 8,
            "validation__local_batch_size": 2,
            "optimizer__lr": 1e-2,
        }
        ranks(_train, quick(folder, *flags, ranks=4, config=PAPER, job__group="7b", **settings))
    run = run_of(folder, "7b", "olion")
    found = losses(run)
    assert found["val/loss", STEPS] < found["val/loss", 0] - 0.05
    assert {path.name for path in (run / "checkpoint").iterdir()} == {"step-1", "step-2"}


def test_resume_refuses_another_experiment_in_one_line(folder):
    run = run_of(folder, "alone", "adamw")
    same_experiment(run, quick(folder, optimizer__name="adamw", training__steps=9, lr_scheduler__total_steps=9))
    for settings in ({"training__seq_len": 16}, {"optimizer__weight_decay": 0.2}, {"lr_scheduler__warmup_steps": 2}):
        (name,) = (key.replace("__", ".") for key in settings)
        with pytest.raises(
            UserError, match=f"--job.resume needs the {name} of the checkpoint, .*; got .*; set it back"
        ):
            same_experiment(run, quick(folder, optimizer__name="adamw", **settings))


def test_diverged_run_and_missing_tokenizer_refuse_on_all_ranks_and_leave_the_run_that_is_there(folder):
    run = run_of(folder, "alone", "olion")
    before = (run / "metrics.jsonl").read_text()
    with Ranks(2) as ranks:
        for settings, error in [
            ({"model__hf_assets_path": "nowhere"}, "model.hf_assets_path must hold tokenizer.json"),
            ({"job__group": "diverged", "optimizer__lr": 1e30}, "training needs finite losses and gradients, and step"),
        ]:
            for message in ranks(_refused, quick(folder, ranks=2, **{"job__group": "alone"} | settings)):
                assert error in message
    assert (run / "metrics.jsonl").read_text() == before
    assert Diverged.exit_status == 3  # run.sh takes it for a diverged run


def _refused(settings: JobConfig) -> str:
    with pytest.raises((Diverged, UserError)) as refused:
        _train(settings)
    return str(refused.value)


def test_a_rank_refuses_a_port_that_another_program_has(monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = str(server.getsockname()[1])
        there = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        for name, value in there.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"port, 127.0.0.1:{port}, must be free"):
            main()
