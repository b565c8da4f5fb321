"""Llama through torchtitan: the same losses on every layout of ranks, and across a kill and a resume."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common import UserError
from Llama.config import parse_config
from Llama.metrics import name_of
from Llama.prepare import Prepare, prepare
from Llama.train import same_experiment, titan, train

ROOT = Path(__file__).resolve().parents[1]
STDLIB = str(ROOT / "Llama/train_configs/stdlib.toml")
STEPS = 4
# AdamW's step is elementwise: what is left is the order of sums in the model. OLion takes signs of a quintic in it,
# of which a few of 10,000 flip with the rounding, each by the whole step. torch's norm of one large float32 tensor is
# off by 2e-4 on CPUs, which shards of it are not.
OPTIMIZERS = {"adamw": 1e-4, "olion": 5e-3}
LAYOUTS = {
    "fsdp": {},
    "hsdp": {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2},
    "tp": {"tensor_parallel_degree": 4},
    "fsdp x tp": {"tensor_parallel_degree": 2},
    "ddp": {"data_parallel_replicate_degree": 4, "data_parallel_shard_degree": 1},
}
QUICK = {
    "model.hf_assets_path": "corpus",
    "training.dataset_path": "corpus",
    "training.steps": STEPS,
    "training.seq_len": 32,
    "training.local_batch_size": 1,
    "validation.dataset_path": "corpus",
    "validation.windows": 8,
    "validation.freq": 2,
    "metrics.log_freq": 1,
    "metrics.wandb": "disabled",
    "lr_scheduler.warmup_steps": 2,
    "lr_scheduler.total_steps": STEPS,
    "job.group": "test",
    "checkpoint.interval": 2,
}
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compares gloo ranks; torchtitan would take the GPUs")


def flags(folder: Path, **settings) -> list[str]:
    """A quick run in `folder`; settings are torchtitan's, section__key."""
    quick = QUICK | {"job.dump_folder": "runs"} | {key.replace("__", "."): value for key, value in settings.items()}
    for key in ("model.hf_assets_path", "training.dataset_path", "validation.dataset_path", "job.dump_folder"):
        quick[key] = folder / quick[key]
    return [STDLIB, *(word for key, value in quick.items() for word in (f"--{key}", str(value)))]


def losses(folder: Path) -> dict[tuple[str, int], float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    keys = ("train/loss", "val/loss", "grad_norm")
    return {(key, line["step"]): line[key] for line in lines for key in keys if key in line}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus, and the runs of every layout on four ranks, of one rank, and of two that were stopped."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "source").mkdir()
    for path in sorted((ROOT / "optimizers").glob("*.py")):
        (folder / "source" / path.name).write_text(path.read_text())
    prepare(Prepare(str(folder / "source"), folder / "corpus", vocab_size=400, val_fraction=0.2))
    mp.spawn(_train_layouts, (4, folder, LAYOUTS), nprocs=4)
    mp.spawn(_train_layouts, (1, folder, {"alone": {}}), nprocs=1)
    return folder


def _train_layouts(rank: int, ranks: int, folder: Path, layouts: dict) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    titan.time.sleep = lambda seconds: None  # torchtitan's rank 0 waits at the end of each run
    for name in OPTIMIZERS:
        for layout, degrees in layouts.items():
            options = {f"parallelism__{key}": value for key, value in degrees.items()}
            settings = parse_config(flags(folder, optimizer__name=name, checkpoint__interval=1000, **options))
            run = str(folder / "runs" / layout / name_of(settings))
            checkpoint = replace(settings.checkpoint, enable=False)
            train(replace(settings, job=replace(settings.job, dump_folder=run), checkpoint=checkpoint))
    dist.destroy_process_group()


def run_of(folder: Path, group: str, optimizer: str) -> Path:
    (run,) = (folder / "runs" / group).glob(f"{optimizer}-*")
    return run


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_of_four_ranks_match_those_of_one(folder, layout, optimizer):
    alone, several = (losses(run_of(folder, group, optimizer)) for group in ("alone", layout))
    assert alone.keys() == several.keys()
    assert len(alone) == 2 * STEPS + 3  # and three validations, the first before the first step
    for key, loss in alone.items():
        tolerance = max(OPTIMIZERS[optimizer], 5e-4 if key[0] == "grad_norm" else 0)
        assert several[key] == pytest.approx(loss, abs=tolerance), key
    assert alone["val/loss", STEPS] < alone["val/loss", 0] - 0.1  # it learns


def launch(folder: Path, ranks: int, *more: str, **settings) -> subprocess.CompletedProcess:
    torchrun = ["-m", "common.torchrun", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "Llama.train", *flags(folder, **settings), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_resume_on_one_rank_of_a_run_of_two_matches_an_uninterrupted_run(folder):
    first = launch(folder, 2, optimizer__name="adamw", training__steps=2)
    assert first.returncode == 0, first.stderr
    resumed = launch(folder, 1, "--job.resume", optimizer__name="adamw")
    assert resumed.returncode == 0, resumed.stderr
    expected, found = losses(run_of(folder, "alone", "adamw")), losses(run_of(folder, "test", "adamw"))
    assert found == pytest.approx(expected, abs=5e-4)


def test_resume_refuses_another_experiment_in_one_line(folder):
    run = run_of(folder, "alone", "adamw")
    same_experiment(run, parse_config(flags(folder, optimizer__name="adamw", training__steps=9)))
    for settings in ({"training__seq_len": 16}, {"optimizer__weight_decay": 0.2}, {"lr_scheduler__warmup_steps": 1}):
        (name,) = (key.replace("__", ".") for key in settings)
        with pytest.raises(
            UserError, match=f"--job.resume needs the {name} of the checkpoint, .*; got .*; set it back"
        ):
            same_experiment(run, parse_config(flags(folder, optimizer__name="adamw", **settings)))


def test_diverged_run_ends_with_its_own_status_and_one_line(folder):
    done = launch(folder, 2, job__group="diverged", optimizer__name="lion", optimizer__lr=1e30, validation__windows=2)
    assert done.returncode == 3
    assert "error: training needs finite losses and gradients, and step 2 had" in done.stderr
    assert "Traceback" not in done.stderr


def test_figures_match_the_keys_of_a_run(folder):
    command = [
        sys.executable,
        "-m",
        "scripts.figures",
        str(run_of(folder, "alone", "olion")),
        "--out",
        str(folder / "f"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| OLion " in done.stdout and "–" not in done.stdout  # every column of the table is there


def test_missing_tokenizer_refuses_in_one_line_and_leaves_the_run_that_is_there(folder):
    run = run_of(folder, "alone", "olion")
    before = (run / "metrics.jsonl").read_text()
    done = launch(folder, 1, job__group="alone", model__hf_assets_path="nowhere")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: Tokenizer path")
    assert (run / "metrics.jsonl").read_text() == before
