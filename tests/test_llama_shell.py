"""Llama/run.sh as a new user runs it: in a checkout of its own, without anything prepared."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
QUICK = (
    "--training.steps",
    "2",
    "--training.seq_len",
    "32",
    "--validation.windows",
    "8",
    "--metrics.wandb",
    "disabled",
)


@pytest.fixture
def checkout(tmp_path) -> Path:
    for folder in ("common", "Llama", "optimizers", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    return tmp_path


def bash(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    settings = os.environ | {"PYTHON": sys.executable, "WANDB_MODE": "disabled", **environment}
    return subprocess.run(["bash", *command], cwd="/", env=settings, capture_output=True, text=True, timeout=300)


def test_run_script_prepares_trains_on_two_ranks_and_draws_from_any_folder(checkout):
    done = bash(checkout, str(checkout / "Llama/run.sh"), *QUICK, OPTIMIZERS="olion", LR="2e-3", SEED="3", NGPU="2")
    assert done.returncode == 0, done.stderr
    (run,) = (checkout / "runs/llama/stdlib").iterdir()
    assert run.name == "olion-lr2e-3-adamw8e-3-s3"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 2]
    assert "| OLion " in done.stdout
    assert (checkout / "images/llama_stdlib.png").stat().st_size > 10_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without GPUs")
def test_script_of_the_7b_run_without_gpus_refuses_with_the_small_command(checkout):
    done = bash(checkout, str(checkout / "Llama/run_llama_2_7b.sh"), NGPU="8")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: Llama-2 7B needs about 81 GB")
    assert done.stderr.endswith("or run the small one, bash Llama/run.sh\n")
    assert not (checkout / "runs").exists()
