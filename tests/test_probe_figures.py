"""scripts/probe_figures.py, geometry.py and spectra.py: figures match the records, or an SVD."""

import json
import math

import numpy as np
import pytest
import torch
from test_figures import curves_of, drawn, make_run, run_main

from optimizers import measures
from scripts import geometry, probe_figures, spectra

SHAPES = ("8x8", "32x8", "8x16")


def probed_run(root, optimizer: str, seed: int):
    """A run whose probes grow with the step, the seed and the shape; lion has no directions."""

    def series(offset: float) -> list[float]:
        return [offset + seed + step for step in range(3)]

    more = {}
    for offset, shape in enumerate(SHAPES):
        more |= {f"probe/{shape}/{name}": series(offset / 4) for name in ("weight_spectral", "weight_max_abs")}
        for name in ("weight_entries", "weight_singular_values"):
            more[f"probe/{shape}/{name}"] = [[-1.0 * seed * step, 0.0, 2.0 * seed * step] for step in range(3)]
        if optimizer != "lion":
            more |= {f"probe/{shape}/{name}": series(0.0) for name in ("isotropy", "flatness", "sign_spectral")}
    return make_run(root, optimizer, seed=seed, more=more)


@pytest.fixture
def runs(tmp_path):
    for optimizer in ("olion", "lion"):
        for seed in (1, 2):
            probed_run(tmp_path / "runs", optimizer, seed)
    return tmp_path / "runs"


def test_norms_are_of_the_squarest_and_the_tallest_shape(monkeypatch, runs):
    panels = drawn(monkeypatch, "--what", "norms", runs).axes
    titles = [panel.get_title(loc="left") for panel in panels]
    assert titles == [
        "spectral norm of the 8 x 8 weights",
        "spectral norm of the 32 x 8 weights",
        "largest entry of the 8 x 8 weights",
        "largest entry of the 32 x 8 weights",
    ]
    assert [1.5, 2.5, 3.5] in curves_of(panels[0]) and [1.75, 2.75, 3.75] in curves_of(panels[1])  # means of the seeds


def test_isotropy_matches_its_haar_level_and_leaves_rules_without_out(monkeypatch, runs):
    panels = drawn(monkeypatch, "--what", "isotropy", runs).axes
    assert len(panels) == len(SHAPES)
    for panel in panels:
        *curves, level = curves_of(panel)
        m, n = map(int, panel.get_title(loc="left").split(", ")[1].split(" matrices")[0].split(" x "))
        stack = torch.eye(max(m, n), min(m, n), dtype=torch.float64)[None]
        assert level == pytest.approx([measures.direction(stack, stack)["isotropy_haar"].item()] * 2)
        assert curves == [[1.5, 2.5, 3.5]]


def test_hadamard_gaps_are_drawn_with_their_references(monkeypatch, runs):
    panels = drawn(monkeypatch, "--what", "hadamard", runs).axes
    assert [1.0, 1.0] in curves_of(panels[0]) and [math.sqrt(2 / math.pi)] * 2 in curves_of(panels[0])
    assert [1.0, 1.0] in curves_of(panels[3])


def test_spectra_match_the_last_recorded_quantiles(monkeypatch, runs):
    panels = drawn(monkeypatch, "--what", "spectrum", runs).axes
    assert curves_of(panels[0])[0] == [-3.0, 0.0, 6.0]  # the mean of -2 and -4, of 4 and 8
    assert list(panels[0].lines[0].get_xdata()) == [0.0, 0.5, 1.0]


def test_a_figure_of_probes_repeats_from_its_record(monkeypatch, runs, tmp_path):
    run_main(monkeypatch, "--what", "spectrum", runs, "--out", tmp_path / "first.png")
    panels = drawn(monkeypatch, tmp_path / "first.json", "--out", tmp_path / "second.png").axes
    assert curves_of(panels[0])[0] == [-3.0, 0.0, 6.0]
    assert "weight_entries" in json.loads((tmp_path / "first.json").read_text())["metric"][0]


def test_runs_without_probes_are_refused_in_one_line(monkeypatch, tmp_path, capsys):
    make_run(tmp_path / "runs")
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--what", "isotropy", tmp_path / "runs")
    (line,) = capsys.readouterr().err.splitlines()
    assert "--what isotropy needs runs that recorded isotropy" in line and "--probe.every 100" in line


def test_metrics_of_a_figure_are_of_shapes_alone():
    recorded = ["probe/ms", "probe/blocks.0.attn.weight/isotropy", "probe/8x4/isotropy", "val/loss"]
    assert probe_figures.metrics_of("isotropy", recorded) == ("probe/8x4/isotropy",)


# --- Geometry


@pytest.mark.parametrize("name", geometry.planes())
def test_edges_of_the_balls_have_norm_one_by_an_svd(name):
    first, second = geometry.planes()[name]
    found = geometry.edges(first, second)
    for kind, norm in (
        ("spectral", lambda x: torch.linalg.svdvals(x)[0].item()),
        ("max", lambda x: x.abs().max().item() * math.sqrt(len(x))),
    ):
        for x, y in found[kind][::60]:
            assert norm(x * first + y * second) == pytest.approx(1, abs=1e-12)
    for x, y in found["hadamard"]:
        matrix = (x * first + y * second) * math.sqrt(len(first))
        np.testing.assert_allclose(matrix.abs(), 1, atol=1e-8)
        np.testing.assert_allclose(matrix.mT @ matrix, len(first) * np.eye(len(first)), atol=1e-7)


def test_planes_hold_their_known_hadamard_matrices():
    counts = [
        len({(round(x, 6), round(y, 6)) for x, y in geometry.edges(*plane)["hadamard"]})
        for plane in geometry.planes().values()
    ]
    assert counts == [4, 0, 2]


def test_spectra_are_flat_kept_or_between_and_sizes_follow_the_gradient_or_do_not():
    found = spectra.measured()
    relative = {name: np.array(each["spectrum"]) / each["spectrum"][0] for name, each in found.items()}
    np.testing.assert_allclose(relative["gradient"], 1 / np.arange(1, 65), rtol=1e-9)
    np.testing.assert_allclose(relative["PolarGrad"], 1, rtol=1e-9)
    assert (relative["Curvature, p = 4"] >= relative["Curvature, p = 2.5"]).all()
    assert (relative["Curvature, p = 2.5"] >= relative["gradient"] * (1 - 1e-9)).all()
    np.testing.assert_allclose(np.array(found["PolarGrad"]["norms"]) / spectra.SCALES, found["PolarGrad"]["norms"][4])
    for name in ("Muon", "OLion", "Signum", "NorMuon", "Curvature, p = 4"):
        np.testing.assert_allclose(found[name]["norms"], found[name]["norms"][0], rtol=1e-2)
