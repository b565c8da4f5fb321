"""Llama through torchtitan: the same losses on every layout of ranks, and across a kill and a resume."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from common import UserError
from Llama.config import JobConfig, parse_config
from Llama.metrics import Diverged, name_of
from Llama.model import FLAVORS
from Llama.prepare import Prepare, prepare
from Llama.train import same_experiment, titan, train
from tests.ranks import Ranks

ROOT = Path(__file__).resolve().parents[1]
STDLIB = str(ROOT / "Llama/train_configs/stdlib.toml")
STEPS = 2
# AdamW's step is elementwise: what is left is the order of sums in the model. OLion takes signs of a quintic in it,
# of which a few of 10,000 flip with the rounding, each by the whole step. torch's norm of one large float32 tensor is
# off by 2e-4 on CPUs, which shards of it are not.
OPTIMIZERS = {"adamw": 1e-4, "olion": 5e-3}
LAYOUTS = {  # of four ranks
    "fsdp": {},
    "hsdp": {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2},
    "tp": {"tensor_parallel_degree": 4},
    "fsdp x tp": {"tensor_parallel_degree": 2},
    "ddp": {"data_parallel_replicate_degree": 4, "data_parallel_shard_degree": 1},
}
# The first step's loss and gradient know of no optimizer: they are compared tightly on every layout.
CASES = [("olion", layout) for layout in LAYOUTS] + [("adamw", layout) for layout in ("fsdp", "ddp")]
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


def quick(folder: Path, *more: str, ranks: int = 1, **settings) -> JobConfig:
    """A quick run in `folder`; settings are torchtitan's, section__key, read once, not by every rank."""
    values = QUICK | {"job.dump_folder": "runs"} | {key.replace("__", "."): value for key, value in settings.items()}
    for key in ("model.hf_assets_path", "training.dataset_path", "validation.dataset_path", "job.dump_folder"):
        values[key] = folder / values[key]
    flags = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    with mock.patch.dict(os.environ, WORLD_SIZE=str(ranks)):
        return parse_config([STDLIB, *flags, *more])


def losses(folder: Path) -> dict[tuple[str, int], float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    keys = ("train/loss", "val/loss", "grad_norm")
    return {(key, line["step"]): line[key] for line in lines for key in keys if key in line}


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
    """What Llama.train's main does, on a rank of tests/ranks.py, with half the layers."""
    rank = str(torch.distributed.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(torch.distributed.get_world_size())}
    titan.time.sleep = lambda seconds: None  # torchtitan's rank 0 waits at the end of each run
    FLAVORS["debug"].n_layers = 2
    folder = Path(settings.job.dump_folder, settings.job.group, name_of(settings))
    if settings.job.resume:
        same_experiment(folder, settings)
    train(replace(settings, job=replace(settings.job, dump_folder=str(folder))))


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


def test_resume_on_one_rank_of_a_run_of_four_matches_an_uninterrupted_run(folder):
    run = folder / "runs/resumed" / run_of(folder, "fsdp", "adamw").name
    shutil.copytree(run_of(folder, "fsdp", "adamw"), run)
    shutil.rmtree(run / f"checkpoint/step-{STEPS}")  # as if it had been killed before its end
    with Ranks(1) as rank:
        rank(_train, quick(folder, "--job.resume", job__group="resumed", optimizer__name="adamw"))
    assert (run / f"checkpoint/step-{STEPS}").exists()
    expected, found = losses(run_of(folder, "alone", "adamw")), losses(run)
    assert found == pytest.approx(expected, abs=5e-4)


def test_resume_refuses_another_experiment_in_one_line(folder):
    run = run_of(folder, "alone", "adamw")
    same_experiment(run, quick(folder, optimizer__name="adamw", training__steps=9))
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
            ({"model__hf_assets_path": "nowhere"}, "Tokenizer path"),
            ({"job__group": "diverged", "optimizer__lr": 1e30}, "training needs finite losses and gradients, and step"),
        ]:
            for said in ranks(_refused, quick(folder, ranks=2, **{"job__group": "alone"} | settings)):
                assert error in said
    assert (run / "metrics.jsonl").read_text() == before
    assert Diverged.exit_status == 3  # which run.sh knows


def _refused(settings: JobConfig) -> str:
    with pytest.raises((Diverged, FileNotFoundError)) as refused:
        _train(settings)
    return str(refused.value)
