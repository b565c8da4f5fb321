"""nanoGPT/train.py end to end, on a corpus and a model that train in seconds."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from interruptions import interrupted
from tiny_gpt import ROOT, write_config, write_corpus

from common import Diverged, UserError
from common.config import parse_config
from common.launch import Process
from common.runlog import read_metrics
from nanoGPT import train as training
from nanoGPT.data import load
from nanoGPT.train import Config
from tests import warm

EVEN = """
steps = 12
[data]
batch_size = 4
micro_batch = 4
[eval]
every = 4
"""
TIMINGS = {"step_ms", "optimizer_ms", "tokens_per_second", "peak_memory_mb"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def tiny(tmp_path, corpus) -> Path:
    return write_config(tmp_path, corpus, EVEN)


def run_module(module: str, *arguments: str, ranks: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    launcher = ["-m", module]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", module]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [warm.python(), *launcher, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def command_line(config: Path, *arguments: str) -> list[str]:
    return [str(config), "--out", str(config.parent / "runs"), *arguments]


def train(config: Path, *arguments: str) -> None:
    """Train in this process: a process of its own takes seconds to start."""
    settings = parse_config(Config, command_line(config, *arguments))
    training.train(training.fit_vocabulary(settings), Process(0, 0, 1, torch.device("cpu")))


def run_folder(config: Path) -> Path:
    (folder,) = (config.parent / "runs" / "default").iterdir()
    return folder


def curves(config: Path) -> list[dict]:
    lines = read_metrics(run_folder(config))
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


KILLED_AT_STEP_6 = """
import os, signal, sys
from nanoGPT import train as training
from interruptions import dying
from tests import warm
training.accumulate_gradient = dying(training.accumulate_gradient, 6, lambda: os.kill(os.getpid(), signal.SIGKILL))
training.main()
"""


def kill_9(config: Path, *arguments: str) -> None:
    """Train in a process of its own that kill -9 ends in its seventh step."""
    command = [warm.python(), "-c", KILLED_AT_STEP_6, *command_line(config, *arguments)]
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def interrupt(config: Path, *arguments: str) -> None:
    """Train in this process, which leaves the seventh step by an exception that nothing catches."""
    with interrupted(training, "accumulate_gradient", 6):
        train(config, *arguments)


@pytest.mark.parametrize(
    ("optimizer", "end"),
    [("olion", kill_9), ("olion", interrupt), ("muon", interrupt), ("adamuon", interrupt), ("lion", interrupt)]
    + [("adamw", interrupt)],
)
def test_resume_after_a_kill_matches_the_uninterrupted_run_bit_for_bit(tiny, tmp_path, corpus, optimizer, end):
    choice = ("--optimizer.name", optimizer)
    train(tiny, *choice)
    whole = curves(tiny)
    assert whole[-1]["val/loss"] < whole[0]["val/loss"]

    (tmp_path / "killed").mkdir()
    killed = write_config(tmp_path / "killed", corpus, EVEN)
    end(killed, *choice)
    assert len(curves(killed)) < len(whole)
    train(killed, *choice, "--resume")
    assert curves(killed) == whole


def test_two_ranks_match_one_process_at_the_same_global_batch(tiny):
    """In float64: in float32 the order of sums, a matter of the CPU, turns signs of OLion's entries next to zero."""
    exact = ("--dtype", "float64")
    train(tiny, *exact)
    one = curves(tiny)
    run_folder(tiny).rename(tiny.parent / "one")
    run_module("nanoGPT.train", *command_line(tiny, *exact, "--data.micro_batch", "1"), ranks=2)
    two = curves(tiny)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        for name in ("train/loss", "val/loss"):
            assert (name in a) == (name in b)
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=0, abs=1e-9), (name, a["step"])


def test_sigterm_saves_a_checkpoint_that_resume_continues(tiny):
    command = [warm.python(), "-m", "nanoGPT.train", *command_line(tiny, "--steps", "2000")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    metrics = tiny.parent / "runs" / "default"
    while process.poll() is None and not any(
        path.read_text().count("\n") > 2 for path in metrics.glob("*/metrics.jsonl")
    ):
        time.sleep(0.01)
    process.terminate()
    printed, _ = process.communicate()
    assert process.returncode == 143
    assert "--resume continues" in printed
    step = curves(tiny)[-1]["step"]
    assert (run_folder(tiny) / "checkpoints" / f"step-{step:08d}").is_dir()
    train(tiny, "--steps", str(step + 2), "--resume")
    assert [line["step"] for line in curves(tiny)] == list(range(step + 3))


def test_run_of_the_same_name_is_renamed_not_overwritten(tiny):
    train(tiny, "--steps", "4")
    first = curves(tiny)
    train(tiny, "--steps", "4", "--checkpoint.every", "0")
    (old,) = (tiny.parent / "runs" / "default.old").iterdir()
    assert [line["step"] for line in read_metrics(old)] == [line["step"] for line in first]
    assert (old / "checkpoints" / "step-00000004").is_dir()
    assert not (run_folder(tiny) / "checkpoints").exists()


def test_non_finite_steps_are_skipped_counted_and_end_the_run_with_the_checkpoint_intact(tiny, monkeypatch, capsys):
    honest, losses = training.accumulate_gradient, []

    def sometimes_nan(*arguments):
        losses.append(honest(*arguments))
        return losses[-1] * (1 if len(losses) in (1, 2, 3, 4, 6) else math.nan)  # step 5, then from 7 on

    monkeypatch.setattr(training, "accumulate_gradient", sometimes_nan)
    with pytest.raises(UserError, match="the 10 steps up to 16 had none") as caught:
        train(tiny, "--steps", "100")
    assert capsys.readouterr().err.endswith("\n"), caught  # the bar's line has ended, as `caught` keeps it
    lines = {line["step"]: line for line in read_metrics(run_folder(tiny))}
    assert [lines[step]["skipped"] for step in (4, 5, 6, 7, 15)] == [0, 1, 1, 2, 10]
    # Nothing moved the weights after step 6.
    assert lines[8]["val/loss"] == lines[12]["val/loss"] != lines[4]["val/loss"]
    assert json.loads((run_folder(tiny) / "finished.json").read_text())["diverged"]
    assert checkpoints(tiny) == [4], "none of steps that were not finite, and the finite one stays"
    assert "the last checkpoint is of step 4" in str(caught.value)
    monkeypatch.undo()
    train(tiny, "--steps", "13", "--resume")
    assert math.isfinite(curves(tiny)[-1]["train/loss"])
    assert not json.loads((run_folder(tiny) / "finished.json").read_text())["diverged"]


def checkpoints(config: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in run_folder(config).glob("checkpoints/step-*"))


@pytest.mark.parametrize("poisoned", ["weight", "momentum"])
def test_weights_or_state_that_are_not_finite_leave_the_finite_checkpoint(tiny, monkeypatch, poisoned, capsys):
    """One infinite entry after step 8: no loss shows it before the next step."""
    honest = training.Run.count_step

    def poison(run):
        honest(run)
        if run.step == 8:
            weight = next(parameter for parameter in run._model.parameters() if run._optimizer.state[parameter])
            state = next(buffer for buffer in run._optimizer.state[weight].values() if buffer.dim())
            (weight if poisoned == "weight" else state).data.flatten()[0] = float("inf")

    monkeypatch.setattr(training.Run, "count_step", poison)
    with pytest.raises(Diverged, match="the last checkpoint is of step 4"):
        train(tiny, "--steps", "40", "--eval.every", "40")
    assert checkpoints(tiny) == [4]
    assert "no checkpoint at step 8: weights or optimizer state are not finite" in capsys.readouterr().err


def test_skipped_checkpoint_is_written_after_the_next_finite_step(tiny, monkeypatch):
    honest, count = training.accumulate_gradient, itertools.count(1)
    monkeypatch.setattr(
        training, "accumulate_gradient", lambda *given: honest(*given) + (math.nan if next(count) == 8 else 0.0)
    )
    train(tiny, "--steps", "11", "--checkpoint.keep", "9")
    assert checkpoints(tiny) == [4, 9, 11]


def test_last_validation_that_is_not_finite_ends_as_a_divergence(tiny, monkeypatch):
    monkeypatch.setattr(training, "evaluate", lambda *_: {"val/loss": math.nan, "val/bits_per_byte": math.nan})
    with pytest.raises(Diverged, match="the validation after the last step, 2, had loss nan"):
        train(tiny, "--steps", "2")
    written = (run_folder(tiny) / "finished.json").read_text()
    assert json.loads(written) == {"step": 2, "val_loss": None, "bits_per_byte": None, "diverged": True}
    assert checkpoints(tiny) == []


def test_weights_of_an_absurd_rate_are_never_a_checkpoint_and_the_end_is_json(tiny):
    """Fewer steps than are skipped before a run is given up: the last validation says that it diverged."""
    with pytest.raises(Diverged, match="no checkpoint was saved"):
        train(tiny, "--steps", "8", "--optimizer.lr", "1e38", "--schedule.warmup", "0")
    (folder,) = (tiny.parent / "runs").glob("*/olion-lr1e38-*")
    assert json.loads((folder / "finished.json").read_text())["diverged"] is True
    assert not list(folder.glob("checkpoints/step-*"))


def test_progress_shows_when_the_runs_of_a_script_are_done(tiny, capsys, monkeypatch):
    train(tiny, "--steps", "3")
    assert "all done=" not in capsys.readouterr().err
    monkeypatch.setenv("RUNS_AFTER", "2")
    train(tiny, "--steps", "3")
    assert re.search(r"all done=\d\d:\d\d", capsys.readouterr().err)


def test_warmup_longer_than_the_run_warns(tiny, capsys):
    train(tiny, "--steps", "2", "--schedule.warmup", "3")
    assert "schedule.warmup is 3 and steps 2" in capsys.readouterr().err
    train(tiny, "--steps", "2", "--schedule.warmup", "2")
    assert "schedule.warmup" not in capsys.readouterr().err


def test_config_of_a_run_holds_the_rate_that_was_used(tiny):
    base = tiny.with_name("tiny-0.toml")
    base.write_text(base.read_text().replace("\nlr = ", "\ntuned_lr.olion = "))
    train(tiny, "--steps", "1")
    record = json.loads((run_folder(tiny) / "config.json").read_text())["config"]["optimizer"]
    assert record["lr"] == record["tuned_lr"]["olion"] > 0


def test_finished_file_holds_the_last_validation(tiny):
    train(tiny)
    finished = json.loads((run_folder(tiny) / "finished.json").read_text())
    assert finished["step"] == 12
    assert finished["val_loss"] == curves(tiny)[-1]["val/loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer.name", "olio"], "did you mean 'olion'?"),
        (["--optimizer.name", "muon", "--optimizer.options.betas", "[0.9, 0.95]"], "muon has no option 'betas'"),
        (["--optimizer.learning_rate", "1"], "unknown flag '--optimizer.learning_rate'"),
        (["--data.folder", "/nowhere"], "nanoGPT.prepare"),
        (["--model.context", "100000"], "context"),
        (["--model.vocab_size", "200"], "vocabulary of 257"),
        (["--data.micro_batch", "-1"], "micro_batch must be 1 or more; got -1"),
        (["--eval.every", "0"], "every must be 1 or more; got 0"),
        (["--clip", "nan"], "clip must be 0 or more; got nan"),
        (["--clip", "inf"], "clip must be finite; got inf"),
        (["--group", "../../.."], "group must name a folder below `out`; got '../../..'"),
        (["--group", "a\0b"], "group must name a folder below `out`; got 'a\\x00b'"),
        (["--out", "a\0b"], "out must name a folder; got 'a\\x00b'"),
        (["--seed", str(2**70)], "seed must be below 2**31; got"),
        (["--seed", "9" * 5000], "--seed"),
        (["--optimizer.tuned_lr.olion", "9" * 5000], "'optimizer.tuned_lr' must be dict[str, float]"),
        (["--nosuch.flag", "1"], "unknown flag '--nosuch.flag'; see --help"),
        (["--schedule.floor", "2"], "floor must be a fraction"),
        (["--optimizer.lr", "-1"], "lr must be 0 or more; got -1.0"),
        (["--optimizer.lr", "inf"], "lr must be finite; got inf"),
        (["--optimizer.weight_decay", "inf"], "weight_decay must be finite; got inf"),
        (["--optimizer.tuned_lr.oilon", "1e-3"], "did you mean 'olion'?"),
    ],
)
def test_bad_input_refuses_in_one_line(tiny, arguments, message):
    with pytest.raises((UserError, ValueError, OSError)) as refusal:
        train(tiny, *arguments)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tiny.parent / "runs").exists()


def test_bad_input_ends_the_program_with_one_line_and_status_1(tiny):
    done = run_module("nanoGPT.train", *command_line(tiny, "--optimizer.name", "olio"), check=False)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if "Error" in line or "Traceback" in line] == []
    assert done.stderr.startswith("error: the optimizer must be one of") and done.stderr.count("\n") == 1


def test_resume_refuses_another_optimizer_option(tiny):
    train(tiny, "--steps", "4")
    with pytest.raises(UserError, match=r"optimizer.weight_decay of the checkpoint, 0.1; got 0.5"):
        train(tiny, "--resume", "--optimizer.weight_decay", "0.5")


def test_resume_without_a_checkpoint_starts_over_and_keeps_what_was_there(tiny, capsys):
    train(tiny, "--steps", "4", "--checkpoint.every", "0")
    train(tiny, "--steps", "4", "--checkpoint.every", "0", "--resume")
    assert "starting at step 0" in capsys.readouterr().out
    (old,) = (tiny.parent / "runs" / "default.old").iterdir()
    assert read_metrics(old)[-1]["step"] == 4


def test_defaults_match_the_paper():
    config = Config()
    assert config.data.batch_size * config.model.context == 491_520
    assert (config.steps, config.schedule.warmup, config.schedule.floor, config.clip) == (20_000, 2000, 0.1, 1.0)


def test_corpus_of_the_fixture_is_whole(corpus):
    assert len(load(corpus, "val")) > 10 * 33
