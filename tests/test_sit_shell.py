"""SIT as a new user runs it: run.sh in a fresh checkout, and the path from a folder of images to samples."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from checkouts import copy_checkout
from PIL import Image
from tiny_sit import DINOV2, tiny_dinov2, tiny_vae
from tiny_sit_run import ONE, ROOT

from common.config import parse_config
from SIT import train as training
from SIT.convert import convert
from SIT.encode import encode
from SIT.prepare import Convert, Encode
from SIT.sample import Options
from SIT.sampling import sample
from SIT.train import Config
from tests import warm

TINY = ("--model.depth", "2", "--model.width", "16", "--model.n_head", "2", "--model.projector_width", "16")
QUICK = (*TINY, "--steps", "2", "--data.batch_size", "4", "--eval.images", "8", "--eval.preview_steps", "2")


@pytest.fixture
def checkout(tmp_path) -> Path:
    return copy_checkout(tmp_path, "common", "optimizers", "scripts", "SIT")


def run_script(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    settings = os.environ | {"PYTHON": warm.python(), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", **environment}
    command = ["bash", str(checkout / "SIT/run.sh"), *arguments]
    return subprocess.run(command, cwd="/", env=settings, capture_output=True, text=True)


def test_run_script_prepares_trains_measures_and_draws_from_any_folder(checkout):
    networks = checkout / "SIT/digits.py"
    recipe = networks.read_text()
    assert "LABEL_SMOOTHING = 400, 128" in recipe
    networks.write_text(recipe.replace("LABEL_SMOOTHING = 400, 128", "LABEL_SMOOTHING = 20, 32"))  # steps, batch size
    done = run_script(checkout, *QUICK, OPTIMIZERS="olion", LR="2e-3", SEED="3")
    assert done.returncode == 0, done.stderr
    group = checkout / "runs/sit/digits"
    runs = sorted(path.name for path in group.iterdir() if path.is_dir())
    assert runs == ["olion-lr2e-3-s3"]
    lines = (group / runs[0] / "metrics.jsonl").read_text().splitlines()
    assert [line["step"] for line in map(json.loads, lines) if "val/loss" in line] == [0, 2]
    for table in ("| optimizer | learning rate |", "| optimizer         | runs"):
        assert done.stdout.count(table) == 1
    assert done.stdout.count("| OLion ") == 2
    for name in ("curves", "samples"):
        assert (group / f"{name}.png").stat().st_size > 10_000 and (group / f"{name}.json").exists()
    assert not (checkout / "images").exists()  # git tracks it


def test_run_script_of_the_imagenet_config_trains_on_all_ranks_and_measures_no_digits(checkout):
    """With an interpreter that only records its arguments."""
    python = checkout / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> {checkout}/asked\n')
    python.chmod(0o755)
    config = "SIT/configs/sit_b2_imagenet.toml"
    done = run_script(
        checkout, config, "--steps", "9", PYTHON=str(python), NGPU="8", PARALLEL="fsdp", OPTIMIZERS="muon"
    )
    assert done.returncode == 0, done.stderr
    *_, prepare, train, draw, measure = (checkout / "asked").read_text().splitlines()
    assert prepare == f"-m SIT.prepare {config} --steps 9 --group sit_b2_imagenet --parallel.mode fsdp"
    assert "-m common.torchrun --nproc-per-node 8 --nnodes 1 " in train
    flags = "--optimizer.name muon --steps 9 --group sit_b2_imagenet --parallel.mode fsdp"
    assert train.endswith(f"-m SIT.train {config} {flags}")
    assert draw.startswith("-m scripts.figures runs/sit/sit_b2_imagenet ")
    assert measure.startswith("-m SIT.evaluate runs/sit/sit_b2_imagenet --skip-latents ")


def test_run_script_refuses_unknown_arguments_in_one_line(checkout):
    done = run_script(checkout, "--group", "other")
    assert done.returncode == 1 and done.stderr.startswith("error: figures are of runs/sit/GROUP; set GROUP")


def write_images(folder: Path) -> None:
    """Ten images of colours and stripes in each of 4 classes."""
    random = np.random.default_rng(0)
    for number in range(40):
        pixels = np.zeros((70, 66 + number % 3, 3), dtype=np.uint8) + random.integers(256, size=3, dtype=np.uint8)
        pixels[:: number % 4 + 2] = 255
        path = folder / f"class{number % 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def test_folder_of_images_becomes_samples_by_the_imagenet_path(tmp_path):
    """Patches, tokens and latents are SiT-B/2's; the rest is small, for a step of less than a second."""
    write_images(tmp_path / "source")
    data, vae, encoder = tmp_path / "data", tmp_path / "vae", tmp_path / "dinov2"
    tiny_vae(latent_channels=4).autoencoder.save_pretrained(vae)
    tiny_dinov2().save_pretrained(encoder)
    convert(Convert(tmp_path / "source", data, size=64, workers=1))
    encode(Encode(data, vae=str(vae), device="cpu", workers=1))

    flags = {
        "data.folder": data, "data.vae": vae, "objective.encoder_folder": encoder, "model.z_dim": DINOV2["hidden_size"],
        "model.n_class": 4, "model.depth": 2, "model.width": 24, "model.n_head": 2, "model.encoder_depth": 1,
        "model.projector_width": 32, "data.batch_size": 4, "data.micro_batch": 2, "eval.preview": 2,
        "eval.preview_steps": 1, "steps": 2, "device": "cpu", "wandb": "disabled", "log_every": 1,
        "out": tmp_path / "runs",
    }  # fmt: skip
    arguments = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    arguments.append("--no-compile")  # of two steps compiling would take most of the time, and needs g++
    config = str(ROOT / "SIT/configs/sit_b2_imagenet.toml")
    assert training.train(parse_config(Config, [config, *arguments]), ONE)
    (run,) = (tmp_path / "runs/sit_b2_imagenet").iterdir()
    _, *lines = (run / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train/projection_loss"] for line in lines]
    assert len(losses) == 2 and all(-1 < loss < 1 and loss != 0 for loss in losses)
    assert Image.open(run / "samples/00000002.png").size == (64, 128)

    out = sample(Options(run=run, count=8, steps=2, guidance=1.5, npz=True, device="cpu"), ONE)
    written = np.load(out.with_suffix(".npz"))
    assert written["arr_0"].shape == (8, 64, 64, 3) and written["arr_1"].tolist() == [0, 1, 2, 3] * 2
    assert Image.open(out).size == (192, 192)
