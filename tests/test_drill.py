"""scripts.drill with a few faults of each kind: each is reported or survived."""

import json
import subprocess
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_quick_drill_holds_in_every_section(tmp_path):
    record = tmp_path / "drill.json"
    command = [warm.python(), "-m", "scripts.drill", "--quick", "--record", str(record)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert record.exists(), done.stderr[-3000:]
    results = json.loads(record.read_text())
    assert len(results) == 6
    for name, result in results.items():
        assert result["tried"] > 2 and not result["short"], (name, result["short"])
    assert done.returncode == 0
