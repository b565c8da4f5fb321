"""Each example trains: its loss falls. Examples of one process run in this one, the others under torchrun."""

import importlib.util
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch

from optimizers import AdamW, OLion, roles_of
from tests import warm

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def launched(module, *arguments, ranks=2):
    """The output of a module under torchrun."""
    command = [warm.python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
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


def test_the_learning_rate_monitor_of_lightning_matches_the_schedule_in_every_group(tmp_path):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.loggers import CSVLogger

    from examples.lightning_module import Student

    steps, monitor = 4, LearningRateMonitor(logging_interval="step", log_momentum=True)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        callbacks=[monitor],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.TensorDataset(torch.randn(4 * steps, 32), torch.randn(4 * steps, 8))
    trainer.fit(Student(steps), torch.utils.data.DataLoader(data, batch_size=4))
    cosine = [1e-2 * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    rates = {name: rate for name, rate in monitor.lrs.items() if "momentum" not in name}
    assert len(rates) == len(trainer.optimizers[0].param_groups) > 1
    assert all(rate == pytest.approx(cosine) for rate in rates.values())


@pytest.mark.parametrize("optimizer_class", [OLion, AdamW])
def test_the_trainer_builds_the_class_that_it_is_given(optimizer_class, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    data = [{"input_ids": row, "labels": row} for row in torch.arange(8 * 8).view(8, 8) * 7 % 32]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no"
    )

    def trained(options: dict | None) -> transformers.Trainer:
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        if optimizer_class is OLion:  # the Trainer hands a class every tensor, and this one takes matrices
            for name, role in roles_of(model).items():
                model.get_parameter(name).requires_grad_(role == "matrix")
        if options:
            given = {"optimizer_cls_and_kwargs": (optimizer_class, options)}
        else:  # TrainingArguments.weight_decay is 0
            params = [param for param in model.parameters() if param.requires_grad]
            given = {"optimizers": (optimizer_class(params, lr=1e-2, weight_decay=0.0), None)}
        trainer = transformers.Trainer(model, arguments, train_dataset=data, **given)
        trainer.train()
        return trainer

    built, ready = trained({"lr": 1e-2}), trained(None)
    assert type(built.optimizer.optimizer) is optimizer_class
    for got, expected in zip(built.model.parameters(), ready.model.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # rounding of other stacks


def test_convnet_example_reads_digits():
    from examples import convnet

    assert convnet.train("olion", lr=1e-2, epochs=2) > 0.9  # of ten classes


def test_lora_example_learns_by_each_optimizer():
    pytest.importorskip("peft")
    from examples import lora

    losses = lora.main(steps=40)
    assert all(loss < losses["none"] - 0.1 for name, loss in losses.items() if name != "none")  # nats per byte


def test_every_example_has_a_test_and_a_command():
    tests = Path(__file__).read_text()
    for path in (ROOT / "examples").glob("[!_]*.py"):
        assert f"examples import {path.stem}" in tests or f"examples.{path.stem}" in tests, path.name
        assert f"examples.{path.stem}" in path.read_text(), path.name
        assert importlib.util.find_spec(f"examples.{path.stem}"), path.name
