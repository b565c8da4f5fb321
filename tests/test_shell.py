"""The shell scripts, as a new user runs them: in a fresh checkout, without prepared data."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkouts import copy_checkout

from tests import warm

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("common", "nanoGPT", "optimizers", "scripts")
QUICK = ("--steps", "2", "--eval.windows", "4", "--data.batch_size", "2", "--wandb", "disabled")


@pytest.fixture
def checkout(tmp_path) -> Path:
    return copy_checkout(tmp_path, *FOLDERS)


def bash(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    settings = os.environ | {"PYTHON": warm.python(), **environment}
    return subprocess.run(["bash", *command], cwd="/", env=settings, capture_output=True, text=True)


def test_run_script_trains_each_optimizer_and_draws_beside_the_runs_from_any_folder(checkout):
    done = bash(checkout, str(checkout / "nanoGPT/run.sh"), *QUICK, OPTIMIZERS="olion adamw", LR="2e-3", SEED="3")
    assert done.returncode == 0, done.stderr
    group = checkout / "runs/nanogpt/stdlib"
    runs = {path.name for path in group.iterdir() if path.is_dir()}
    assert len(runs) == 2 and all("-lr2e-3-" in run and run.endswith("-s3") for run in runs)
    assert "| OLion " in done.stdout and "| AdamW " in done.stdout
    assert (group / "curves.png").stat().st_size > 10_000 and (group / "curves.json").exists()
    assert not (checkout / "images").exists()  # git tracks it
    *_, picture, folder = done.stdout.splitlines()
    assert "runs/nanogpt/stdlib/curves.png" in picture and folder == "runs: runs/nanogpt/stdlib"
    first, second = (line for line in done.stderr.splitlines() if line.startswith("optimizer "))
    assert first == "optimizer 1 of 2: olion"
    assert re.fullmatch(r"optimizer 2 of 2: adamw; all done at about \d\d:\d\d, in \d+ min", second)


@pytest.fixture
def recorder(checkout) -> Path:
    """An interpreter that only records its arguments."""
    python = checkout / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> {checkout}/asked\n')
    python.chmod(0o755)
    return python


def test_run_script_writes_into_images_if_asked(checkout, recorder):
    done = bash(checkout, str(checkout / "nanoGPT/run.sh"), "--publish", "--steps", "9", PYTHON=str(recorder), NGPU="1")
    assert done.returncode == 0, done.stderr
    *_, train, draw = (checkout / "asked").read_text().splitlines()
    assert train.endswith("--optimizer.name adamw --steps 9 --group stdlib")
    assert draw == "-m scripts.figures runs/nanogpt/stdlib --out images/nanogpt_stdlib.png"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"NGPU": "x[$(touch executed)]"}, "NGPU must be a whole number, 1 or more; got 'x[$(touch executed)]'"),
        ({"NNODES": "x[$(touch executed)]"}, "NNODES must be a whole number, 1 or more; got 'x[$(touch executed)]'"),
        ({"NODE_RANK": "x[$(touch executed)]"}, "NODE_RANK must be a whole number, 0 or more; got"),
        ({"NGPU": "abc"}, "NGPU must be a whole number, 1 or more; got 'abc'"),
        ({"NGPU": "0"}, "NGPU must be a whole number, 1 or more; got '0'"),
        ({"NGPU": "08"}, "NGPU must be a whole number, 1 or more; got '08'"),
        ({"NGPU": "-1"}, "NGPU must be a whole number, 1 or more; got '-1'"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK must be below NNODES=2; got 2"),
        ({"NNODES": "2"}, "NNODES=2 needs one RDZV_ENDPOINT=host:port on all nodes"),
        ({"OPTIMIZERS": " "}, "OPTIMIZERS must name at least one optimizer; got ' '"),
    ],
)
@pytest.mark.parametrize("experiment", ["nanoGPT", "SIT", "Llama"])
def test_run_script_refuses_a_knob_in_one_line_and_executes_nothing(tmp_path, experiment, knobs, message):
    done = bash(ROOT, str(ROOT / experiment / "run.sh"), PYTHON="/bin/false", **knobs)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (ROOT / "executed").exists()


def test_run_script_takes_a_star_for_the_name_of_an_optimizer_and_of_no_file(checkout, recorder):
    knobs = {"OPTIMIZERS": "* olion\nmuon", "PYTHON": str(recorder), "NGPU": "1"}
    done = bash(checkout, str(checkout / "nanoGPT/run.sh"), **knobs)
    assert done.returncode == 0, done.stderr
    asked = (checkout / "asked").read_text().splitlines()
    names = [line.split("--optimizer.name ")[1].split()[0] for line in asked if "nanoGPT.train" in line]
    assert names == ["*", "olion", "muon"]


def test_run_script_stops_at_the_first_failure(checkout):
    done = bash(checkout, str(checkout / "nanoGPT/run.sh"), *QUICK, OPTIMIZERS="lion olio muon", NGPU="1")
    assert done.returncode != 0
    assert "did you mean 'olion'?" in done.stderr
    (run,) = (checkout / "runs/nanogpt/stdlib").iterdir()
    assert run.name.startswith("lion")


def test_run_script_passes_sigterm_on_and_leaves_after_the_checkpoint(checkout):
    command = ["bash", str(checkout / "nanoGPT/run.sh"), "--wandb", "disabled", "--eval.windows", "4"]
    environment = os.environ | {"PYTHON": warm.python(), "OPTIMIZERS": "olion muon"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    metrics = "runs/nanogpt/stdlib/*/metrics.jsonl"
    while process.poll() is None and not any(path.read_text().count("\n") > 1 for path in checkout.glob(metrics)):
        time.sleep(0.05)
    process.terminate()
    printed, _ = process.communicate()
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
        assert done.stderr.splitlines()[-1].startswith(f"error: PYTHON={python} needs the packages of requirements.txt")


def test_setup_refuses_an_interpreter_without_the_requirements(checkout):
    done = bash(checkout, str(checkout / "scripts/setup.sh"), PYTHON="/bin/false")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: PYTHON=/bin/false needs the packages of requirements.txt")
