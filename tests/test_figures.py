"""scripts/figures.py: figures, records and tables match the metrics of the runs."""

import json
import sys

import numpy as np
import pytest

from common import figure, recorded
from common.guard import main_guard
from scripts import figures


def make_run(root, optimizer="olion", lr=1e-3, seed=1, values=(3.0, 2.0, 1.0), more=(), bits=True, **settings):
    """A run folder as common.runlog leaves it, validated at steps 0, 10, 20, ...; `more` is metric -> values."""
    folder = root / f"{optimizer}-lr{lr:g}-s{seed}"
    folder.mkdir(parents=True)
    lines = [{"step": 0, "optimizer_state_mb": 1.5}]
    for index, value in enumerate(values):
        line = {"step": 10 * index, "tokens": 640 * index, "val/loss": value}
        line |= {"val/bits_per_byte": 2 * value} if bits else {}
        line |= {metric: its_values[index] for metric, its_values in dict(more).items()}
        lines += [line, {"step": 10 * index + 5, "step_ms": 10.0 + index**3, "optimizer_ms": 1.0 + index**3}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "va')
    config = {"seed": seed, "optimizer": {"name": optimizer, "lr": lr, "adamw_lr": None}, **settings}
    about = {"experiment": "nanogpt", "name": folder.name, "group": "test", "torch": "2", "machine": {"cpu": "x"}}
    (folder / "config.json").write_text(json.dumps(about | {"config": config}))
    return folder


def fine_tuned(root, optimizer="olion", share=(0.0, 0.5, 1.0), forgotten=(1.5, 1.75, 2.0), **rest):
    """A fine-tuning run: the accuracy on responses rises, and so does the loss on the pretraining text."""
    more = {"val/exact_match": share, "val/pretrain_loss": forgotten}
    return make_run(root, optimizer, more={key: of for key, of in more.items() if of}, bits=False, **rest)


def lines_of(*folders, metrics=("val/loss",), x="step"):
    return recorded.group_lines([recorded.read_run(folder, metrics, x) for folder in folders])


def cells_of(table):
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["figures", *map(str, arguments)])
    main_guard(figures.main)


def drawn(monkeypatch, *arguments):
    """The figure that the program would have saved."""
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, out: kept.append(figure))
    run_main(monkeypatch, *arguments)
    return kept[0]


def curves_of(panel):
    """y of each line, not of the marker at its end."""
    return [list(line.get_ydata()) for line in panel.lines if len(line.get_xdata()) > 1]


def test_record_holds_exactly_the_points_of_the_metrics(tmp_path, monkeypatch):
    make_run(tmp_path / "runs", values=(3.0, 2.5, 2.25))
    run_main(monkeypatch, tmp_path / "runs", "--out", tmp_path / "a.png", "--x", "tokens")
    record = json.loads((tmp_path / "a.json").read_text())
    (run,) = record["runs"]
    assert (record["metric"], record["x"]) == (["val/loss"], "tokens")
    assert run["points"] == {"val/loss": {"x": [0, 640, 1280], "y": [3.0, 2.5, 2.25]}}
    assert (run["name"], run["machine"]) == ("olion-lr0.001-s1", {"cpu": "x"})
    assert run["config"]["optimizer"]["lr"] == 1e-3


def test_record_of_several_metrics_matches_the_steps_at_which_each_was_measured(tmp_path, monkeypatch):
    fine_tuned(tmp_path / "runs", share=(0.0, None, 1.0), forgotten=(None, 1.75, 2.0))
    names = ["val/pretrain_loss", "val/exact_match"]
    run_main(monkeypatch, tmp_path / "runs", "--out", tmp_path / "a.png", "--metric", *names)
    record = json.loads((tmp_path / "a.json").read_text())
    (run,) = record["runs"]
    assert record["metric"] == names
    assert run["points"]["val/exact_match"] == {"x": [0, 20], "y": [0.0, 1.0]}
    assert run["points"]["val/pretrain_loss"] == {"x": [10, 20], "y": [1.75, 2.0]}


@pytest.mark.parametrize("metrics", [("val/loss",), ("val/loss", "val/exact_match", "val/pretrain_loss")])
def test_picture_of_a_record_matches_the_picture_of_its_runs(metrics, tmp_path, monkeypatch):
    for seed in (1, 2):
        fine_tuned(tmp_path / "runs", seed=seed, values=(3.0, 2.0, 1.0 + seed))
    fine_tuned(tmp_path / "runs", "muon", forgotten=None)
    run_main(monkeypatch, tmp_path / "runs", "--out", tmp_path / "a.png", "--metric", *metrics)
    run_main(monkeypatch, tmp_path / "a.json", "--out", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()


def test_panels_match_the_metrics_in_their_order(tmp_path, monkeypatch):
    fine_tuned(tmp_path / "runs", values=(3.0, 2.0, 1.0))
    metrics = ("val/exact_match", "val/loss", "lr_unnamed")
    make_run(tmp_path / "runs", "muon", values=(3.0, 2.5), more={"lr_unnamed": (7.0, 8.0)})
    figure_ = drawn(monkeypatch, tmp_path / "runs", "--out", tmp_path / "a.png", "--metric", *metrics)
    titles = [panel.get_title(loc="left") for panel in figure_.axes]
    assert titles == ["fraction of responses repeated exactly", "validation loss, nats per token", "lr_unnamed"]
    assert [curves_of(panel) for panel in figure_.axes] == [
        [[0.0, 0.5, 1.0]],
        [[3.0, 2.5], [3.0, 2.0, 1.0]],  # Muon's is the thinner, so it is drawn first
        [[7.0, 8.0]],
    ]
    assert {panel.get_xlim() for panel in figure_.axes} == {(0, 20)}


def test_subtitle_matches_the_one_metric_or_the_seeds_of_several(tmp_path, monkeypatch):
    runs = [fine_tuned(tmp_path, seed=seed) for seed in (1, 2)]
    several = ("--metric", "val/loss", "val/exact_match")

    def subtitle(*arguments):
        return drawn(monkeypatch, *arguments, "--out", tmp_path / "a.png").texts[1].get_text()

    assert subtitle(runs[0]) == "validation loss, nats per token; seed 1"
    assert subtitle(*runs) == "validation loss, nats per token; mean and range of seeds 1, 2"
    assert subtitle(*runs, *several) == "mean and range of seeds 1, 2"
    assert subtitle(runs[0], *several) == "seed 1"
    lone = drawn(monkeypatch, runs[0], "--out", tmp_path / "a.png")
    assert [panel.get_title(loc="left") for panel in lone.axes] == [""]


def relabel(run, experiment):
    about = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(about | {"experiment": experiment}))
    return run


def test_losses_are_in_nats_per_token_where_all_runs_are_of_text(tmp_path, monkeypatch):
    images, text = relabel(make_run(tmp_path, seed=1), "sit"), relabel(make_run(tmp_path, seed=2), "llama")

    def subtitle(*runs):
        return drawn(monkeypatch, *runs, "--out", tmp_path / "a.png").texts[1].get_text()

    assert subtitle(images) == "validation loss; seed 1"
    assert subtitle(images, text) == "validation loss; one seed per line"
    assert subtitle(text) == "validation loss, nats per token; seed 2"


def test_limits_match_the_end_of_a_falling_loss_and_the_whole_of_other_curves(tmp_path, monkeypatch):
    steep, share, rising = (9.0, 3.0, 2.0, 1.5, 1.0), (1.0, 0.0, 0.1, 0.5, 0.9), (1.0, 1.5, 1.75, 1.9, 2.0)
    run = fine_tuned(tmp_path, values=steep, share=share, forgotten=rising)
    metrics = ("val/loss", "val/exact_match", "val/pretrain_loss")
    figure_ = drawn(monkeypatch, run, "--out", tmp_path / "a.png", "--metric", *metrics)
    # By hand: the range shown and a tenth of it on both sides; the last three fifths of 40 steps begin at 16.
    expected = [(0.9, 2.1), (-0.1, 1.1), (0.9, 2.1)]
    np.testing.assert_allclose([panel.get_ylim() for panel in figure_.axes], expected, rtol=1e-12)
    lone = drawn(monkeypatch, run, "--out", tmp_path / "a.png", "--ylim", "1", "2")
    assert lone.axes[0].get_ylim() == (1, 2)


def test_limits_for_several_metrics_refuse_in_one_line(tmp_path, monkeypatch, capsys):
    run = fine_tuned(tmp_path)
    with pytest.raises(SystemExit):
        metrics = ("--metric", "val/loss", "val/exact_match")
        run_main(monkeypatch, run, "--out", tmp_path / "a.png", *metrics, "--ylim", "0", "1")
    error = capsys.readouterr().err
    assert error.startswith("error: --ylim") and error.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def test_run_without_a_metric_is_missing_from_that_panel_alone_and_stderr_says_so(tmp_path, monkeypatch, capsys):
    fine_tuned(tmp_path / "runs", seed=1, share=(0.0, 0.5, 1.0))
    lacking = fine_tuned(tmp_path / "runs", seed=2, share=None)
    metrics = ("val/loss", "val/exact_match")
    figure_ = drawn(monkeypatch, tmp_path / "runs", "--out", tmp_path / "a.png", "--metric", *metrics)
    assert [len(panel.collections) for panel in figure_.axes] == [1, 0]  # the band of two seeds
    assert curves_of(figure_.axes[1]) == [[0.0, 0.5, 1.0]]
    assert capsys.readouterr().err == f"left out: {lacking} has no val/exact_match against step (yet)\n"


def test_seeds_of_one_method_make_one_line_over_their_shared_steps(tmp_path):
    whole = make_run(tmp_path, seed=1, values=(3.0, 2.0, 1.0))
    shorter = make_run(tmp_path, seed=2, values=(5.0, 3.0), resume=True)
    (line,) = lines_of(whole, shorter)
    at, values = line.points("val/loss")
    assert line.label == "OLion"
    np.testing.assert_array_equal(at, [0, 10])
    np.testing.assert_array_equal(values, [[3.0, 2.0], [5.0, 3.0]])


def test_lines_of_one_optimizer_are_labelled_with_their_differences(tmp_path):
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
    folders.append(make_run(tmp_path, "adamw", lr=2e-3, values=(3.0, 2.0, 1.05)))
    rows = cells_of(figures.table(lines_of(*folders)))
    assert rows[2] == ["AdamW", "2e-3", "1.050", "2.100", "11.0", "2.00", "1.50"]
    # By hand: losses 1.1 and 1.3, so a sample deviation of 0.1 sqrt(2); step times 10, 11, 18.
    assert rows[3] == ["OLion", "1e-3", "1.20 ± 0.14 (2 seeds)", "2.40 ± 0.28 (2 seeds)", "11.0", "2.00", "1.50"]


def test_table_columns_match_the_metrics_that_some_run_recorded(tmp_path):
    times = ["ms per step", "ms in the optimizer", "optimizer state MB"]
    plain = make_run(tmp_path, "muon")
    tuned = [fine_tuned(tmp_path, seed=seed, share=(0.0, 0.5, 0.5 + seed / 10)) for seed in (1, 3)]
    before, after = cells_of(figures.table(lines_of(plain))), cells_of(figures.table(lines_of(*tuned)))
    assert before[0][2:] == ["val loss", "bits per byte", *times]
    assert after[0][2:] == ["val loss", "exact match", "pretraining loss", *times]
    # By hand: shares 0.6 and 0.8, so a sample deviation of 0.1 sqrt(2).
    assert after[2][2:5] == ["1.000 ± 0.000 (2 seeds)", "0.70 ± 0.14 (2 seeds)", "2.000 ± 0.000 (2 seeds)"]
    mixed = cells_of(figures.table(lines_of(plain, *tuned)))
    assert mixed[0][2:6] == ["val loss", "bits per byte", "exact match", "pretraining loss"]
    assert mixed[2][:6] == ["Muon", "1e-3", "1.000", "2.000", "–", "–"]


def test_table_has_the_losses_of_images(tmp_path):
    more = {"val/denoising_loss": (0.9, 0.6, 0.5), "val/projection_loss": (0.0, -0.5, -0.8125)}
    rows = cells_of(figures.table(lines_of(make_run(tmp_path, more=more, bits=False))))
    assert rows[0][2:5] == ["val loss", "denoising loss", "projection loss"]
    assert rows[2][2:5] == ["1.000", "0.500", "-0.812"]


def test_room_for_labels_matches_the_longest_of_all_panels():
    def room(*labels):
        figure_, panels = figure.new_figure("title", "subtitle", rows=len(labels))
        for panel, label in zip(panels, labels, strict=True):
            figure.label_ends(panel, [(1.0, 0.5, label, "olion")])
        figure.pyplot().close(figure_)
        return figure_.subplotpars.right

    short, long = "1.234  OLion", "1.234  OLion lr 1.6e-2"
    assert room(long) < room(short)
    assert room(long, short) == room(short, long) == room(long)


def test_looks_are_one_a_rule_and_stay_for_unknown_rules():
    assert len({style.color for style in figure.STYLES.values()}) == len(figure.STYLES)
    assert figure.style_of("OLion") == figure.STYLES["olion"]
    assert figure.style_of("mine") == figure.style_of("mine")
    assert figure.style_of("mine").label == "mine"


@pytest.mark.parametrize(
    "lr, text", [(6e-4, "6e-4"), (1.6e-2, "1.6e-2"), (1.0, "1e0"), (0.0, "0"), (None, "–"), (0.008, "8e-3")]
)
def test_rate_matches_its_usual_notation(lr, text):
    assert figure.rate(lr) == text


def test_labels_are_spread_to_the_gap_in_their_order():
    positions = [1.0, 5.0, 1.02, 0.99, 1.01]
    placed = figure.push_apart(positions, gap=0.1)
    assert list(np.argsort(placed)) == list(np.argsort(positions))
    assert np.diff(np.sort(placed)).min() > 0.099  # the passes approach the gap from below
    assert placed[1] == 5.0
    assert abs(placed[[0, 2, 3, 4]].mean() - 1.005) < 1e-9


def test_folder_without_runs_refuses_and_lists_its_contents(tmp_path, monkeypatch, capsys):
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
    assert recorded.find_runs((str(kept), str(tmp_path / "logs"))) == [kept]
    with pytest.raises(FileNotFoundError, match=r"no run in .*absent"):
        recorded.find_runs((str(kept), str(tmp_path / "absent")))


def test_metric_that_no_run_has_refuses_and_names_the_recorded_ones(tmp_path, monkeypatch, capsys):
    make_run(tmp_path)
    with pytest.raises(SystemExit):
        run_main(monkeypatch, tmp_path, "--metric", "accuracy")
    error = capsys.readouterr().err
    assert "accuracy" in error and "val/loss" in error
    assert error.splitlines()[-1].startswith("error: no run has accuracy")
    with pytest.raises(SystemExit):  # beside one that every run has
        run_main(monkeypatch, tmp_path, "--metric", "val/loss", "accuracy", "--out", tmp_path / "a.png")
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: no run has accuracy against step")


def test_runs_are_found_under_parents_and_globs_but_not_where_moved_aside(tmp_path):
    kept = [make_run(tmp_path / "group", lr=lr) for lr in (1e-3, 2e-3)]
    make_run(tmp_path / "group.old")
    assert sorted(recorded.find_runs((str(tmp_path),))) == sorted(kept)
    assert recorded.find_runs((str(tmp_path / "*" / "olion-lr0.002*"), str(kept[1]))) == [kept[1]]


def test_runs_of_different_lengths_are_warned_of_and_tabulated_with_their_last_step(tmp_path, monkeypatch, capsys):
    runs = make_run(tmp_path, values=(3.0, 2.0, 1.0)), make_run(tmp_path, "muon", values=(3.0, 2.0))
    run_main(monkeypatch, *runs, "--out", tmp_path / "a.png")
    printed = capsys.readouterr()
    rows = cells_of(printed.out.split("\n\n")[0])
    assert [row[2] for row in rows] == ["last step", "-" * 9, "20", "10"]
    (warning,) = printed.err.splitlines()
    assert "muon-lr0.001-s1 at step 10, olion-lr0.001-s1 at step 20" in warning
    run_main(monkeypatch, runs[0], make_run(tmp_path, seed=2), "--out", tmp_path / "a.png")
    printed = capsys.readouterr()
    assert "last step" not in printed.out and printed.err == ""


@pytest.mark.parametrize("limits", [("nan", "1"), ("0", "inf"), ("2", "1"), ("1", "1")])
def test_limits_that_no_axis_has_refuse_in_one_line(limits, tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path)
    refused(monkeypatch, capsys, run, "--ylim", *limits, "--out", tmp_path / "a.png", message="finite numbers")


def refused(monkeypatch, capsys, *arguments, message):
    with pytest.raises(SystemExit) as exit_:
        run_main(monkeypatch, *arguments)
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 1
    assert error.startswith("error: ") and str(message) in error, error


DAMAGED_JSON = ["", "[]", "null", "5", '"a"', "{", "[" * 100_000, "1" * 5_000, "\xff"]


@pytest.mark.parametrize("text", [*DAMAGED_JSON, '{"config": []}', '{"config": {"optimizer": 3}}', '{"config": null}'])
def test_damaged_config_refuses_in_one_line_and_names_the_file(text, tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path)
    (run / "config.json").write_bytes(text.encode("latin-1"))
    refused(monkeypatch, capsys, run, "--out", tmp_path / "a.png", message=run / "config.json")


@pytest.mark.parametrize(
    "text", [*DAMAGED_JSON[1:-1], '{"val/loss": 1}', '{"step": "a"}', "\xff", "\0", '{"step": 1, "va']
)
def test_damaged_line_of_metrics_refuses_in_one_line_and_names_the_file(text, tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path)
    whole = (run / "metrics.jsonl").read_bytes().splitlines()[0]
    (run / "metrics.jsonl").write_bytes(b"\n".join([whole, text.encode("latin-1"), whole]) + b"\n")
    refused(monkeypatch, capsys, run, "--out", tmp_path / "a.png", message=run / "metrics.jsonl")


def test_losses_that_are_no_numbers_refuse_and_nan_is_a_gap(tmp_path, monkeypatch, capsys):
    assert recorded.values_of([{"a": 1}, {"a": float("nan")}, {}], "a") == [1, None, None]
    run = make_run(tmp_path, values=(3.0, "low", 1.0))
    refused(monkeypatch, capsys, run, "--out", tmp_path / "a.png", message="val/loss")


@pytest.mark.parametrize(
    "text", [*DAMAGED_JSON, "{}", '{"title": "a", "x": "step", "metric": ["val/loss"], "runs": [1]}']
)
def test_damaged_record_refuses_in_one_line_and_names_the_file(text, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    refused(monkeypatch, capsys, tmp_path / "a.json", message=tmp_path / "a.json")


@pytest.mark.parametrize("path", ["points", "config", "name"])
def test_record_with_a_damaged_run_refuses_in_one_line(path, tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, make_run(tmp_path), "--out", tmp_path / "a.png")
    record = json.loads((tmp_path / "a.json").read_text())
    for damaged in ([1], None, {"val/loss": {"x": [1, 2], "y": [1]}}):
        run = {**record["runs"][0], path: damaged}
        if path == "name":
            del run["name"]
        elif path == "config" and isinstance(damaged, dict):
            continue
        (tmp_path / "b.json").write_text(json.dumps({**record, "runs": [run]}))
        refused(monkeypatch, capsys, tmp_path / "b.json", message=tmp_path / "b.json")


def test_titles_are_plain_words():
    assert figures.title_of("sit", "digits") == "A small SiT on handwritten digits"
    assert figures.title_of("nanogpt", "gpt2_small") == "GPT: gpt2 small"
    assert figures.title_of("mine", "") == "mine"


def test_steps_to_match_the_first_validation_below_the_target_by_more_than_noise(tmp_path, monkeypatch, capsys):
    for seed in (1, 2, 3):  # AdamW ends at 2; OLion's mean is below at step 10 but not by its noise
        make_run(tmp_path, "adamw", seed=seed, values=(3.0, 2.5, 2.0), more={})
        make_run(tmp_path, "olion", seed=seed, values=(3.0, 1.9 + 0.3 * (seed - 2), 1.5 + 0.01 * seed))
        make_run(tmp_path, "muon", seed=seed, values=(3.0, 1.9 + 0.01 * seed, 1.8))
        make_run(tmp_path, "lion", seed=seed, values=(3.0, 2.9, 2.5 + 0.1 * seed))
    run_main(monkeypatch, tmp_path, "--out", tmp_path / "a.png")
    rows = {row[0]: row for row in cells_of(capsys.readouterr().out.split("\n\n")[0])}
    assert rows["optimizer"][-2:] == ["steps to val loss 2.000", "seconds to it"]
    # By hand: t(2) = 2.92; OLion at 10: 0.1 sqrt(3) < 2.92 x 0.3; Muon at 10: 0.08 sqrt(3) > 2.92 x 0.01. The median of
    # the step times 10, 11 and 18 ms is 11 ms.
    assert rows["OLion"][-2:] == ["20", "0"]
    assert rows["Muon"][-2:] == ["10", "0"]
    assert rows["AdamW"][-2] == "20"
    assert rows["Lion"][-2:] == ["–", "–"]


def test_steps_to_a_given_loss_match_the_first_validation_at_it(tmp_path, monkeypatch, capsys):
    make_run(tmp_path, values=(3.0, 2.0, 1.0))
    run_main(monkeypatch, tmp_path, "--out", tmp_path / "a.png", "--steps-to", "2.5", "--x", "tokens")
    rows = cells_of(capsys.readouterr().out.split("\n\n")[0])
    assert (rows[0][-1], rows[2][-1]) == ("tokens to val loss 2.500", "640")
    run_main(monkeypatch, tmp_path, "--out", tmp_path / "a.png")  # without AdamW there is no such column
    assert "steps to" not in capsys.readouterr().out


def test_steps_to_an_optimizer_that_is_not_drawn_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    make_run(tmp_path)
    refused(
        monkeypatch, capsys, tmp_path, "--out", tmp_path / "a.png", "--steps-to", "muon", message="(olion); got muon"
    )
