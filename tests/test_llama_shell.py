"""Llama/run.sh as a new user runs it: in a fresh checkout, without prepared data."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from checkouts import copy_checkout

from tests import warm

ROOT = Path(__file__).resolve().parents[1]
QUICK = (
    "--training.steps",
    "2",
    "--lr_scheduler.warmup_steps",
    "1",
    "--training.seq_len",
    "32",
    "--validation.windows",
    "8",
    "--metrics.wandb",
    "disabled",
)


@pytest.fixture
def checkout(tmp_path) -> Path:
    return copy_checkout(tmp_path, "common", "Llama", "optimizers", "scripts")


def bash(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    settings = os.environ | {"PYTHON": warm.python(), "WANDB_MODE": "disabled", **environment}
    return subprocess.run(["bash", *command], cwd="/", env=settings, capture_output=True, text=True)


def test_run_script_prepares_trains_on_two_ranks_and_draws_from_any_folder(checkout):
    done = bash(checkout, str(checkout / "Llama/run.sh"), *QUICK, OPTIMIZERS="olion", LR="2e-3", SEED="3", NGPU="2")
    assert done.returncode == 0, done.stderr
    (run,) = (path for path in (checkout / "runs/llama/stdlib").iterdir() if path.is_dir())
    assert run.name == "olion-lr2e-3-adamw8e-3-s3"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 2]
    assert "| OLion " in done.stdout
    assert (checkout / "runs/llama/stdlib/curves.png").stat().st_size > 10_000
    assert not (checkout / "images").exists()  # git tracks it


def test_script_of_the_7b_run_starts_its_config_on_all_gpus_and_stops_if_that_is_refused(checkout):
    """With an interpreter that only records its arguments, and fails where the test asks for it."""
    python = checkout / "python"
    python.write_text(
        f'#!/bin/sh\necho "$WORLD_SIZE $*" >> {checkout}/asked\ncase "$*" in *"$REFUSED"*) exit 1 ;; esac\n'
    )
    python.chmod(0o755)
    script = str(checkout / "Llama/run_llama_2_7b.sh")
    environment = {"PYTHON": str(python), "NGPU": "8", "OMP_NUM_THREADS": "1"}
    done = bash(checkout, script, "--training.steps", "9", REFUSED="nothing", **environment)
    assert done.returncode == 0, done.stderr
    *_, prepare, train, draw = (checkout / "asked").read_text().splitlines()
    config = "Llama/train_configs/llama2_7b.toml"
    assert prepare == f"8 -m Llama.prepare {config} --training.steps 9 --job.group llama2_7b"
    assert "-m common.torchrun --nproc-per-node 8 --nnodes 1 " in train
    assert train.endswith(f"-m Llama.train {config} --optimizer.name olion --training.steps 9 --job.group llama2_7b")
    assert draw.endswith(
        "-m scripts.figures runs/llama/llama2_7b --out runs/llama/llama2_7b/curves.png --metric val/loss"
    )
    nodes = {"NNODES": "4", "NODE_RANK": "1", "RDZV_ENDPOINT": "host0:29500", "REFUSED": "nothing"}
    replicate = "--parallelism.data_parallel_replicate_degree"
    for flags, degree in [((), "4"), ((replicate, "1"), "1")]:  # HSDP, a replica per node, by default
        assert bash(checkout, script, *flags, **environment, **nodes).returncode == 0
        train = (checkout / "asked").read_text().splitlines()[-1]
        assert "--nnodes 4 " in train and f"olion {replicate} {degree} --job.group" in train
    done = bash(checkout, script, REFUSED="Llama.prepare", **environment)
    assert done.returncode == 1
    assert "-m Llama.prepare" in (checkout / "asked").read_text().splitlines()[-1]


def test_script_of_fine_tuning_pretrains_once_and_starts_from_that_run(checkout):
    """With an interpreter that records its arguments, and leaves a finished run in place of training."""
    python = checkout / "python"
    base = checkout / "runs/llama/sft_base/adamw-lr1e-3-s1"
    python.write_text(
        f'#!/bin/sh\necho "$*" >> {checkout}/asked\ncase "$*" in *Llama.train*sft_base*)\n'
        f"  mkdir -p {base}; echo > {base}/finished.json ;;\nesac\n"
    )
    python.chmod(0o755)
    script = str(checkout / "Llama/run_sft.sh")
    environment = {"PYTHON": str(python), "NGPU": "2", "OMP_NUM_THREADS": "1", "OPTIMIZERS": "muon"}
    tuned = "Llama/train_configs/sft_arithmetic.toml --optimizer.name muon --checkpoint.initial_load_path "
    for attempt, base_runs in enumerate((1, 1)):
        done = bash(checkout, script, "--training.steps", "9", **environment)
        assert done.returncode == 0, done.stderr
        asked = (checkout / "asked").read_text().splitlines()
        assert (
            sum("Llama.train " in line and "stdlib.toml --optimizer.name adamw" in line for line in asked) == base_runs
        )
        assert (
            sum(tuned + "runs/llama/sft_base/adamw-lr1e-3-s1 --training.steps 9" in line for line in asked)
            == attempt + 1
        )
    assert asked[-1].endswith("--metric val/loss val/exact_match val/pretrain_loss")
    bash(checkout, script, BASE="weights", **environment)
    assert tuned + "weights --job.group sft_arithmetic" in (checkout / "asked").read_text()


def test_torchrun_matches_the_exit_status_of_the_rank_that_failed(checkout):
    torchrun = [warm.python(), "-m", "common.torchrun", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run([*torchrun, "sh", "-c", "exit 3"], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 3  # run.sh takes it for a diverged run
    assert "Traceback" not in done.stderr


def test_qwen_script_sweeps_adamw_muon_and_muon_with_each_rate_of_polarsgdm(checkout):
    """With an interpreter that only writes down what it is asked."""
    python = checkout / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> {checkout}/asked\n')
    python.chmod(0o755)
    given = {"PYTHON": str(python), "SEEDS": "1 2", "LRS": "4e-3", "REST_LRS": "2e-3 8e-3", "OUT": "out.json"}
    done = bash(checkout, str(checkout / "Llama/run_qwen.sh"), "training.steps=9", **given)
    assert done.returncode == 0, done.stderr
    config = "Llama/train_configs/qwen_stdlib.toml"
    *_, prepare, plain, first, second = (checkout / "asked").read_text().splitlines()
    assert prepare == f"-m Llama.prepare {config}"
    start = f"-m scripts.sweep {config} --module Llama.train --optimizers"
    common = "--lrs 4e-3 --seeds 1 2 --jobs 1 --out out.json --set"
    assert plain == f"{start} adamw muon {common} training.steps=9"
    for line, rate in ((first, "2e-3"), (second, "8e-3")):
        assert line == f"{start} muon {common} optimizer.rest=polarsgdm optimizer.rest_lr={rate} training.steps=9"
