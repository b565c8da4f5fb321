"""SIT/evaluate.py: the Frechet distance by closed forms, the judge's measures, a table and a figure of runs."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sit_run import train, write_config
from torch import Tensor
from torch.utils.data import Dataset

from common import UserError
from SIT import evaluate, measures
from SIT.data import digits
from SIT.digits import JUDGE_FILE, accuracy, save_digits_cnn, train_digits_cnn
from SIT.evaluate import Options
from SIT.fid import fid
from SIT.measures import evaluate_digits, find_runs, frechet, measure


def gaussian_set(mean: Tensor, deviations: Tensor) -> Tensor:
    """Return 2 D points whose mean and covariance are exactly these: (2 D, D)."""
    size = len(mean)
    spread = torch.diag(deviations) * ((2 * size - 1) / 2) ** 0.5
    return mean + torch.cat([spread, -spread])


def test_frechet_distance_matches_the_closed_form_of_diagonal_gaussians():
    means, deviations = torch.randn(2, 5).double(), torch.rand(2, 5).double() + 0.1
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    sets = [gaussian_set(*each) for each in zip(means, deviations, strict=True)]
    assert frechet(*sets) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_matches_the_symmetric_form_of_any_covariances():
    sets = [torch.randn(200, 6).double() @ torch.randn(6, 6).double() for _ in range(2)]
    first, second = (each.T.cov() for each in sets)
    values, vectors = torch.linalg.eigh(first)
    root = vectors @ values.sqrt().diag() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ second @ root).sqrt().sum()
    expected = ((sets[0].mean(0) - sets[1].mean(0)) ** 2).sum() + first.trace() + second.trace() - 2 * trace
    assert frechet(*sets) == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("count", [50, 5])  # of 5 points in 8 dimensions the covariance has zeros as eigenvalues
def test_frechet_distance_of_a_set_and_itself_is_zero(count):
    points = torch.randn(count, 8)
    assert abs(frechet(points, points)) < 1e-5  # the root of float64's rounding, 1e-16
    assert frechet(points, points + 3) == pytest.approx(9 * 8, abs=1e-5)


@pytest.fixture(scope="module")
def judge():
    return train_digits_cnn(1, width=4, steps=60)[0]


def test_recognised_share_of_real_digits_matches_the_judge_s_accuracy(judge):
    splits = digits()
    real = measure(splits["val"].images, splits["val"].labels, judge, splits["train"])
    assert real["recognised"] == pytest.approx(accuracy(judge, splits["val"]), abs=1e-6)
    assert 0.5 < real["recognised"] < 1
    noise = torch.randint(256, splits["val"].images.shape, dtype=torch.uint8)
    drawn = measure(noise, splits["val"].labels, judge, splits["train"])
    assert drawn["frechet"] > 10 * real["frechet"] > 0 and drawn["recognised"] < 0.3
    same = measure(splits["train"].images, splits["train"].labels, judge, splits["train"])
    assert abs(same["frechet"]) < 1e-3


@pytest.fixture(scope="module")
def runs(judge, tmp_path_factory) -> Path:
    """The folder of five tiny runs, of which one diverged, and of the judge."""
    config = write_config(tmp_path_factory.mktemp("evaluated"))
    for optimizer, seed in (("olion", 1), ("olion", 2), ("adamw", 1), ("adamw", 2), ("muon", 1)):
        train(config, "--ema", "0.5", "--optimizer.name", optimizer, "--seed", str(seed))
    (config.parent / "runs" / "default" / "muon-lr4e-3-s1" / "finished.json").write_text('{"diverged": true}')
    with open(config.parent / JUDGE_FILE, "wb") as file:
        save_digits_cnn(judge, file)
    return config.parent


def test_table_of_several_runs_has_a_row_a_method_and_validation_first(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measures, "FOLDER", runs)
    out = tmp_path / "new" / "digits.png"
    printed = evaluate_digits(Options((runs / "runs",), count=60, steps=2, out=out))
    header, _, real, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[:5]]
    assert header == ["optimizer", "runs", "denoising loss", "projection loss", "recognised", "Frechet distance"]
    assert real[:4] == ["validation digits", "", "", ""] and 0.5 < float(real[4]) < 1
    assert sorted(row[:2] for row in rows) == [["AdamW", "default/adamw-lr4e-3"], ["OLion", "default/olion-lr4e-3"]]
    assert all(cell.endswith("(2 seeds)") for row in rows for cell in row[2:])
    printed_mean = rows[0][5].split(" ")[0]
    half_a_digit = 0.51 * 10.0 ** -len(printed_mean.partition(".")[2])
    distances = [float(row[5].split(" ")[0]) for row in rows]
    assert distances == sorted(distances)
    assert "muon-lr4e-3-s1 diverged; skipped" in capsys.readouterr().err

    record = json.loads(out.with_suffix(".json").read_text())
    of_method = [run["frechet"] for run in record["runs"] if run["optimizer"] == rows[0][0].lower()]
    assert len(record["runs"]) == 4 and sum(of_method) / 2 == pytest.approx(distances[0], abs=half_a_digit)
    assert record["validation"]["recognised"] == pytest.approx(float(real[4]), abs=5e-4)
    for name, key in (("denoising", "val/denoising_loss"), ("projection", "val/projection_loss")):
        for run in record["runs"]:
            last = (runs / "runs" / run["folder"] / "metrics.jsonl").read_text().splitlines()[-1]
            assert run[name] == json.loads(last)[key]


def test_figure_of_several_runs_shows_the_first_digits_of_each(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "FOLDER", runs)
    splits, shown = digits(), []
    honest = measures.picture

    def watched(images, *arguments, **options):
        shown.append(images)
        return honest(images, *arguments, **options)

    monkeypatch.setattr(measures, "picture", watched)
    run = runs / "runs" / "default" / "adamw-lr4e-3-s2"
    evaluate_digits(Options((run,), count=40, steps=2, out=tmp_path / "a.png"))
    real, drawn = (images[:, :, 1:-1, 1:-1] for images in shown)  # there is an edge around them
    assert real.shape == drawn.shape == (40, 1, 8, 8)
    labels = [int(splits["val"].labels[(splits["val"].images == image).flatten(1).all(1)][0]) for image in real]
    assert labels == [*range(10)] * 4
    assert np.asarray(Image.open(tmp_path / "a.png").convert("L")).std() > 20


def test_runs_that_cannot_be_measured_refuse_in_one_line(runs, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"need folders of runs with checkpoints; {tmp_path} has none"):
        find_runs((tmp_path,))
    with pytest.raises(UserError, match=r"two are default/adamw-lr4e-3-s1: evaluate them singly"):
        shutil.copytree(runs / "runs" / "default" / "adamw-lr4e-3-s1", tmp_path / "default" / "adamw-lr4e-3-s1")
        monkeypatch.setattr(measures, "FOLDER", runs)
        evaluate_digits(Options((runs / "runs", tmp_path), count=40, steps=1, out=tmp_path / "a.png"))
    with pytest.raises(UserError, match="--count needs 64,000 GB"):
        evaluate_digits(Options((runs,), count=10**12))
    with pytest.raises(UserError, match="count must be 40 or more; got 9"):
        evaluate_digits(Options((runs,), count=9))
    monkeypatch.setattr(measures, "FOLDER", tmp_path)
    with pytest.raises(UserError, match=r"python -m SIT\.prepare digits"):
        evaluate_digits(Options((runs / "runs",)))


def test_fid_hands_the_images_of_a_npz_to_torch_fidelity(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(256, size=(3, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images)
    seen = {}

    def calculate_metrics(**arguments):
        seen.update(arguments)
        return {"frechet_inception_distance": 1.5}

    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(calculate_metrics=calculate_metrics))
    assert fid(tmp_path / "a.npz", tmp_path) == 1.5
    assert isinstance(seen["input1"], Dataset) and len(seen["input1"]) == 3  # torch-fidelity takes no list
    assert seen["input2"] == str(tmp_path) and seen["fid"]
    assert seen["samples_find_deep"]  # SIT.prepare makes a folder for each class
    assert seen["input1"][1].dtype == torch.uint8
    assert np.array_equal(seen["input1"][1].numpy(), images[1].transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3), "arr_0": np.zeros((3, 4, 4, 3), np.uint8)}, "is ADM's reference"),
        ({"x": np.zeros(3)}, "arr_0"),
        ({"arr_0": np.zeros((3, 4, 4), np.uint8)}, r"must hold images .* got \(3, 4, 4\) uint8"),
        ({"arr_0": np.zeros((3, 4, 4, 3))}, "must hold images .* float64"),
    ],
)
def test_fid_refuses_a_npz_of_something_else(tmp_path, monkeypatch, arrays, message):
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(calculate_metrics=None))
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        fid(tmp_path / "a.npz", tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"must be a \.npz of images"):
        fid(tmp_path / "a.npz", tmp_path / "a.npz")


def test_samples_must_be_runs_or_one_npz(monkeypatch):
    for arguments in ([], ["a.npz", "b.npz"], ["runs", "a.npz"]):
        monkeypatch.setattr(sys, "argv", ["SIT.evaluate", *arguments])
        with pytest.raises(UserError, match=r"need runs of digits, or one \.npz"):
            evaluate.main()


def test_fid_refuses_without_torch_fidelity_or_a_reference(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        fid(tmp_path / "a.npz", tmp_path)
    with pytest.raises(UserError, match=r"FID needs --reference, an existing folder of images or \.npz; got None"):
        fid(tmp_path / "a.npz", None)
    (tmp_path / "a.txt").write_text("no images")
    with pytest.raises(UserError, match=r"--reference must be a folder of images or a \.npz, .*a\.txt is neither"):
        fid(tmp_path / "a.npz", tmp_path / "a.txt")


def test_evaluation_skips_runs_of_latents_if_asked_and_measures_nothing_without_others(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"config": {"data": {"kind": "latents"}}}')
    printed = evaluate_digits(evaluate.Options((tmp_path,), skip_latents=True))
    assert printed == f"no run of digits to measure in {tmp_path}"
