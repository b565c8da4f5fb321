"""SIT/train.py on handwritten digits: one process and two ranks, interruptions, the average, refusals."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from interruptions import dying, interrupted
from PIL import Image
from ranks import Ranks
from tiny_sit_run import ONE, ROOT, curves, random_model, run_folder, settings_of, train, weights, write_config

from common import Diverged, UserError, launch
from common.config import parse_config
from common.launch import Process
from common.runlog import read_metrics
from common.schedule import ScheduleConfig
from scripts.curvature.subjects import open_run
from SIT import objective
from SIT import train as training
from SIT.data import digits, to_pixels
from SIT.model import SiT
from SIT.objective import VALIDATION
from SIT.sample import Options
from SIT.sampling import sample, seeded
from SIT.train import Config
from SIT.transport import COSINE, PREDICTIONS, target, times

LAYOUTS = {
    "one process": (),
    "2 ddp": ("--parallel.mode", "ddp"),
    "2 fsdp": ("--parallel.mode", "fsdp", "--recompute"),
}
RESUMED = ("--resume", "--checkpoint.every", "0")
# float64, in which layouts differ by the order of sums alone; OLion's orthogonalization stays in float32, but of its
# direction there is only the sign.
EXACT = ("--dtype", "float64")
TOLERANCE = 1e-12
SAVED = 2  # the step whose checkpoint another layout resumes


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as two:
        yield two


@pytest.fixture
def tiny(tmp_path) -> Path:
    return write_config(tmp_path)


def train_on_ranks(config: Path, out: Path, arguments: tuple[str, ...]) -> None:
    """Train on all ranks; called on each of them."""
    rank, size = dist.get_rank(), dist.get_world_size()
    training.train(settings_of(config, *arguments, out=out), Process(rank, rank, size, torch.device("cpu"), size))


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory) -> Path:
    """The folder of OPTIMIZER/LAYOUT, trained in float64."""
    config = write_config(tmp_path_factory.mktemp("layouts"))
    for optimizer in ("adamw", "olion"):
        for layout, flags in LAYOUTS.items():
            arguments = (*EXACT, *flags, "--optimizer.name", optimizer)
            out = config.parent / optimizer / layout
            if layout == "one process":
                train(config, *arguments, out=out)
            else:
                ranks(train_on_ranks, config, out, arguments)
    return config.parent


def losses(out: Path, after: int = -1) -> dict[str, float]:
    """The metrics that a layout must not change, by name and step."""
    numbers = {}
    for line in read_metrics(run_folder(out)):
        names = [name for name in line if name.startswith(("train/", "val/", "grad_norm", "lr"))]
        numbers |= {f"{name} {line['step']}": line[name] for name in names if line["step"] > after}
    return numbers


def assert_same_weights(first: dict, second: dict, tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
@pytest.mark.parametrize("optimizer", ["adamw", "olion"])
def test_losses_and_weights_of_a_layout_match_one_process(runs, optimizer, layout):
    one = losses(runs / optimizer / "one process")
    assert len(one) == 5 * 4 + 3 * 3  # a step's losses, norm and rate; validations at 0, 2 and 4
    assert losses(runs / optimizer / layout) == pytest.approx(one, rel=0, abs=TOLERANCE)
    settings = settings_of(runs / "tiny.toml")
    both = [weights(run_folder(runs / optimizer / each), settings) for each in ("one process", layout)]
    assert_same_weights(*both, TOLERANCE)
    assert any(not torch.equal(value, both[0][name.replace("model.", "average.")]) for name, value in both[0].items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_of_an_fsdp_run_matches_float32(tiny, tmp_path, ranks, dtype):
    train(tiny, "--optimizer.name", "adamw", out=tmp_path / "one")
    flags = ("--optimizer.name", "adamw", "--dtype", dtype, "--parallel.mode", "fsdp")
    ranks(train_on_ranks, tiny, tmp_path / "half", flags)
    one, half = losses(tmp_path / "one"), losses(tmp_path / "half")
    names = [name for name in one if "loss" in name]
    # Losses of about 1, of weights and activations with 8 bits: bf16's rounding, 2^-9, on each of them.
    assert [half[name] for name in names] == pytest.approx([one[name] for name in names], rel=0, abs=0.02)
    assert half != pytest.approx(one, abs=1e-6), "the policy was not in effect"


@pytest.mark.parametrize("resumed", LAYOUTS)
@pytest.mark.parametrize("saved", ["one process", "2 fsdp"])
def test_checkpoint_resumed_on_another_layout_matches_the_uninterrupted_run(runs, ranks, tmp_path, saved, resumed):
    source, out = run_folder(runs / "olion" / saved), tmp_path / "out"
    step = f"checkpoints/step-{SAVED:08d}"
    shutil.copytree(source / step, out / "default" / source.name / step)
    arguments = (*EXACT, *LAYOUTS[resumed], *RESUMED)
    if resumed == "one process":
        train(runs / "tiny.toml", *arguments, out=out)
    else:
        ranks(train_on_ranks, runs / "tiny.toml", out, arguments)
    whole = losses(runs / "olion" / saved, after=SAVED)
    assert len(whole) == 5 * 2 + 3
    assert losses(out) == pytest.approx(whole, rel=0, abs=0.0 if saved == resumed else TOLERANCE)


def test_sample_of_an_fsdp_checkpoint_matches_that_of_one_process(runs):
    pictures = []
    for layout in ("one process", "2 fsdp"):
        options = Options(run=run_folder(runs / "adamw" / layout), count=4, steps=3, device="cpu", npz=True)
        pictures.append(np.load(sample(options, ONE).with_suffix(".npz"))["arr_0"].astype(int))
    assert abs(pictures[0] - pictures[1]).max() <= 1  # a pixel may lie on the edge between two levels
    assert pictures[0].std() > 10


@pytest.mark.parametrize("arguments", [("--data.micro_batch", "5"), ("--data.micro_batch", "2"), ("--recompute",)])
def test_micro_batches_and_recomputing_match_the_run_without(runs, tmp_path, arguments):
    train(runs / "tiny.toml", *EXACT, "--optimizer.name", "adamw", *arguments, out=tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(runs / "adamw" / "one process"), rel=0, abs=TOLERANCE)


# ---- Interruptions


def train_until_killed(step: int, config: Path, *arguments: str, out: Path) -> None:
    with interrupted(training, "accumulate_gradient", step):
        train(config, *arguments, out=out)


@pytest.mark.parametrize("optimizer", ["olion", "muon", "adamuon", "lion", "adamw"])
def test_resume_after_a_kill_matches_the_uninterrupted_run_bit_for_bit(tiny, tmp_path, optimizer):
    choice = ("--optimizer.name", optimizer)
    train(tiny, *choice, out=tmp_path / "whole")

    train_until_killed(3, tiny, *choice, out=tmp_path / "killed")
    assert [line["step"] for line in curves(tmp_path / "killed")] == [0, 1, 2, 3]
    torch.rand(7)
    train(tiny, *choice, "--resume", out=tmp_path / "killed")
    assert curves(tmp_path / "killed") == curves(tmp_path / "whole")
    runs = [weights(run_folder(tmp_path / name), settings_of(tiny)) for name in ("whole", "killed")]
    assert_same_weights(*runs, 0.0)


def test_sigterm_saves_a_checkpoint_that_resume_continues(tiny, tmp_path, monkeypatch, capsys):
    asked_at_1 = dying(training.accumulate_gradient, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    out = tmp_path / "stopped"
    command = ["SIT.train", str(tiny), "--out", str(out), "--checkpoint.every", "100"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(training, "accumulate_gradient", asked_at_1)
        patch.setattr(sys, "argv", command)
        training.main()
    assert ended.value.code == 143
    assert "stopped at step 2 of 4; the same command with --resume continues" in capsys.readouterr().out
    assert [path.name for path in run_folder(out).glob("checkpoints/step-*")] == ["step-00000002"]
    assert not (run_folder(out) / "finished.json").exists()
    train(tiny, "--resume", out=out)
    train(tiny, out=tmp_path / "whole")
    assert curves(out) == curves(tmp_path / "whole")


def test_resume_refuses_another_experiment(tiny):
    train(tiny, "--steps", "2")
    for argument, value, message in (
        ("--ema", "0.5", "ema of the checkpoint, 0.9; got 0.5"),
        ("--objective.path", "cosine", "objective.path of the checkpoint, linear; got cosine"),
        ("--optimizer.modulation", "adamw", "optimizer.modulation of the checkpoint, matrix; got adamw"),
    ):
        with pytest.raises(UserError, match=message):
            train(tiny, "--resume", argument, value)


# ---- The average, the alignment, the gradient


def test_average_matches_the_recursion_in_float64(tiny, tmp_path, monkeypatch):
    honest, seen = training.update_average, []

    def watched(average, model, keep):
        if not seen:
            seen.append([parameter.double().clone() for parameter in average.parameters()])
        seen.append([parameter.detach().double().clone() for parameter in model.parameters()])
        honest(average, model, keep)

    monkeypatch.setattr(training, "update_average", watched)
    train(tiny, "--steps", "10", "--optimizer.lr", "0.05")
    expected = seen[0]  # at the start the weights themselves
    for weights_then in seen[1:]:
        expected = [0.9 * old + 0.1 * new for old, new in zip(expected, weights_then, strict=True)]
    found = weights(run_folder(tmp_path / "runs"), settings_of(tiny))
    averages = [value for name, value in found.items() if name.startswith("average.")]
    for value, wanted, last in zip(averages, expected, seen[-1], strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)  # fp32, ten times
        assert (value - last).abs().max() > 1e-3


def test_loss_of_the_curvature_script_matches_that_of_validation(tiny):
    """Without an average over time, the weights measured are the ones validated."""
    train(tiny, *EXACT, "--ema", "0")
    run = run_folder(tiny.parent / "runs")
    subject, validated = open_run(run, rows=5), losses(tiny.parent / "runs")
    assert subject.steps == [0, 2, 4] and "final_layer.linear.weight" not in subject.matrices  # a head
    for step in subject.steps:
        subject.load(step)
        assert float(subject.loss()) == pytest.approx(validated[f"val/loss {step}"], rel=1e-6)  # noise is as float32


def test_alignment_with_the_encoder_is_learnt_when_it_has_a_weight(tiny, tmp_path):
    fallen = {}
    for weight in ("0.5", "0"):
        out = tmp_path / weight
        arguments = ("--objective.projection_weight", weight, "--data.batch_size", "32", "--data.micro_batch", "32")
        train(tiny, *arguments, "--steps", "25", "--eval.every", "25", "--eval.images", "64", out=out)
        first, last = (line for line in curves(out) if "val/loss" in line)
        fallen[weight] = first["val/projection_loss"] - last["val/projection_loss"]
        assert last["val/loss"] == pytest.approx(
            last["val/denoising_loss"] + float(weight) * last["val/projection_loss"]
        )
        assert last["val/denoising_loss"] < first["val/denoising_loss"]
    assert fallen["0.5"] > 0.2 > 0.1 > abs(fallen["0"])


def test_training_without_an_encoder_has_no_projection_loss(tiny, tmp_path):
    train(tiny, "--objective.encoder", "", "--model.z_dim", "0")
    assert {line["val/projection_loss"] for line in curves(tmp_path / "runs") if "val/loss" in line} == {0}


@pytest.mark.parametrize("clip", [0.05, 0.0])
def test_gradient_of_a_step_matches_the_clipped_one(tiny, tmp_path, monkeypatch, clip):
    honest, norms = training.clip_gradient, []

    def watched(model, limit):
        before = honest(model, limit)
        after = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
        norms.append((before.item(), after.item()))
        return before

    monkeypatch.setattr(training, "clip_gradient", watched)
    train(tiny, "--clip", str(clip))
    assert len(norms) == 4 and min(before for before, _ in norms) > 0.1
    assert [after for _, after in norms] == pytest.approx([clip or before for before, _ in norms], rel=1e-4)
    assert [line["grad_norm"] for line in curves(tmp_path / "runs")[1:]] == [before for before, _ in norms]


def test_draws_of_training_steps_and_validation_match_none_of_the_others():
    settings = Config().objective
    places = [(training.TRAINING, 0, 0), (training.TRAINING, 0, 1), (training.TRAINING, 1, 0), (VALIDATION,)]
    draws = [training.draw(place, 2000, (1, 2, 2), settings) for place in places]
    for one, other in itertools.combinations(draws, 2):
        assert not torch.equal(one.noise, other.noise) and not torch.equal(one.t, other.t)
    assert torch.equal(draws[0].noise, training.draw(places[0], 2000, (1, 2, 2), settings).noise)
    # Of 2000 labels 200 are dropped, give or take four standard deviations of 13.
    assert all(abs(draw.dropped.sum() - 200) < 54 for draw in draws)


def test_noise_and_times_match_at_each_validation_and_at_no_two_steps(tiny, monkeypatch):
    honest, drawn = training.draw, {training.TRAINING: [], VALIDATION: []}

    def watched(place, *arguments):
        drawn[place[0]].append(honest(place, *arguments))
        return drawn[place[0]][-1]

    monkeypatch.setattr(training, "draw", watched)
    monkeypatch.setattr(objective, "draw", watched)
    train(tiny)
    steps, validations = drawn.values()
    assert (len(steps), len(validations)) == (4, 3)
    assert len({number for draws in steps for number in draws.t.tolist()}) == 4 * 5
    assert all(torch.equal(draws.noise, validations[0].noise) for draws in validations)


def test_dropped_labels_are_those_of_no_class_and_validation_drops_none(tiny, monkeypatch):
    seen = {True: [], False: []}
    honest = SiT.forward

    def watched(self, x, t, y):
        seen[self.training] += y.tolist()
        return honest(self, x, t, y)

    monkeypatch.setattr(SiT, "forward", watched)
    train(tiny, "--objective.label_dropout", "0.5", "--steps", "8")
    dropped = seen[True].count(10)
    assert len(seen[True]) == 40 and 8 < dropped < 32  # 20, give or take four standard deviations of 3
    assert set(seen[True]) - {10} <= set(range(10)) and max(seen[False]) < 10


@pytest.mark.parametrize("optimizer", ["olion", "muon", "lion"])
def test_modulation_option_changes_the_rule_of_the_modulation_weights_and_nothing_else(tiny, optimizer):
    model, roles = random_model(z_dim=8, encoder_depth=1, projector_width=16), {}
    for choice in ("matrix", "adamw"):
        settings = settings_of(tiny, "--optimizer.name", optimizer, "--optimizer.modulation", choice)
        built = training.build(settings.optimizer, model, model)
        of = {parameter: group for group in built.param_groups for parameter in group["params"]}
        roles[choice] = {name: of[parameter] for name, parameter in model.named_parameters()}
    changed = {name for name, group in roles["matrix"].items() if group["rule"] != roles["adamw"][name]["rule"]}
    assert changed == {name for name in roles["matrix"] if name.endswith("adaLN_modulation.1.weight")}
    assert len(changed) == 3
    for name, group in roles["matrix"].items():
        other = roles["adamw"][name]
        assert (group["lr"], group["weight_decay"]) == (other["lr"], other["weight_decay"])
        assert other["rule"] == "adamw" if name in changed else group["rule"] == other["rule"]


# ---- Failures


def test_non_finite_steps_are_skipped_counted_and_end_the_run_with_the_checkpoint_intact(tiny, tmp_path, monkeypatch):
    honest, count = training.accumulate_gradient, itertools.count(1)

    def sometimes_nan(*arguments):
        losses = honest(*arguments)
        return losses * (1 if next(count) in (1, 2, 4) else math.nan)  # not step 3, nor from 5 on

    command = ["SIT.train", str(tiny), "--out", str(tmp_path / "runs"), "--steps", "100"]
    with monkeypatch.context() as patch:
        patch.setattr(training, "accumulate_gradient", sometimes_nan)
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            launch.main_guard(training.main)
    assert ended.value.code == 3
    lines = {line["step"]: line for line in curves(tmp_path / "runs")}
    assert [lines[step]["skipped"] for step in (2, 3, 4, 5, 13)] == [0, 1, 1, 2, 10]
    # Nothing moved the average after step 4, though it lags behind the weights: validations are every second step.
    assert lines[4]["val/loss"] == lines[6]["val/loss"] == lines[12]["val/loss"] != lines[2]["val/loss"]
    finished = run_folder(tmp_path / "runs") / "finished.json"
    assert json.loads(finished.read_text())["diverged"]
    kept = sorted(path.name for path in finished.parent.glob("checkpoints/step-*"))
    assert kept == ["step-00000002", "step-00000004"], "none of a step that was not finite"
    train(tiny, "--steps", "13", "--resume")
    assert math.isfinite(curves(tmp_path / "runs")[-1]["train/loss"])
    assert not json.loads(finished.read_text())["diverged"]


def test_last_validation_that_is_not_finite_is_a_divergence_without_a_checkpoint(tiny, tmp_path, monkeypatch):
    honest, shifts = training.evaluate, iter((0.0, 0.0, math.nan))  # at steps 0, 2 and 4

    def nan_at_the_end(*given):
        shift = next(shifts)
        return {key: value + shift for key, value in honest(*given).items()}

    monkeypatch.setattr(training, "evaluate", nan_at_the_end)
    with pytest.raises(Diverged, match=r"the validation after the last step, 4, had loss nan.*checkpoint is of step 2"):
        train(tiny)
    run = run_folder(tmp_path / "runs")
    assert [path.name for path in run.glob("checkpoints/step-*")] == ["step-00000002"]
    assert json.loads((run / "finished.json").read_text()) == {
        "step": 4, "val_loss": None, "bits_per_byte": None, "diverged": True
    }  # fmt: skip


def test_float16_skips_what_its_loss_scale_overflows_and_matches_float32_after(tiny, tmp_path, monkeypatch):
    train(tiny, "--steps", "2", out=tmp_path / "float32")
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**20, enabled=enabled))
    flags = ("--steps", "10", "--dtype", "float16")
    train(tiny, *flags, out=tmp_path / "float16")
    half = curves(tmp_path / "float16")
    assert 0 < half[-1]["skipped"] < 10
    assert half[-1]["val/loss"] != half[0]["val/loss"]
    assert half[-1]["grad_norm"] < 10, "the gradient must be unscaled before it is clipped"
    one = curves(tmp_path / "float32")
    assert half[0]["val/loss"] == pytest.approx(one[0]["val/loss"], abs=2e-3)  # 11 bits
    assert half[1]["train/loss"] == pytest.approx(one[1]["train/loss"], abs=2e-3)
    train_until_killed(9, tiny, *flags, out=tmp_path / "killed")
    train(tiny, *flags, "--resume", out=tmp_path / "killed")  # with the scale it had come down to
    assert curves(tmp_path / "killed") == half


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer.name", "olio"], "did you mean 'olion'?"),
        (["--optimizer.name", "muon", "--optimizer.options.betas", "[0.9, 0.95]"], "muon has no option 'betas'"),
        (["--optimizer.modulate", "adamw"], "unknown flag '--optimizer.modulate'; the nearest known key is"),
        (["--model.z_dim", "16"], "must have z_dim 8 and 4 tokens per side, those of objective.encoder 'digits'"),
        (["--objective.encoder", ""], "must have z_dim 0"),
        (["--model.patch_size", "4"], "4 tokens per side"),
        (["--model.input_size", "16"], "[model] must have the channels, input_size and n_class of its data, (1, 8, 8)"),
        (["--model.n_class", "1000"], "and 10; got (1, 8, 8) and 1000"),
        (["--objective.encoder", "dinov3"], "the encoder must be one of dinov2-s"),
        (["--objective.encoder_folder", "/nowhere"], "python -m SIT.prepare digits"),
        (["--data.kind", "latents", "--data.folder", "/nowhere"], "python -m SIT.prepare"),
        (["--data.micro_batch", "0"], "micro_batch must be 1 or more; got 0"),
        (["--eval.every", "0"], "every must be 1 or more; got 0"),
        (["--ema", "1"], "ema must be in [0, 1), got 1.0"),
        (["--objective.label_dropout", "1"], "label_dropout must be below 1"),
        (["--seed", "-1"], "seed must be 0 or more; got -1"),
        (["--model.width", "10"], "width must be a multiple of n_head (2) and 4, got 10"),
    ],
)
def test_bad_input_refuses_in_one_line(tiny, tmp_path, arguments, message):
    with pytest.raises((UserError, ValueError)) as refusal:
        train(tiny, *arguments)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "runs").exists()


def test_unknown_optimizer_refuses_before_any_data_is_touched(tiny):
    with pytest.raises(ValueError, match="did you mean 'olion'"):
        train(tiny, "--optimizer.name", "olio", "--data.kind", "latents", "--data.folder", "/nowhere")


def test_misspelt_key_of_a_file_refuses_with_the_nearest(tiny):
    tiny.write_text(tiny.read_text() + '\n[objective]\nencodr = "digits"')
    with pytest.raises(UserError, match=r"unknown key 'objective.encodr'; the nearest known key is 'objective.encoder"):
        train(tiny)


def test_fewer_images_than_ranks_refuses(tiny):
    with pytest.raises(UserError, match="an image per rank or more, for 8 ranks; got 5"):
        training.train(settings_of(tiny), Process(0, 0, 8, torch.device("cpu"), 8))


def test_import_leaves_the_heavy_libraries_out():
    """A broken torchvision breaks transformers and diffusers, and all of them are slow."""
    heavy = ("torchvision", "timm", "transformers", "diffusers", "sklearn", "PIL")
    names = "train encoders vae digits data latents prepare model published transport".split()
    modules = ", ".join(f"SIT.{name}" for name in names)
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_preview_is_drawn_at_each_validation(tiny, tmp_path):
    train(tiny, "--eval.preview", "4", "--eval.preview_steps", "2")
    pictures = sorted((run_folder(tmp_path / "runs") / "samples").iterdir())
    assert [picture.name for picture in pictures] == ["00000000.png", "00000002.png", "00000004.png"]
    assert Image.open(pictures[0]).size == (64, 64)  # 2 x 2 digits, four times as large


def test_preview_matches_samples_of_the_average(tiny, tmp_path):
    train(tiny, "--eval.preview", "4", "--eval.preview_steps", "2", "--optimizer.lr", "0.1")
    run = run_folder(tmp_path / "runs")
    sample(Options(run=run, count=4, steps=2, device="cpu"), ONE)
    preview, sampled = (np.asarray(Image.open(run / name)) for name in ("samples/00000004.png", "samples.png"))
    assert np.array_equal(preview, sampled) and sampled.std() > 10


def test_preview_that_fails_leaves_the_checkpoint_of_its_step(tiny, tmp_path, monkeypatch):
    honest = training.preview

    def full_disk(*arguments):
        if arguments[-1] == 2:
            raise OSError("no space left")
        honest(*arguments)

    monkeypatch.setattr(training, "preview", full_disk)
    with pytest.raises(OSError, match="no space left"):
        train(tiny, "--eval.preview", "1", "--eval.preview_steps", "1")
    run = run_folder(tmp_path / "runs")
    assert [path.name for path in run.glob("checkpoints/step-*")] == ["step-00000002"]
    assert (run / "samples/00000000.png").exists()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_first_validation_matches_the_objective_of_the_config(tiny, tmp_path, prediction):
    """An untrained SiT puts out zeros: its loss is the mean square of its target."""
    flags = ("--objective.prediction", prediction, "--objective.path", "cosine", "--objective.times", "lognormal")
    train(tiny, *flags, "--steps", "1")
    generator = seeded(VALIDATION)
    t = times(5, "lognormal", generator, COSINE)
    torch.rand(5, generator=generator)  # of the labels' dropout
    e, x = torch.randn(5, 1, 8, 8, generator=generator), to_pixels(digits()["val"].images[:5])
    wanted = target(x, e, t, COSINE, prediction)
    if prediction == "score":
        wanted = wanted * torch.sin(math.pi / 2 * t)[:, None, None, None]
    assert curves(tmp_path / "runs")[0]["val/denoising_loss"] == pytest.approx(wanted.square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["digits", "sit_b2_imagenet"])
def test_config_files_match_the_paper_s_defaults_where_they_say_nothing(name):
    settings = parse_config(Config, [str(ROOT / f"SIT/configs/{name}.toml")])
    assert settings.group == name
    assert (settings.objective.projection_weight, settings.objective.prediction, settings.objective.path) == (
        0.5,
        "velocity",
        "linear",
    )
    if name != "digits":
        assert (settings.ema, settings.data.batch_size, settings.objective.encoder) == (0.9999, 256, "dinov2-b")
        assert (settings.optimizer.peak_lr(), settings.optimizer.weight_decay, settings.clip) == (1e-4, 0.1, 1.0)
        assert (settings.steps, settings.model.encoder_depth) == (400_000, 4)
        assert settings.schedule == Config().schedule == ScheduleConfig(warmup=0, decay="constant")
        assert SiT(settings.model).num_parameters() == pytest.approx(130e6, rel=0.1)
