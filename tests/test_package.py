"""`pip install .`: one importable package, `olion`, that needs torch alone."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

TRAIN = """
import sys, torch
import olion
from olion import OLion, build_optimizer
assert "optimizers" not in sys.modules
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
for optimizer in (OLion([model[0].weight], lr=1e-2), build_optimizer(model, "muon", lr=1e-2)):
    before = model[0].weight.detach().clone()
    model(torch.randn(16, 8)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
print(olion.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A fresh venv with the package installed from a copy of the checkout; torch is borrowed from this environment."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    shutil.copytree(ROOT / "optimizers", source / "optimizers", ignore=shutil.ignore_patterns("__pycache__"))
    for other in ("common", "nanoGPT", "scripts"):  # must not be installed
        (source / other).mkdir()
        (source / other / "__init__.py").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    (Path(site.strip()) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--no-index", "--no-deps", "--no-build-isolation", "."], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder, python, Path(site.strip())


@pytest.mark.slow
def test_installed_package_trains_a_step_in_another_folder(installed):
    folder, python, site = installed
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([python, "-c", TRAIN], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == site / "olion" / "__init__.py"


@pytest.mark.slow
def test_installed_files_match_the_one_package_with_its_types_and_metadata(installed):
    _, _, site = installed
    (info,) = site.glob("olion-*.dist-info")
    assert {path.name for path in site.iterdir()} == {"olion", info.name, "borrowed.pth"}
    wanted = {path.name for path in (ROOT / "optimizers").iterdir() if path.suffix in (".py", ".typed")}
    assert {path.name for path in (site / "olion").iterdir()} - {"__pycache__"} == wanted >= {"py.typed"}
    metadata = (info / "METADATA").read_text()
    for line in ("Requires-Dist: torch>=2.11", "License-Expression: MIT", "# OLion"):
        assert line in metadata
    assert metadata.count("Requires-Dist") == 1


def test_package_needs_what_the_environment_pins():
    """The oldest torch that the package takes is not newer than the one that is tested here."""
    pinned = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split() if "==" in line)
    (torch,) = PROJECT["dependencies"]
    oldest = torch.removeprefix("torch>=").split(".")
    assert [int(part) for part in oldest] <= [int(part) for part in pinned["torch"].split(".")][: len(oldest)]


FAKE_PYTHON = """#!/bin/bash
case "$*" in
  --version) echo "Python 3.12.0" ;;
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip install"*)
    echo "$*" >>pip.log
    [[ "$*" == *" -qq "* ]] || echo "WARNING: Location is ignored" >&2
    [[ "$*" == *" --disable-pip-version-check "* ]] || echo "[notice] A new release of pip is available" >&2 ;;
esac
"""


def test_setup_prints_one_line_per_stage_and_none_of_pips_warnings(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(FAKE_PYTHON)
    (tmp_path / "bin" / "python3").chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHON"}
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"

    def setup():
        return subprocess.run(
            ["bash", tmp_path / "scripts" / "setup.sh"], env=environment, capture_output=True, text=True, check=True
        )

    first, second = setup(), setup()
    assert [line.split(":")[0] for line in first.stderr.splitlines()] == ["setup 1/3", "setup 2/3", "setup 3/3"]
    assert first.stdout == second.stdout == f"{tmp_path}/.venv/bin/python\n"
    assert second.stderr == ""
    calls = (tmp_path / "pip.log").read_text().splitlines()
    assert ["torch==" in calls[0], calls[1].split()[-1], len(calls)] == [True, "requirements.txt", 2]


def test_shared_code_names_no_experiment_but_in_examples():
    """common/ and optimizers/ serve all experiments alike; docstrings may show one."""
    for path in [*(ROOT / "common").glob("*.py"), *(ROOT / "optimizers").glob("*.py")]:
        tree = ast.parse(path.read_text())
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
        examples = {id(node.value) for node in texts}  # docstrings, of fields too
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in examples:
                found = re.search(r"\b(nanoGPT|Llama|SIT)\b", node.value)
                assert not found, f"{path}:{node.lineno} names {found[0]}"
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in ("nanoGPT", "Llama", "SIT"), path
