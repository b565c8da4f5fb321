"""scripts/sweep.py on a training module of a few lines, without torch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import UserError
from common.guard import main_guard
from scripts import sweep

# Its loss is lowest at lr 4e-3; the optimizer's name chooses how a run ends. It appends each call to calls.jsonl.
FAKE = """
import json, os, sys, time, types
sys.modules["torch"] = types.ModuleType("torch")  # run_name needs none, and importing it takes seconds
from pathlib import Path
flags = dict(zip([a[2:] for a in sys.argv[2::2]], sys.argv[3::2]))
with open("calls.jsonl", "a") as calls:
    calls.write(json.dumps({**flags, "threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid()}) + "\\n")
name, lr, seed, part = (flags.get(k) for k in ("optimizer.name", "optimizer.lr", "seed", "optimizer.adamw-lr"))
from common.runlog import run_name
folder = Path("runs/fake", flags["group"], run_name(name, float(lr), int(seed), part and float(part)))
folder.mkdir(parents=True, exist_ok=True)
config = {"seed": int(seed), "width": int(os.environ.get("WIDTH", 8)), "optimizer": {"name": name, "lr": float(lr)}}
(folder / "config.json").write_text(json.dumps({"config": config, "torch": "2", "machine": {"cpu": "x"}}))
if name == "broken":
    print("step 1\\rstep 2\\nerror: the corpus is missing\\nbye")
    sys.exit(1)
if name == "hopeless":
    end = {"step": 40, "val_loss": None, "bits_per_byte": None, "diverged": True}
    (folder / "finished.json").write_text(json.dumps(end))
    print("error: training needs finite losses")
    sys.exit(3)
if name == "endless":
    time.sleep(600)
loss = 1 + abs(float(lr) - 4e-3) * 100 + int(seed) / 1000 if name != "lost" else float("nan")
finished = {"step": int(flags.get("steps", 100)), "val_loss": loss, "bits_per_byte": loss / 2}
(folder / "finished.json").write_text(json.dumps(finished))
"""
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "train.py").write_text(FAKE)
    (tmp_path / "small.toml").write_text('extends = "base.toml"\n')
    (tmp_path / "base.toml").write_text("steps = 100\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def run_sweep(monkeypatch, *arguments):
    words = ["sweep", "small.toml", "--module", "fake.train", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", words)
    main_guard(sweep.main)


def calls():
    return [json.loads(line) for line in Path("calls.jsonl").read_text().splitlines()]


def recorded(path="images/sweep_fake_small.json"):
    return json.loads(Path(path).read_text())["runs"]


def test_grid_trains_each_cell_and_records_its_loss(monkeypatch, capsys):
    run_sweep(
        monkeypatch, "--optimizers", "olion", "muon", "--lrs", "2e-3", "4e-3", "8e-3", "--seeds", 1, 2, "--jobs", 2
    )
    assert len(calls()) == 12
    assert {call["wandb"] for call in calls()} == {"disabled"}
    assert {call["group"] for call in calls()} == {"sweep-small"}
    assert {call["threads"] for call in calls()} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    losses = {(run["optimizer"], run["lr"], run["seed"]): run["val_loss"] for run in recorded()}
    assert len(losses) == 12
    assert losses["muon", 8e-3, 2] == pytest.approx(1.402)
    assert recorded()[0] | {"config": "small", "torch": "2", "machine": {"cpu": "x"}, "steps": 100} == recorded()[0]
    assert Path("images/sweep_fake_small.png").stat().st_size > 10_000
    # By hand: 1.001 and 1.002 at the best rate.
    assert "| OLion     | the same          | 4e-3      | 1.0015 ± 0.0007 (2 seeds) | yes" in capsys.readouterr().out


def test_finished_runs_are_skipped_and_new_cells_added(monkeypatch):
    run_sweep(monkeypatch, "--optimizers", "olion", "--lrs", "2e-3", "4e-3")
    run_sweep(monkeypatch, "--optimizers", "olion", "--lrs", "4e-3", "8e-3")
    assert [call["optimizer.lr"] for call in calls()] == ["0.002", "0.004", "0.008"]
    assert sorted(run["lr"] for run in recorded()) == [2e-3, 4e-3, 8e-3]


def test_run_of_another_length_is_trained_again(monkeypatch, workplace):
    run_sweep(monkeypatch, "--optimizers", "olion", "--lrs", "2e-3")
    (workplace / "base.toml").write_text("steps = 200\n")
    with pytest.raises(SystemExit):  # the fake still ends at 100
        run_sweep(monkeypatch, "--optimizers", "olion", "--lrs", "2e-3")
    assert len(calls()) == 2


def test_failed_run_is_recorded_with_its_error_and_stops_nothing(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_sweep(monkeypatch, "--optimizers", "broken", "olion", "--lrs", "4e-3")
    assert exit_.value.code == 1
    errors = {run["optimizer"]: (run["error"], run["val_loss"] is None) for run in recorded()}
    assert errors == {"broken": ("error: the corpus is missing", True), "olion": (None, False)}
    assert "1 runs failed (broken-lr4e-3-s1337)" in capsys.readouterr().err.splitlines()[-1]
    assert Path("images/sweep_fake_small.png").exists()


def test_failure_never_replaces_a_recorded_loss(tmp_path):
    entry = {"config": "a", "optimizer": "olion", "lr": 1e-3, "adamw_lr": None, "seed": 1, "settings": {}}
    for error, loss in ((None, 2.0), ("error: no memory", None)):
        sweep.add(tmp_path / "a.json", entry | {"error": error, "val_loss": loss})
    sweep.add(tmp_path / "a.json", entry | {"error": None, "val_loss": 3.0, "config": "b"})
    assert [run["val_loss"] for run in recorded(tmp_path / "a.json")] == [2.0, 3.0]


def test_diverged_run_is_null_and_does_not_fail_the_sweep(monkeypatch, capsys):
    run_sweep(monkeypatch, "--optimizers", "lost", "hopeless", "olion", "--lrs", "4e-3")
    losses = {run["optimizer"]: run["val_loss"] for run in recorded()}
    assert losses == {"lost": None, "hopeless": None, "olion": pytest.approx(2.337)}
    assert capsys.readouterr().out.count("diverged or failed") == 2
    run_sweep(monkeypatch, "--optimizers", "lost", "hopeless", "olion", "--lrs", "4e-3")
    assert len(calls()) == 3, "a diverged run was trained again"


def test_table_matches_whether_the_best_lies_inside_the_grid():
    def told(*values):
        rates = {1e-3 * 2**index: {1: value} for index, value in enumerate(values)}
        return sweep.table({(None, "olion"): rates}).splitlines()[-1].split("|")[-2].strip()

    assert told(3.0, 2.0, 3.0) == "yes"
    assert told(3.0, 2.0, float("inf")) == "yes"
    assert told(1.0, 2.0, 3.0) == "no: try below 1e-3"
    assert told(3.0, 2.0, 1.0) == "no: try above 4e-3"


def test_rate_of_the_adamw_part_is_the_configs_unless_given(monkeypatch, workplace):
    (workplace / "base.toml").write_text("steps = 100\n[optimizer]\nadamw_lr = 4e-3\n")
    run_sweep(monkeypatch, "--optimizers", "olion", "--lrs", "2e-3")
    run_sweep(monkeypatch, "--optimizers", "olion", "--lrs", "2e-3", "--adamw-lr", "1e-3", "8e-3")
    assert [call["optimizer.adamw-lr"] for call in calls()] == ["0.004", "0.001", "0.008"]
    assert [run["adamw_lr"] for run in recorded()] == [1e-3, 4e-3, 8e-3]


def test_settings_are_passed_on_and_name_a_sweep_of_their_own(monkeypatch):
    run_sweep(monkeypatch, "--optimizers", "olion", "--lrs", "2e-3", "--set", "steps=7", "model.n_layer=2")
    (call,) = calls()
    assert (call["steps"], call["model.n_layer"]) == ("7", "2")
    (run,) = recorded("images/sweep_fake_small-model.n_layer-2-steps-7.json")
    assert (run["config"], run["steps"]) == ("small model.n_layer=2 steps=7", 7)


def test_runs_of_changed_settings_are_called_mixed(monkeypatch, capsys):
    run_sweep(monkeypatch, "--optimizers", "olion", "--lrs", "2e-3")
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setenv("WIDTH", "16")
    run_sweep(monkeypatch, "--optimizers", "olion", "--lrs", "4e-3")
    assert "mixes runs of different settings, width 8 -> 16" in capsys.readouterr().err


def test_drawing_only_trains_nothing(monkeypatch):
    run_sweep(monkeypatch, "--optimizers", "olion", "--lrs", "2e-3", "4e-3")
    Path("images/sweep_fake_small.png").unlink()
    run_sweep(monkeypatch, "--draw-only")
    assert len(calls()) == 2
    assert Path("images/sweep_fake_small.png").exists()


def test_ablations_variants_are_swept_as_the_gpts_runs(workplace):
    variants = ("olion_unsigned", "olion_sign_twice")
    options = sweep.Options(Path("small.toml"), optimizers=variants, module="scripts.ablation")
    sweep.check(options)
    assert options.runs == Path("runs/nanogpt/sweep-small")
    with pytest.raises(
        UserError, match=r"--module must be a training module, .* or scripts.ablation; got 'scripts.plan'"
    ):
        sweep.check(sweep.Options(Path("small.toml"), module="scripts.plan"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--set", "steps"], "key=value"),
        (["--set", "optimizer.lr=1"], "not swept"),
        (["--jobs", "0"], "--jobs must be 1 or more"),
        (["--draw-only"], "must hold a run of small"),
    ],
)
def test_unusable_arguments_refuse_in_one_line(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        run_sweep(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == 1 and message in error and error.count("\n") == 1
    assert not Path("calls.jsonl").exists()


def test_stopped_sweep_ends_its_runs_and_records_no_failure():
    command = [sys.executable, "-m", "scripts.sweep", "small.toml", "--module", "fake.train", "--optimizers", "endless"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (Path("calls.jsonl").exists() and calls()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "error: stopped with 6 runs to do" in process.communicate()[1]
    assert process.returncode == 1
    with pytest.raises(ProcessLookupError):
        os.kill(calls()[0]["pid"], 0)
    assert not Path("images/sweep_fake_small.json").exists()


def test_rate_of_17_digits_is_found_again_under_the_runs_own_name(monkeypatch):
    rates = ["0.0012345678901234567", "0.1234567890123456"]
    for _ in range(2):
        run_sweep(monkeypatch, "--optimizers", "olion", "--lrs", *rates, rates[0], "--adamw-lr", rates[1])
    assert len(calls()) == 2, "a finished run was trained again"
    assert {run["lr"] for run in recorded()} == set(map(float, rates))
    assert all(run["error"] is None and run["val_loss"] is not None for run in recorded())


INF = float("inf")


@pytest.mark.parametrize(
    "curve, best, told",
    [
        # One lucky seed at 4e-3 is lower than the mean of three at 2e-3, and higher on the seed that both have.
        ({1e-3: {1: 3.0}, 2e-3: {1: 1.0, 2: 3.0, 3: 3.0}, 4e-3: {1: 2.0}}, 2e-3, "yes"),
        ({1e-3: {1: 3.0}, 2e-3: {1: 2.0, 2: 2.0}, 4e-3: {1: 1.0}}, 2e-3, "no: 4e-3 is lower on shared seeds"),
        ({1e-3: {1: 3.0, 2: 3.0}, 2e-3: {1: 2.0, 2: 2.0}, 4e-3: {1: 1.0, 2: 4.0}}, 2e-3, "yes"),
        ({1e-3: {1: 1.0}, 2e-3: {1: INF}}, 1e-3, "no: try below 1e-3"),
    ],
)
def test_best_rate_counts_equal_seeds_only(curve, best, told):
    assert sweep.best_rate(curve) == best
    assert sweep.bracketed(curve).startswith(told)


@pytest.mark.parametrize(
    "text", ["[]", "5", "{", "\0", '{"runs": 3}', '{"runs": [1]}', '{"runs": [{}]}', '{"runs": [], "settings": []}']
)
def test_damaged_record_refuses_in_one_line_and_names_the_file(text, monkeypatch, capsys):
    Path("images").mkdir()
    record = Path("images/sweep_fake_small.json")
    record.write_text(text)
    with pytest.raises(SystemExit) as exit_:
        run_sweep(monkeypatch, "--draw-only")
    error = capsys.readouterr().err
    assert exit_.value.code == 1 and str(record) in error and error.count("\n") == 1
    assert record.read_text() == text


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"step": "a"}', '{"step": 100, "val_loss": "low"}'])
def test_damaged_end_of_a_run_refuses_in_one_line_and_names_the_file(text, monkeypatch, capsys):
    run_sweep(monkeypatch, "--optimizers", "olion", "--lrs", "2e-3")
    capsys.readouterr()
    end = Path("runs/fake/sweep-small/olion-lr2e-3-s1337/finished.json")
    end.write_text(text)
    with pytest.raises(SystemExit):
        run_sweep(monkeypatch, "--optimizers", "olion", "--lrs", "2e-3")
    error = capsys.readouterr().err
    assert str(end) in error and error.count("\n") == 1


def test_configs_that_extend_each_other_in_a_circle_refuse_in_one_line(monkeypatch, capsys, workplace):
    (workplace / "base.toml").write_text('extends = "small.toml"\n')
    with pytest.raises(SystemExit):
        run_sweep(monkeypatch)
    assert capsys.readouterr().err.count("\n") == 1


def test_paired_differences_match_those_of_the_best_rates_over_shared_seeds():
    curves = {
        (None, "olion"): {1e-3: {1: 2.0, 2: 2.2, 3: 2.4}, 2e-3: {1: 9.0, 2: 9.0, 3: 9.0}},
        (None, "muon"): {1e-3: {1: 2.1, 2: 2.4, 3: 2.7}},
        (None, "lion"): {1e-3: {1: 3.0, 2: 2.0, 3: 2.5}},
        (None, "adamw"): {1e-3: {1: 3.0}},
    }
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in sweep.paired_table(curves).splitlines()[2:]]
    # By hand: Muon's differences are 0.1, 0.2, 0.3, so that s is 0.1 and t(2) s / sqrt(3) 0.248; Lion's are 1.0, -0.2,
    # 0.1: mean 0.3, s 0.624, half width 1.55.
    assert [row[0] for row in rows] == ["Muon", "Lion"]
    assert rows[0][2:] == ["+0.20 ± 0.25 (3 seeds)", "no"]
    assert rows[1][2:] == ["+0.3 ± 1.6 (3 seeds)", "no"]


def test_sweep_of_several_seeds_draws_paired_differences_and_names_the_seeds(monkeypatch, capsys):
    run_sweep(monkeypatch, "--optimizers", "olion", "muon", "--lrs", "2e-3", "4e-3", "--seeds", 1, 2, 3)
    assert "paired by seed" in capsys.readouterr().out
    assert Path("images/sweep_fake_small_paired.png").stat().st_size > 10_000
    run_sweep(monkeypatch, "--optimizers", "olion", "--lrs", "2e-3", "--out", "alone.json")
    assert not Path("alone_paired.png").exists()
