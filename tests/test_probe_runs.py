"""[probe] in the experiments: recorded at its steps, without an effect on training, refused in one line."""

import json
import math

import pytest
import torch
from ranks import Ranks
from test_train import EVEN, command_line, curves, run_folder
from tiny_gpt import write_config, write_corpus
from tiny_sit_run import train as train_sit
from tiny_sit_run import write_config as write_sit_config

from common.config import ConfigError, parse_config
from common.launch import Process
from common.runlog import read_metrics
from nanoGPT import train as training
from nanoGPT.train import Config

WATCHED = ("--probe.every", "4", "--probe.quantities", "norms", "isotropy", "spectrum")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def train(config, *arguments: str, rank: int = 0, size: int = 1) -> None:
    settings = parse_config(Config, command_line(config, *arguments))
    training.train(training.fit_vocabulary(settings), Process(rank, rank, size, torch.device("cpu"), size))


def train_on_rank(config, arguments: tuple[str, ...]) -> None:
    train(config, *arguments, rank=torch.distributed.get_rank(), size=torch.distributed.get_world_size())


def probed(folder) -> dict[int, dict]:
    lines = {line["step"]: {k: v for k, v in line.items() if k.startswith("probe/")} for line in read_metrics(folder)}
    return {step: values for step, values in lines.items() if values}


def test_a_probed_run_records_its_steps_and_repeats_the_run_without(tmp_path, corpus):
    plain, watched = (write_config(tmp_path / name, corpus, EVEN) for name in map(make(tmp_path), ("plain", "watched")))
    train(plain)
    train(watched, *WATCHED)
    found = probed(run_folder(watched))
    assert list(found) == [1, 4, 8, 12]
    assert {key.split("/")[1] for key in found[1]} == {"32x32", "96x32", "128x32", "32x128", "ms"}
    assert found[12]["probe/128x32/weight_spectral"] > 0 and 0 < found[12]["probe/128x32/isotropy"] < 1
    assert len(found[12]["probe/128x32/weight_entries"]) == 33
    without = [{k: v for k, v in line.items() if not k.startswith("probe/")} for line in curves(watched)]
    assert without == curves(plain)  # bit for bit: the same process, kernels and threads


def make(folder):
    """Return a function that makes a folder in this one, and returns its name."""

    def made(name: str) -> str:
        (folder / name).mkdir()
        return name

    return made


@pytest.mark.slow
def test_probes_of_two_fsdp_ranks_match_those_of_one_process(tmp_path, corpus):
    names = map(make(tmp_path), ("alone", "several"))
    alone, several = (write_config(tmp_path / name, corpus, EVEN) for name in names)
    exact = ("--dtype", "float64", "--probe.every", "4")
    train(alone, *exact)
    with Ranks(2) as ranks:
        ranks(train_on_rank, several, (*exact, "--parallel.mode", "fsdp", "--data.micro_batch", "2"))
    expected, found = probed(run_folder(alone)), probed(run_folder(several))
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        for key in values.keys() - {"probe/ms"}:
            # Sums in another order; flipped signs are of an orthogonalization in float32.
            assert found[step][key] == pytest.approx(values[key], rel=1e-6, abs=1e-3 if "flipped" in key else 1e-6), key


def test_a_probed_sit_records_rules_with_and_without_directions(tmp_path):
    for name in ("olion", "adamw"):
        config = write_sit_config(tmp_path / name)
        train_sit(config, "--optimizer.name", name, "--probe.every", "2")
        (folder,) = (config.parent / "runs" / "default").iterdir()
        found = probed(folder)
        assert list(found) == [1, 2, 4]
        quantities = {key.split("/")[2] for key in found[4] if key != "probe/ms"}
        assert "cosine" in quantities and ("isotropy" in quantities) == (name == "olion")
        assert all(math.isfinite(value) for value in found[4].values())


@pytest.mark.parametrize("config_class", ["nanoGPT.train.Config", "SIT.train.Config", "Llama.config.JobConfig"])
def test_an_interval_of_no_steps_is_refused_in_one_line(config_class):
    module, _, name = config_class.rpartition(".")
    config = getattr(__import__(module, fromlist=[name]), name)
    with pytest.raises(ConfigError, match="every must be 1 step or more, or None for never; got 0") as error:
        parse_config(config, ["--probe.every", "0"])
    assert "\n" not in str(error.value)


def test_a_pattern_without_a_match_is_refused_before_the_first_step(tmp_path, corpus):
    config = write_config(tmp_path, corpus, EVEN)
    with pytest.raises(ValueError, match=r"'\*.c_fcc.weight' fits none of .*; did you mean"):
        train(config, "--probe.every", "4", "--probe.matrices", "*.c_fcc.weight")
    with pytest.raises(ValueError, match="lion orthogonalizes nothing"):
        train(config, "--probe.every", "4", "--probe.quantities", "isotropy", "--optimizer.name", "lion")
    assert not (tmp_path / "runs").exists()


def test_metrics_with_distributions_stay_one_json_object_per_line(tmp_path, corpus):
    config = write_config(tmp_path, corpus, EVEN)
    train(config, *WATCHED, "--steps", "1")
    for line in (run_folder(config) / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no NaN
