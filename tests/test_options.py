"""Command lines without a TOML file: values, one line for a mistake, and help and Ctrl-C before heavy imports."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from common import UserError
from common.config import parse_config
from common.options import parse_options
from nanoGPT.config import Config

ROOT = Path(__file__).parents[1]
PROGRAMS = (
    "nanoGPT.sample",
    "nanoGPT.prepare",
    "SIT.sample",
    "SIT.evaluate",
    "SIT.prepare",
    "nanoGPT.train",
    "SIT.train",
    "Llama.arithmetic",
    "Llama.evaluate",
    "Llama.prepare",
    "Llama.train",
    "Llama.weights",
    "scripts.figures",
    "scripts.sweep",
    "scripts.ablation",
    "scripts.bench_communication",
    "scripts.bench_optimizers",
    "scripts.compare_nanogpt",
    "scripts.bench_signs",
    "scripts.curvature",
    "scripts.drill",
    "scripts.geometry",
    "scripts.intersection",
    "scripts.plan",
    "scripts.problems",
    "scripts.spectra",
)


@dataclass(frozen=True)
class Options:
    count: int = 3
    method: Literal["euler", "heun"] = "heun"
    interval: tuple[float, float] = (0.0, 1.0)
    top_k: int = 0


@pytest.mark.parametrize("words", [["--top-k", "5", "--count=2"], ["--top_k", "5", "--count", "2"]])
def test_options_match_the_command_line_with_hyphens_or_underscores(words):
    assert parse_options(Options, "program", None, words) == Options(count=2, top_k=5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cout", "2"], "Unrecognized options: --cout, 2; the nearest is --count; --help lists all"),
        (["--top_kk", "2"], "the nearest is --top-k"),
        (["--count", "many"], "--count: invalid literal for int"),
        (["--count", "9" * 5000], "--count: Exceeds the limit"),
        (["--count"], "Missing value for argument '--count'"),
        (["--method", "rk4"], "'rk4' for argument '--method'"),
        (["--interval", "1"], "Missing value for argument '--interval'"),
        (["extra"], "Unrecognized options: extra"),
    ],
)
def test_a_mistake_on_the_command_line_refuses_in_one_line(words, message, capsys):
    with pytest.raises(UserError) as refusal:
        parse_options(Options, "program", None, words)
    assert message in str(refusal.value) and "\n" not in str(refusal.value) and "--- " not in str(refusal.value)
    assert capsys.readouterr() == ("", "")


def test_help_of_every_program_comes_before_the_heavy_imports():
    code = """
import runpy, sys
for program in sys.argv[1:]:
    sys.argv = [program, "--help"]
    try:
        runpy.run_module(program, run_name="__main__")
    except SystemExit as end:
        assert not end.code
heavy = {"torch", "torchtitan", "matplotlib", "datasets", "transformers", "tokenizers", "sklearn", "PIL", "tiktoken"}
heavy &= set(sys.modules)
assert not heavy, heavy
"""
    ran = subprocess.run([sys.executable, "-c", code, *PROGRAMS], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for program in PROGRAMS:  # a config's help is named after __main__, here the code above
        assert re.search(rf"^usage: (python -m )?{re.escape(program)} ", ran.stdout, re.MULTILINE), program


@pytest.mark.parametrize("program", ["nanoGPT.train", "scripts.plan", "scripts.problems"])
def test_help_is_as_wide_as_the_terminal_and_named_as_it_is_called(program):
    environment = os.environ | {"COLUMNS": "80"}
    command = [sys.executable, "-m", program, "--help"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.stdout.startswith(f"usage: python -m {program} ")
    assert max(map(len, ran.stdout.splitlines())) <= 80


def test_a_config_matches_its_command_line_with_hyphens_or_underscores():
    first, second = (parse_config(Config, [f"--log{c}every", "3", f"--data.batch{c}size=7"]) for c in "-_")
    assert first == second and (first.log_every, first.data.batch_size) == (3, 7)


@pytest.mark.parametrize("package", ["nanoGPT", "SIT", "Llama"])
def test_ctrl_c_while_a_program_imports_is_one_line(package):
    code = f"import {package}, time; print(flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate()
    assert process.returncode == -signal.SIGINT  # 130 in shells
    assert printed.startswith("stopped; ") and printed.count("\n") == 1
