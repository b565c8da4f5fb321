"""Configuration: the config that files and flags build, and a one-line message for each mistake."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from common import UserError
from common.config import ConfigError, from_dict, parse_config, refuse_changes, to_dict
from common.run_config import RunConfig


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["olion", "muon"] = "olion"
    lr: float = 6e-4
    """the peak rate"""
    adamw_lr: float | None = None  # the rate of the rest
    betas: tuple[float, float] = (0.95, 0.98)
    coefficients: str | tuple[float, ...] = "jordan"
    options: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """A run."""

    steps: int = 100
    """how many updates to make"""
    compile: bool = False
    folder: Path = Path("runs")
    lrs: dict[str, float] = field(default_factory=lambda: {"olion": 1e-3})
    # The default of a section need not be the default of its class.
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(name="muon"))

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}")


@pytest.fixture
def write(tmp_path):
    def write_file(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return write_file


def test_no_argument_gives_the_defaults():
    assert parse_config(Config, []) == Config()


def test_file_is_merged_over_the_defaults(write):
    path = write(
        "a.toml", 'steps = 7\nfolder = "out"\n[optimizer]\nlr = 1\ncoefficients = [1, 2.5, 3]\n[lrs]\nmuon = 2\n'
    )
    assert parse_config(Config, [path]) == Config(
        steps=7,
        folder=Path("out"),
        lrs={"olion": 1e-3, "muon": 2.0},
        optimizer=OptimizerConfig(name="muon", lr=1.0, coefficients=(1.0, 2.5, 3.0)),
    )


def test_integers_become_floats_where_floats_are_wanted(write):
    config = parse_config(Config, [write("a.toml", "[optimizer]\nlr = 1\nadamw_lr = 2\nbetas = [0, 1]\n")])
    values = [config.optimizer.lr, config.optimizer.adamw_lr, *config.optimizer.betas]
    assert [type(value) for value in values] == [float] * 4


def test_extended_file_is_merged_under_the_one_that_extends_it(write):
    write("base/base.toml", 'steps = 1\n[optimizer]\nname = "olion"\nlr = 0.5\n')
    path = write("a.toml", 'extends = "base/base.toml"\nsteps = 2\n[optimizer]\nlr = 0.25\n')
    assert parse_config(Config, [path]) == Config(steps=2, optimizer=OptimizerConfig(name="olion", lr=0.25))


def test_later_files_and_then_flags_win(write):
    first = write("a.toml", "steps = 1\n[optimizer]\nlr = 0.5\n")
    second = write("b.toml", "steps = 2\n")
    flags = ["--steps=3", "--compile", "--optimizer.adamw_lr", "2e-3", "--optimizer.betas", "0.1", "0.2"]
    optimizer = OptimizerConfig(name="muon", lr=0.5, adamw_lr=2e-3, betas=(0.1, 0.2))
    assert parse_config(Config, [first, second, *flags]) == Config(steps=3, compile=True, optimizer=optimizer)


def test_flags_change_and_add_entries_of_a_table():
    flags = ["--lrs.olion", "3e-3", "--lrs.muon=1", "--optimizer.options.ns_steps", "5"]
    optimizer = OptimizerConfig(name="muon", options={"ns_steps": 5.0})
    assert parse_config(Config, flags) == Config(lrs={"olion": 3e-3, "muon": 1.0}, optimizer=optimizer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step = 1", "{path}: unknown key 'step'; the nearest known key is 'steps'"),
        ("lr = 1", "{path}: unknown key 'lr'; the nearest known key is 'optimizer.lr'"),
        ("[optimizer]\nlrr = 1", "{path}: unknown key 'optimizer.lrr'; the nearest known key is 'optimizer.lr'"),
        ("[optimiser]\nlr = 1", "{path}: unknown key 'optimiser'; the nearest known key is 'optimizer'"),
        ("zzz = 1", "{path}: unknown key 'zzz'; see --help"),
        ("steps = 1.5", "{path}: key 'steps' must be int, got float 1.5"),
        ("steps = true", "{path}: key 'steps' must be int, got bool True"),
        ("compile = 1", "{path}: key 'compile' must be bool, got int 1"),
        ("optimizer = 1", "{path}: key 'optimizer' must be OptimizerConfig, got int 1"),
        ("[optimizer]\nlr = '1'", "{path}: key 'optimizer.lr' must be float, got str '1'"),
        ("[optimizer]\nname = 'adam'", "{path}: key 'optimizer.name' must be one of 'olion', 'muon', got str 'adam'"),
        ("[optimizer]\nbetas = [1]", "{path}: key 'optimizer.betas' must be tuple[float, float], got list [1]"),
        ("[lrs]\nmuon = 'x'", "{path}: key 'lrs' must be dict[str, float], got dict {{'muon': 'x'}}"),
        ("steps = ", "{path}: not a readable TOML file: Invalid value (at end of document)"),
        ("extends = 3", "{path}: key 'extends' must be a file name, got 3"),
        ("extends = 'a.toml'", "{path}: extends itself through a.toml; remove one `extends`"),
        ("steps = 0", "config: steps must be positive, got 0"),
    ],
)
def test_mistake_in_a_file_is_refused_with_one_line(write, text, message):
    path = write("a.toml", text)
    with pytest.raises(ConfigError) as error:
        parse_config(Config, [path])
    assert str(error.value) == message.format(path=path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = " + "9" * 5000, "not a readable TOML file: Exceeds the limit"),
        ("steps = " + "[" * 5000 + "]" * 5000, "not a readable TOML file: maximum recursion depth"),
        (None, "not a readable TOML file: "),  # a loop of symbolic links
    ],
)
def test_file_that_python_cannot_read_is_refused_with_one_line(tmp_path, text, message):
    path = tmp_path / "a.toml"
    path.symlink_to(path) if text is None else path.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        parse_config(Config, [str(path)])
    assert str(refusal.value).startswith(f"{path}: {message}") and "\n" not in str(refusal.value)


def test_mistake_in_an_extended_file_is_refused_by_that_file_s_name(write):
    base = write("base.toml", "stepz = 1")
    with pytest.raises(ConfigError, match=f"^{base}: unknown key 'stepz'"):
        parse_config(Config, [write("a.toml", "extends = 'base.toml'\nsteps = 1")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "1"], "command line: unknown flag '--lr'; the nearest known key is 'optimizer.lr'"),
        (
            ["--optimizer.lrr=1"],
            "command line: unknown flag '--optimizer.lrr'; the nearest known key is 'optimizer.lr'",
        ),
        (["--steps", "many"], "command line: Error parsing --steps: invalid literal for int() with base 10: 'many'"),
        (["--steps"], "command line: Missing value for argument '--steps'. Expected 1 values."),
        (["--steps", "0"], "command line: Error parsing Config: steps must be positive, got 0"),
        (
            ["--optimizer.name", "adam"],
            "command line: invalid choice 'adam' for argument '--optimizer.name'. Expected one of ('olion', 'muon').",
        ),
        (["--lrs.muon", "x"], "command line: key 'lrs' must be dict[str, float], got dict {'muon': 'x'}"),
        (["--steps", "1", "a.toml"], "command line: unexpected 'a.toml'; config files come before the flags"),
        (["absent.toml"], "config file not found: absent.toml; name an existing TOML file"),
    ],
)
def test_mistake_on_the_command_line_is_refused_with_one_line(flags, message):
    with pytest.raises(ConfigError) as error:
        parse_config(Config, flags)
    assert str(error.value) == message


def test_help_describes_every_knob_with_the_value_of_the_file(write, capsys):
    path = write("a.toml", "steps = 123\n")
    with pytest.raises(SystemExit) as exit_request:
        parse_config(Config, [path, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit_request.value.code == 0
    for expected in (
        "how many updates to make (default: 123)",
        "the peak rate (default: 0.0006)",
        "the rate of the rest",
    ):
        assert expected in text


def test_to_dict_survives_json_and_from_dict_rebuilds_the_config():
    config = Config(lrs={"a": 1.0}, optimizer=OptimizerConfig(coefficients=(1.0, 2.0), options={"b": 2.0}))
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_from_dict_refuses_an_unknown_key():
    with pytest.raises(ConfigError, match=r"config: unknown key 'optimizer.momentum'"):
        from_dict(Config, {"optimizer": {"momentum": 0.9}})


def test_import_does_not_load_torch_or_tyro():
    """Scripts that only read configs should start at once."""
    code = "import common.config, sys; assert not {'torch', 'tyro'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steps = " + "9" * 5000, "not a readable TOML file"),
        ("lrs = " + "[" * 10_000 + "]" * 10_000, "not a readable TOML file"),
        ('folder = "a\\u0000b"', "key 'folder' must be text without NUL"),
    ],
)
def test_file_that_python_cannot_hold_is_refused_in_one_line(write, content, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(Config, [write("a.toml", content)])
    assert "\n" not in str(caught.value)


def test_loop_of_links_is_refused_in_one_line(tmp_path):
    link = tmp_path / "a.toml"
    link.symlink_to(link)
    with pytest.raises(ConfigError, match=r"a\.toml: not a readable TOML file"):
        parse_config(Config, [str(link)])


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        (
            {"betas": [0.9, 0.98]},
            {"betas": [0.9, 0.99]},
            r"optimizer.options.betas .*\[0.9, 0.98\]; got \[0.9, 0.99",
        ),
        ({"scale": 0.2, "eps": 1e-7}, {"scale": 0.2}, "optimizer.options.eps of the checkpoint, 1e-07; got none"),
        ({}, {"scale": 0.1}, "optimizer.options.scale of the checkpoint, none; got 0.1"),
    ],
)
def test_a_changed_table_is_refused_by_the_entry_that_differs(was, now, message):
    configs = [{"steps": 3, "optimizer": {"name": "olion", "options": options}} for options in (was, now)]
    refuse_changes(configs[0], configs[0], ["optimizer"])
    refuse_changes(*configs, ["steps", "optimizer.name"])
    with pytest.raises(UserError, match=f"^--resume needs the {message}"):
        refuse_changes(*configs, ["optimizer"])


@pytest.mark.parametrize("seed", [-1, 2**31, 2**70])
def test_run_config_refuses_a_seed_that_numpy_does_not_take(seed):
    with pytest.raises(ConfigError, match="seed must be"):
        RunConfig(seed=seed)
