"""scripts/figures.py: what is drawn, recorded and tabulated is what the runs' metrics say."""

import json
import sys

import numpy as np
import pytest

from common import figure
from common.launch import main_guard
from scripts import figures


def make_run(root, optimizer="olion", lr=1e-3, seed=1, values=(3.0, 2.0, 1.0), **settings):
    """A run folder as common.runlog leaves it, validated at steps 0, 10, 20, ..."""
    folder = root / f"{optimizer}-lr{lr:g}-s{seed}"
    folder.mkdir(parents=True)
    lines = [{"step": 0, "optimizer_state_mb": 1.5}]
    for index, value in enumerate(values):
        line = {"step": 10 * index, "tokens": 640 * index, "val/loss": value, "val/bits_per_byte": 2 * value}
        lines += [line, {"step": 10 * index + 5, "step_ms": 10.0 + index**3, "optimizer_ms": 1.0 + index**3}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "va')
    config = {"seed": seed, "optimizer": {"name": optimizer, "lr": lr, "adamw_lr": None}, **settings}
    about = {"experiment": "nanogpt", "name": folder.name, "group": "test", "torch": "2", "machine": {"cpu": "x"}}
    (folder / "config.json").write_text(json.dumps(about | {"config": config}))
    return folder


def lines_of(*folders, metric="val/loss", x="step"):
    return figures.group_lines([figures.read_run(folder, metric, x) for folder in folders])


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["figures", *map(str, arguments)])
    main_guard(figures.main)


def test_record_holds_exactly_the_points_of_the_metrics(tmp_path, monkeypatch):
    make_run(tmp_path / "runs", values=(3.0, 2.5, 2.25))
    run_main(monkeypatch, tmp_path / "runs", "--out", tmp_path / "a.png", "--x", "tokens")
    record = json.loads((tmp_path / "a.json").read_text())
    (run,) = record["runs"]
    assert (record["metric"], record["x"]) == ("val/loss", "tokens")
    assert (run["x"], run["y"]) == ([0, 640, 1280], [3.0, 2.5, 2.25])
    assert (run["name"], run["machine"]) == ("olion-lr0.001-s1", {"cpu": "x"})
    assert run["config"]["optimizer"]["lr"] == 1e-3


def test_picture_of_a_record_matches_the_picture_of_its_runs(tmp_path, monkeypatch):
    for seed in (1, 2):
        make_run(tmp_path / "runs", seed=seed, values=(3.0, 2.0, 1.0 + seed))
    run_main(monkeypatch, tmp_path / "runs", "--out", tmp_path / "a.png")
    run_main(monkeypatch, tmp_path / "a.json", "--out", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()


def test_seeds_of_one_method_make_one_line_over_their_shared_steps(tmp_path):
    whole = make_run(tmp_path, seed=1, values=(3.0, 2.0, 1.0))
    shorter = make_run(tmp_path, seed=2, values=(5.0, 3.0), resume=True)
    (line,) = lines_of(whole, shorter)
    at, values = line.points()
    assert line.label == "OLion"
    np.testing.assert_array_equal(at, [0, 10])
    np.testing.assert_array_equal(values, [[3.0, 2.0], [5.0, 3.0]])


def test_lines_of_one_optimizer_are_told_apart_by_what_differs(tmp_path):
    folders = [make_run(tmp_path, lr=lr, clip=1.0) for lr in (1e-3, 1.6e-2)] + [make_run(tmp_path, "muon", clip=2.0)]
    lines = lines_of(*folders)
    assert [line.label for line in lines] == ["Muon", "OLion lr 1e-3", "OLion lr 1.6e-2"]
    assert lines[1].dash != lines[2].dash


def test_tuned_rate_stands_for_a_rate_that_was_not_given(tmp_path):
    asked = make_run(tmp_path, lr=8e-3, seed=1)
    tuned = make_run(tmp_path, lr=1.0, seed=2)
    about = json.loads((tuned / "config.json").read_text())
    about["config"]["optimizer"] |= {"lr": None, "tuned_lr": {"olion": 8e-3, "muon": 4e-3}}
    (tuned / "config.json").write_text(json.dumps(about))
    (line,) = lines_of(asked, tuned)
    assert "| 8e-3 " in figures.table([line])


def test_table_matches_last_values_and_medians(tmp_path):
    folders = [make_run(tmp_path, seed=seed, values=(3.0, 2.0, 1.0 + seed / 10)) for seed in (1, 3)]
    folders.append(make_run(tmp_path, "adamw", lr=2e-3, values=(3.0, 1.05)))
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in figures.table(lines_of(*folders)).splitlines()]
    assert rows[2] == ["AdamW", "2e-3", "1.050", "2.100", "10.5", "1.50", "1.50"]
    # By hand: losses 1.1 and 1.3, so a sample deviation of 0.1 sqrt(2); step times 10, 11, 18.
    assert rows[3] == ["OLion", "1e-3", "1.200 ± 0.141 (2 seeds)", "2.400 ± 0.283 (2 seeds)", "11.0", "2.00", "1.50"]


def test_looks_are_one_a_rule_and_stay_for_unknown_rules():
    assert len({style.color for style in figure.STYLES.values()}) == len(figure.STYLES)
    assert figure.style_of("OLion") == figure.STYLES["olion"]
    assert figure.style_of("polargrad") == figure.style_of("polargrad")
    assert figure.style_of("polargrad").label == "polargrad"


@pytest.mark.parametrize(
    "lr, text", [(6e-4, "6e-4"), (1.6e-2, "1.6e-2"), (1.0, "1e0"), (0.0, "0"), (None, "–"), (0.008, "8e-3")]
)
def test_rate_matches_how_people_write_it(lr, text):
    assert figure.rate(lr) == text


def test_labels_are_spread_to_the_gap_in_their_order():
    positions = [1.0, 5.0, 1.02, 0.99, 1.01]
    placed = figure.spread(positions, gap=0.1)
    assert list(np.argsort(placed)) == list(np.argsort(positions))
    assert np.diff(np.sort(placed)).min() > 0.099  # the passes approach the gap from below
    assert placed[1] == 5.0
    assert abs(placed[[0, 2, 3, 4]].mean() - 1.005) < 1e-9


def test_folder_without_runs_refuses_and_lists_what_is_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SystemExit) as exit_:
        run_main(monkeypatch, tmp_path)
    error = capsys.readouterr().err
    assert exit_.value.code == 1
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "metrics.jsonl" in error and "notes.txt" in error


def test_path_that_does_not_exist_refuses_beside_good_ones(tmp_path):
    kept = make_run(tmp_path)
    (tmp_path / "logs").mkdir()
    assert figures.find_runs((str(kept), str(tmp_path / "logs"))) == [kept]
    with pytest.raises(FileNotFoundError, match=r"no run in .*absent"):
        figures.find_runs((str(kept), str(tmp_path / "absent")))


def test_metric_that_no_run_has_refuses_and_names_what_was_recorded(tmp_path, monkeypatch, capsys):
    make_run(tmp_path)
    with pytest.raises(SystemExit):
        run_main(monkeypatch, tmp_path, "--metric", "accuracy")
    error = capsys.readouterr().err
    assert "accuracy" in error and "val/loss" in error
    assert error.splitlines()[-1].startswith("error: no run has accuracy")


def test_runs_are_found_under_parents_and_globs_but_not_where_moved_aside(tmp_path):
    kept = [make_run(tmp_path / "group", lr=lr) for lr in (1e-3, 2e-3)]
    make_run(tmp_path / "group.old")
    assert sorted(figures.find_runs((str(tmp_path),))) == sorted(kept)
    assert figures.find_runs((str(tmp_path / "*" / "olion-lr0.002*"), str(kept[1]))) == [kept[1]]
