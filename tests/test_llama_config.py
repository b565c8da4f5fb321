"""Llama's config: both files parse, every [optimizer] key is read, and what cannot work is one line, at once."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import Llama.cpu
from common.config import ConfigError
from common.optimizer_config import OptimizerConfig
from Llama.config import NOT_READ, parse_config
from optimizers import build_optimizer

CONFIGS = Path(__file__).resolve().parents[1] / "Llama/train_configs"
STDLIB, PAPER = str(CONFIGS / "stdlib.toml"), str(CONFIGS / "llama2_7b.toml")


@pytest.fixture
def eight_gpus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr("Llama.config.on_cpu", lambda: False)


def test_paper_config_matches_the_papers_settings(eight_gpus):
    settings = parse_config([PAPER])
    training, schedule = settings.training, settings.lr_scheduler
    assert training.global_batch_size * training.seq_len == 2 * 64 * 8 * 4096  # 4.19 M tokens
    assert (training.steps, training.max_norm, training.mixed_precision_param) == (8192, 1.0, "bfloat16")
    assert (settings.optimizer.lr, settings.optimizer.weight_decay) == (3e-4, 0.1)
    assert (schedule.warmup_steps, schedule.decay_type, schedule.min_lr_factor) == (2000, "linear", 0.1)
    assert settings.validation.seq_len == training.seq_len


def test_misspelt_key_of_a_file_refuses_with_the_nearest_key(tmp_path):
    (tmp_path / "bad.toml").write_text("[optimizer]\nmomentun = 0.9\n")
    with pytest.raises(ConfigError, match=r"bad.toml: unknown key 'optimizer.momentun'; .* 'optimizer.momentum'"):
        parse_config([str(tmp_path / "bad.toml")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer.momentum", "0.9"], "olion has no option 'momentum'"),
        (["--optimizer.name", "olio"], "did you mean 'olion'"),
        (["--optimizer.betas", "0.9", "1.5"], r"betas must be in \[0, 1\)"),
        (["--model.flavor", "7C"], "model.flavor must be one of debug, 7B"),
        (["--training.global_batch_size", "6"], r"global_batch_size must be a multiple of 4 .* got 6"),
        (["--parallelism.tensor_parallel_degree", "2"], "must divide 1"),
        (["--parallelism.data_parallel_shard_degree", "2"], "must use the 1 ranks there are"),
        (["--parallelism.pipeline_parallel_degree", "2"], "pipelines leave gradients"),
        (["--validation.freq", "0"], "freq must be 1 or more"),
    ],
)
def test_impossible_setting_refuses_in_one_line(flags, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_config([STDLIB, *flags])
    assert "\n" not in str(error.value)


def test_large_model_without_gpus_refuses_with_its_memory_and_the_small_command(monkeypatch):
    monkeypatch.setattr("Llama.config.on_cpu", lambda: True)
    monkeypatch.setattr(Llama.cpu.CPU, "get_device_properties", lambda: type("Small", (), {"total_memory": 24e9}))
    with pytest.raises(ConfigError, match=r"needs about 81 GB .* 24 GB .* bash Llama/run.sh"):
        parse_config([PAPER])


@pytest.mark.parametrize("name", NOT_READ)
def test_key_that_torchtitan_reads_and_this_repository_does_not_refuses(name, tmp_path):
    section, key = name.split(".")
    value = {"dataloader": "{num_workers = 2}", "steps": "3", "enable_wandb": "true", "enable": "true"}.get(key, '"x"')
    (tmp_path / "c.toml").write_text(f"[{section}]\n{key} = {value}\n")
    with pytest.raises(ConfigError, match=f"{re.escape(name)} must be left out, since nothing here reads it"):
        parse_config([STDLIB, str(tmp_path / "c.toml")])


def test_ranks_that_cannot_share_the_lanes_refuse(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"training.lanes must be a multiple of 3 .* got 8"):
        parse_config([STDLIB, "--training.global_batch_size", "12"])


def test_every_optimizer_key_matches_what_the_rule_is_built_with():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 8, bias=False))
    asked = {"betas": (0.8, 0.9), "ns_steps": 3, "ns_coefficients": "convergent", "weight_decay": 0.3}
    settings = OptimizerConfig(
        lr=1e-3, adamw_lr=2e-3, ns_dtype="bfloat16", state_dtype="bfloat16", wire_dtype="float32", **asked
    )
    matrices, rest = build_optimizer(model, settings.name, **settings.options()).param_groups
    dtypes = {"ns_dtype": torch.bfloat16, "state_dtype": torch.bfloat16, "wire_dtype": torch.float32}
    for key, value in (asked | dtypes | {"lr": 1e-3}).items():
        assert matrices[key] == value, key
    assert (rest["rule"], rest["lr"], rest["weight_decay"]) == ("adamw", 2e-3, 0.3)
    settings = OptimizerConfig(name="muon", lr=1e-3, momentum=0.7)
    (muon, _) = build_optimizer(model, settings.name, **settings.options()).param_groups
    assert muon["momentum"] == 0.7
