"""Each example trains: its loss falls. They are run as a user would run them, in this process where they need one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def launched(module, *arguments, ranks=2):
    """What a module prints under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, module, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ends(printed):
    """The losses of the line "loss A -> B"."""
    (line,) = [line for line in printed.splitlines() if line.startswith("loss ")]
    first, last = line.removeprefix("loss ").split(" -> ")
    return float(first), float(last)


def test_ddp_example_learns_and_shares_the_matrices_among_two_ranks():
    printed = launched("examples.ddp")
    first, last = ends(printed)
    assert last < first / 2
    owners = [line.split()[4] for line in printed.splitlines() if "replicated" in line]
    assert sorted(owners) == ["0", "1"]


def test_trainer_example_learns():
    from examples import huggingface_trainer

    losses = huggingface_trainer.main(steps=30)
    assert losses[-1] < losses[0] - 0.5  # nats per byte


def test_accelerate_example_learns_on_one_process():
    from examples import accelerate_loop

    losses = accelerate_loop.main()
    assert losses[-1] < losses[0] / 2


def test_accelerate_example_learns_on_two_ranks():
    first, last = ends(launched("examples.accelerate_loop"))
    assert last < first / 2


def test_lightning_example_learns():
    pytest.importorskip("lightning")
    from examples import lightning_module

    losses = lightning_module.main(steps=40)
    assert losses[-1] < losses[0] / 2


def test_convnet_example_reads_digits():
    from examples import convnet

    assert convnet.train("olion", lr=1e-2, epochs=2) > 0.9  # of ten classes


def test_lora_example_learns_by_each_optimizer():
    pytest.importorskip("peft")
    from examples import lora

    losses = lora.main(steps=40)
    assert all(loss < losses["none"] - 0.1 for name, loss in losses.items() if name != "none")  # nats per byte


def test_every_example_has_a_test_and_says_how_to_run_it():
    tests = Path(__file__).read_text()
    for path in (ROOT / "examples").glob("[!_]*.py"):
        assert f"examples import {path.stem}" in tests or f"examples.{path.stem}" in tests, path.name
        assert f"examples.{path.stem}" in path.read_text(), path.name
        assert importlib.util.find_spec(f"examples.{path.stem}"), path.name
