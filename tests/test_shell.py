"""The shell scripts, as a new user runs them: in a checkout of their own, without anything prepared."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkouts import copy_checkout

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("common", "nanoGPT", "optimizers", "scripts")
QUICK = ("--steps", "2", "--eval.windows", "4", "--data.batch_size", "2", "--wandb", "disabled")


@pytest.fixture
def checkout(tmp_path) -> Path:
    return copy_checkout(tmp_path, *FOLDERS)


def bash(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    settings = os.environ | {"PYTHON": sys.executable, **environment}
    return subprocess.run(["bash", *command], cwd="/", env=settings, capture_output=True, text=True, timeout=300)


def test_run_script_trains_each_optimizer_and_draws_from_any_folder(checkout):
    done = bash(checkout, str(checkout / "nanoGPT/run.sh"), *QUICK, OPTIMIZERS="olion adamw", LR="2e-3", SEED="3")
    assert done.returncode == 0, done.stderr
    runs = {path.name for path in (checkout / "runs/nanogpt/stdlib").iterdir()}
    assert len(runs) == 2 and all("-lr2e-3-" in run and run.endswith("-s3") for run in runs)
    assert "| OLion " in done.stdout and "| AdamW " in done.stdout
    assert (checkout / "images/nanogpt_stdlib.png").stat().st_size > 10_000
    assert (checkout / "images/nanogpt_stdlib.json").exists()


def test_run_script_starts_one_process_a_rank_and_stops_at_the_first_failure(checkout):
    done = bash(checkout, str(checkout / "nanoGPT/run.sh"), *QUICK, OPTIMIZERS="lion olio muon", NGPU="2")
    assert done.returncode != 0
    assert "did you mean 'olion'?" in done.stderr
    (run,) = (checkout / "runs/nanogpt/stdlib").iterdir()
    assert run.name.startswith("lion")


def test_run_script_passes_sigterm_on_and_leaves_after_the_checkpoint(checkout):
    command = ["bash", str(checkout / "nanoGPT/run.sh"), "--wandb", "disabled", "--eval.windows", "4"]
    environment = os.environ | {"PYTHON": sys.executable, "OPTIMIZERS": "olion muon"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    metrics = "runs/nanogpt/stdlib/*/metrics.jsonl"
    while process.poll() is None and not any(path.read_text().count("\n") > 1 for path in checkout.glob(metrics)):
        time.sleep(0.05)
    process.terminate()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "--resume continues" in printed
    (run,) = (checkout / "runs/nanogpt/stdlib").iterdir()
    assert list(run.glob("checkpoints/step-*"))


@pytest.mark.parametrize("experiment", ["nanoGPT", "SIT", "Llama"])
def test_run_script_refuses_a_config_that_is_not_there_in_one_line(experiment):
    done = bash(ROOT, str(ROOT / experiment / "run.sh"), "absent.toml")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: config file not found: absent.toml (from {ROOT}); name an existing TOML file"
    ]


@pytest.mark.parametrize("package", ["diffusers", "PIL", "sklearn", "none"])
def test_setup_refuses_an_interpreter_without_a_package_that_an_experiment_needs(checkout, package):
    """With an interpreter that finds all packages but one."""
    python = checkout / "python"
    hide = f"import importlib.util as u; find = u.find_spec; u.find_spec = lambda n: n != '{package}' and find(n)"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{hide}\n$2"\n')
    python.chmod(0o755)
    done = bash(checkout, str(checkout / "scripts/setup.sh"), PYTHON=str(python))
    if package == "none":
        assert (done.returncode, done.stdout) == (0, f"{python}\n"), done.stderr
    else:
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(f"error: PYTHON={python} must have what requirements.txt lists")


def test_setup_refuses_an_interpreter_without_the_requirements(checkout):
    done = bash(checkout, str(checkout / "scripts/setup.sh"), PYTHON="/bin/false")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: PYTHON=/bin/false must have what requirements.txt lists")
