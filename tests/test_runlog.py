"""The run log: its files after a start, a resume, a kill, and failures of wandb."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import UserError
from common.runlog import RunLog, read_metrics, run_name


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def start(folder, **options):
    settings = {"config": {"lr": 1.0}, "experiment": "nanogpt", "name": "n", "group": "g", "tags": ["olion"]}
    return RunLog(folder, **settings | {"wandb_mode": "disabled"} | options)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("olion", 6e-4, 1337), "olion-lr6e-4-s1337"),
        (("muon", 1.6e-2, 1, 2e-3), "muon-lr1.6e-2-adamw2e-3-s1"),
        (("lion", 1e-3, 0, 1e-3), "lion-lr1e-3-s0"),
        (("adamw", 3.2e-2, 0, None), "adamw-lr3.2e-2-s0"),
        (("adamw", 0.5, 0), "adamw-lr5e-1-s0"),
        (("adamw", 0.1 + 0.2, 0), "adamw-lr3.0000000000000004e-1-s0"),
        (("adamw", 10, 0), "adamw-lr1e1-s0"),
        (("adamw", 0, 0), "adamw-lr0-s0"),
    ],
)
def test_run_name_matches_the_form(arguments, name):
    assert run_name(*arguments) == name


def test_log_writes_each_line_at_once_and_turns_tensors_into_numbers(tmp_path):
    log = start(tmp_path)
    log.log(1, {"train/loss": torch.tensor(2.5), "tokens": 10})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 2.5, "tokens": 10}\n'
    log.log(2, {"train/loss": 2.0})
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 2.5, "tokens": 10}, {"step": 2, "train/loss": 2.0}]
    log.finish()


def test_config_file_holds_the_config_and_the_machine(tmp_path):
    start(tmp_path).finish()
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["experiment"] == "nanogpt" and record["name"] == "n" and record["group"] == "g"
    assert record["config"] == {"lr": 1.0} and record["torch"] == torch.__version__
    assert record["machine"]["cores"] >= 1 and record["machine"]["cpu"]


def test_resume_drops_later_lines_and_a_half_written_one(tmp_path):
    log = start(tmp_path)
    for step in range(5):
        log.log(step, {"train/loss": step / 2})
    log.finish()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "tr')
    assert len(read_metrics(tmp_path)) == 5
    log = start(tmp_path, resume_step=2)
    log.log(3, {"train/loss": 9.0})
    log.finish()
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == [(0, 0), (1, 0.5), (2, 1), (3, 9)]


def test_fresh_start_replaces_the_metrics(tmp_path):
    log = start(tmp_path)
    log.log(1, {})
    log.finish()
    start(tmp_path).finish()
    assert read_metrics(tmp_path) == []


def test_read_metrics_refuses_a_damaged_line_that_is_not_the_last(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 must be JSON"):
        read_metrics(tmp_path)


def test_other_ranks_write_nothing(tmp_path):
    log = start(tmp_path / "run", is_main=False, wandb_mode="offline")
    log.log(1, {"train/loss": 1.0})
    log.finish()
    assert not (tmp_path / "run").exists()


def test_without_a_login_wandb_is_offline_and_resume_goes_on_with_its_run(tmp_path, capfd):
    log = start(tmp_path, wandb_mode="auto")
    log.log(1, {"train/loss": 1.0, "tokens": 8})
    log.finish()
    run_id = (tmp_path / "wandb_id").read_text().strip()
    log = start(tmp_path, wandb_mode="auto", resume_step=1)
    log.log(2, {"train/loss": 0.5, "tokens": 16})
    log.finish()
    assert (tmp_path / "wandb_id").read_text().strip() == run_id
    offline_runs = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))
    assert offline_runs and all((run / f"run-{run_id}.wandb").exists() for run in offline_runs)
    assert capfd.readouterr().err == ""
    start(tmp_path, wandb_mode="auto").finish()
    assert (tmp_path / "wandb_id").read_text().strip() != run_id


class FakeWandb:
    """A stand-in for the package, which needs the network; it fails in the given modes."""

    def __init__(self, failing=()):
        self.failing, self.modes, self.logged, self.settings, self.metrics = failing, [], [], {}, {}

    def Settings(self, **settings):
        return settings

    def teardown(self):
        pass

    def init(self, mode, **settings):
        self.modes.append(mode)
        self.settings = settings
        if mode in self.failing:
            raise RuntimeError("no\nnetwork")
        return self

    def define_metric(self, name, **options):
        self.metrics[name] = options

    def log(self, record, step):
        if "log" in self.failing:
            raise RuntimeError("broken pipe")
        self.logged.append((step, record))

    def finish(self):
        pass


def use(monkeypatch, fake):
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.mark.parametrize("login", ["key", "netrc"])
def test_with_a_login_wandb_is_online_under_the_experiment_s_project(tmp_path, monkeypatch, login):
    if login == "key":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    else:
        (tmp_path / "no-netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    fake = use(monkeypatch, FakeWandb())
    log = start(tmp_path / "run", wandb_mode="auto")
    log.log(3, {"tokens": 8})
    log.finish()
    assert fake.modes == ["online"] and fake.logged == [(3, {"step": 3, "tokens": 8})]
    assert fake.settings["project"] == "olion-nanogpt" and fake.settings["config"] == {"lr": 1.0}
    assert (fake.settings["group"], fake.settings["tags"], fake.settings["name"]) == ("g", ["olion"], "n")


def test_environment_wandb_mode_wins_over_auto(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", "offline")
    fake = use(monkeypatch, FakeWandb())
    start(tmp_path, wandb_mode="auto").finish()
    assert fake.modes == ["offline"]


def test_unreachable_server_falls_back_to_offline_with_one_warning(tmp_path, monkeypatch, capsys):
    fake = use(monkeypatch, FakeWandb(failing={"online"}))
    start(tmp_path, wandb_mode="online").finish()
    assert fake.modes == ["online", "offline"]
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1 and "no network" in warning


@pytest.mark.parametrize("trouble", ["missing", "offline", "log"])
def test_a_failing_wandb_is_one_warning_and_metrics_go_on(tmp_path, monkeypatch, capsys, trouble):
    monkeypatch.setitem(sys.modules, "wandb", None if trouble == "missing" else FakeWandb(failing={trouble}))
    log = start(tmp_path, wandb_mode="offline")
    log.log(1, {})
    log.log(2, {})
    log.finish()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    warning = capsys.readouterr().err
    assert warning.startswith("warning: Weights & Biases is off") and warning.count("\n") == 1


def test_unknown_wandb_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be auto, online, offline or disabled; got 'of'"):
        start(tmp_path, wandb_mode="of")


def test_import_does_not_load_torch_or_wandb():
    """Figures are drawn from metrics alone."""
    code = "import common.runlog, sys; assert not {'torch', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("left", [None, "", '{"step": 7}\n'])
def test_a_resumed_run_goes_on_with_a_warning_where_its_history_is_missing(tmp_path, capsys, left):
    if left is not None:
        (tmp_path / "metrics.jsonl").write_text(left)
    log = start(tmp_path, resume_step=3)
    log.log(4, {"train/loss": 1.0})
    log.finish()
    assert "warning" in (printed := capsys.readouterr().err) and "metrics.jsonl" in printed and printed.count("\n") == 1
    assert [line["step"] for line in read_metrics(tmp_path)] == [4]


def test_wandb_is_told_the_minimum_of_val_loss_and_the_user_how_to_sync_a_resumed_run(tmp_path, monkeypatch, capsys):
    fake = use(monkeypatch, FakeWandb())
    for part in (1, 2):
        (tmp_path / f"wandb/offline-run-{part}").mkdir(parents=True)
        start(tmp_path, wandb_mode="offline", resume_step=part).finish()
    assert fake.metrics["val/loss"] == {"step_metric": "step", "summary": "min"}
    folders = " ".join(f"{tmp_path}/wandb/offline-run-{part}" for part in (1, 2))
    assert capsys.readouterr().out == f"wandb has 2 folders of this run; to upload: wandb sync {folders}\n"
