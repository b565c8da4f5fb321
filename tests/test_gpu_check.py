"""The GPU check runs at toy size without a GPU, records its measurements, and reports a failed section."""

import json

import pytest
import torch

from common import UserError
from scripts import gpu_check


def run(monkeypatch, path, *sections):
    monkeypatch.setattr("sys.argv", ["gpu_check", "--record", str(path), "--only", *sections])
    gpu_check.main()


def test_record_matches_the_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(monkeypatch, tmp_path / "runs/check.json", "products")
    record = json.loads((tmp_path / "runs/check.json").read_text())
    assert record["toy"] and [row["section"] for row in record["rows"]] == ["products", "products"]
    product, took = record["rows"]
    assert product["what"] == "128: torch" and product["unit"] == "ms" and product["number"] > 0
    shown = capsys.readouterr().out
    assert "No GPU here" in shown and gpu_check.table([tuple(product[key] for key in product)]) in shown
    assert took["unit"] == "s"


def test_a_failed_section_is_reported_and_the_others_still_run(monkeypatch, tmp_path, capsys):
    def broken(device):
        """Breaks."""
        raise RuntimeError("weights differ")
        yield

    monkeypatch.setitem(gpu_check.SECTIONS, "layouts", broken)
    with pytest.raises(UserError, match="failed: layouts"):
        run(monkeypatch, tmp_path / "check.json", "layouts", "products")
    rows = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert rows[0]["what"] == "failed: weights differ" and rows[-1]["section"] == "products"


def test_optimizers_section_finds_the_rows_of_a_benchmark():
    record = {"machine": {}, "shapes": {"embedded": {"OLion bfloat16": {"median_ms": 2.0}, "repeats": 7}}}
    assert list(gpu_check._rows_of(record)) == [("OLion bfloat16", {"median_ms": 2.0})]


def test_layouts_section_compares_every_rule_with_one_device(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(monkeypatch, tmp_path / "check.json", "layouts")
    rows = json.loads((tmp_path / "check.json").read_text())["rows"]
    compared = {row["what"].split(":")[0]: row["number"] for row in rows if "difference" in row["what"]}
    rules = "olion muon adamuon lion adamw normuon lionmuon polargrad curvature signum".split()
    assert compared.keys() >= {f"{rule}, {layout} on 2" for rule in rules for layout in ("ddp", "fsdp")}
    assert all(number < 1e-9 for number in compared.values())
