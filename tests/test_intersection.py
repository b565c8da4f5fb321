"""scripts/intersection.py against known fixed points and inequalities of the methods."""

import json
import sys
from itertools import islice, pairwise
from math import sqrt

import pytest
import torch
from reference import polar_factor

from common.launch import main_guard
from scripts import intersection
from scripts.geometry import sylvester
from scripts.intersection import METHODS, draw_matrix, measure, to_orthogonal, to_signs


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("columns", [16, 5])
def test_a_hadamard_matrix_is_a_fixed_point_of_every_method(method, columns):
    matrix = sylvester(16)[:, :columns]
    found = measure(method, matrix, (1, 3))
    assert found["distance"] == pytest.approx([0, 0], abs=1e-7)
    assert found["kept"] == pytest.approx([1, 1])


@pytest.mark.parametrize("spectrum", intersection.SPECTRA)
def test_one_round_of_alternating_is_olions_direction_and_more_never_lead_away(spectrum):
    z = draw_matrix((24, 16), spectrum, seed=1)
    first = next(METHODS["alternating"](z))
    torch.testing.assert_close(first, polar_factor(z).sign() / sqrt(24))
    distances = measure("alternating", z, tuple(range(1, 12)))["distance"]
    assert all(after <= before + 1e-12 for before, after in pairwise(distances))


def test_distance_and_share_kept_match_an_svd():
    z = draw_matrix((12, 8), "gaussian", seed=2)
    found = measure("dykstra", z, (3,))
    signs = next(islice(METHODS["dykstra"](z * sqrt(8) / z.norm()), 2, None))
    sigma = torch.linalg.svdvals(signs)
    assert found["distance"] == pytest.approx([float((sigma - 1).square().sum().sqrt() / sqrt(8))])  # von Neumann
    assert found["kept"] == pytest.approx([float((z * signs).sum() / torch.linalg.svdvals(z).sum())])


def test_projections_are_the_nearest_points():
    z = draw_matrix((10, 6), "gaussian", seed=3)
    for other in (draw_matrix((10, 6), "gaussian", seed=seed) for seed in range(20)):
        assert (z - to_orthogonal(z)).norm() <= (z - to_orthogonal(other)).norm()
        assert (z - to_signs(z)).norm() <= (z - to_signs(other)).norm()


def test_the_program_records_what_it_draws_and_refuses_wide_shapes(monkeypatch, tmp_path, capsys):
    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["intersection", *arguments])
        main_guard(intersection.main)

    out = tmp_path / "picture.png"
    run("--shapes", "12x8", "--rounds", "1", "3", "--seeds", "0", "1", "--out", str(out))
    record = json.loads(out.with_suffix(".json").read_text())
    z = draw_matrix((12, 8), "gaussian", seed=1)
    assert record["shapes"]["12x8"]["averaged"]["kept"][1] == pytest.approx(measure("averaged", z, (1, 3))["kept"])
    assert out.stat().st_size > 10_000
    for wrong in (("--shapes", "8x12"), ("--shapes", "eight"), ("--rounds", "0")):
        with pytest.raises(SystemExit):
            run(*wrong, "--out", str(out))
        assert len(capsys.readouterr().err.splitlines()) == 1
