"""Llama's config: both files parse, every [optimizer] key is read, and impossible settings are one line at start."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import Llama.cpu
from common import UserError
from common.config import ConfigError
from common.optimizer_config import OptimizerConfig
from Llama.config import JobConfig, parse_config
from Llama.sections import NOT_READ, flat
from optimizers import build_optimizer

CONFIGS = Path(__file__).resolve().parents[1] / "Llama/train_configs"
STDLIB, PAPER, TUNED = (str(CONFIGS / f"{name}.toml") for name in ("stdlib", "llama2_7b", "sft_llama3_8b"))


@pytest.fixture
def eight_gpus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr("Llama.checks.on_cpu", lambda: False)


def test_help_without_torchtitans_imports_lists_what_it_would_with_them(capsys):
    with pytest.raises(SystemExit):
        parse_config([STDLIB, "--help"])
    command = [sys.executable, "-m", "Llama.train", STDLIB, "--help"]
    printed = subprocess.run(command, cwd=CONFIGS.parents[1], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("usage: python -m Llama.train [CONFIG.toml ...] [-h] [OPTIONS]\n")
    words, expected = (re.sub(r"\W+", "", text.partition("\n")[2]) for text in (printed, capsys.readouterr().out))
    assert words == expected and "parallelism" in words


def test_paper_config_matches_the_papers_settings(eight_gpus):
    settings = parse_config([PAPER])
    training, schedule = settings.training, settings.lr_scheduler
    assert training.global_batch_size * training.seq_len == 2 * 64 * 8 * 4096  # 4.19 M tokens
    assert (training.steps, training.max_norm, training.mixed_precision_param) == (8192, 1.0, "bfloat16")
    assert (settings.optimizer.lr, settings.optimizer.weight_decay) == (3e-4, 0.1)
    assert (schedule.warmup_steps, schedule.decay_type, schedule.min_lr_factor) == (2000, "linear", 0.1)
    assert settings.validation.seq_len == training.seq_len


def test_fine_tuning_config_matches_the_papers_settings(eight_gpus, tmp_path, monkeypatch):
    monkeypatch.setattr("Llama.config.check_weights", lambda *_: None)
    (tmp_path / "model.safetensors").touch()
    settings = parse_config([TUNED, "--checkpoint.initial_load_path", str(tmp_path)])
    training, schedule, optimizer = settings.training, settings.lr_scheduler, settings.optimizer
    assert (training.dataset, training.seq_len, training.global_batch_size) == ("mathinstruct", 2048, 512)
    assert (training.steps, training.max_norm, training.mixed_precision_param) == (1533, 1.0, "bfloat16")
    assert (optimizer.lr, optimizer.weight_decay, schedule.warmup_steps) == (3e-5, 0.1, 100)
    assert (schedule.decay_type, schedule.min_lr_factor) == ("cosine", 0.1)
    assert settings.checkpoint.initial_load_in_hf  # by its files
    with pytest.raises(ConfigError, match=r"initial_load_path needs checkpoint\.enable"):
        parse_config([TUNED, "--checkpoint.initial_load_path", str(tmp_path), "--checkpoint.no-enable"])


def test_misspelt_key_of_a_file_refuses_with_the_nearest_key(tmp_path):
    (tmp_path / "bad.toml").write_text("[optimizer]\ntuned_rl = 0.9\n")
    with pytest.raises(ConfigError, match=r"bad.toml: unknown key 'optimizer.tuned_rl'; .* 'optimizer.tuned_lr'"):
        parse_config([str(tmp_path / "bad.toml")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer.options.momentum", "0.9"], "olion has no option 'momentum'"),
        (["--optimizer.name", "olio"], "did you mean 'olion'"),
        (["--optimizer.tuned_lr.oilon", "1e-3"], "did you mean 'olion'"),
        (["--optimizer.options.scal", "0.1"], "did you mean 'scale'"),
        (["--optimizer.options.lr", "0.1"], "set optimizer.lr"),
        (["--optimizer.options.betas", "[0.9, 1.5]"], r"betas must be 2 numbers in \[0, 1\)"),
        (["--model.flavor", "7C"], "model.flavor must be one of debug, 7B"),
        (["--training.dataset", "instruction"], "training.dataset must be one of c4, .*; got 'instruction'"),
        (["--validation.dataset", "mathinstruct"], "validation.dataset must be one of c4, .*; got 'mathinstruct'"),
        (["--validation.pretrain_dataset", "text"], "pretrain_dataset needs fine-tuning"),
        (["--lr_scheduler.total_steps", "9"], "total_steps must be training.steps 400 or more"),
        (["--checkpoint.load_step", "3"], "load_step needs job.resume, .* got 3 alone"),
        (["--comm.mode", "local_tensor"], "does not train"),
        (["--checkpoint.interval", "0"], "interval must be 1 or more"),
        (["--parallelism.tensor_parallel_degree", "0"], "tensor_parallel_degree must be 1 or more"),
        (["--parallelism.tensor_parallel_degree", "8"], "must divide the 4 key and value heads"),
        (["--parallelism.tensor_parallel_degree", "2"], "tensor_parallel_degree must divide the 1 ranks"),
        (["--parallelism.data_parallel_shard_degree", "2"], "must use the 1 ranks there are"),
        (["--parallelism.pipeline_parallel_degree", "2"], "pipelines sum gradients"),
        (["--parallelism.context_parallel_degree", "2"], "context_parallel_degree must be 1, got 2"),
        (["--model.name", "llama3"], "model.name must be one of llama2, llama3.1, qwen2.5; got 'llama3'"),
        (["--fine_tuning.template", "chatml"], "template must be one of question, alpaca, llama3; got 'chatml'"),
        (["--fine_tuning.packing"], "packing needs instructions"),
        (
            ["--training.dataset", "instructions", "--validation.dataset", "instructions"],
            "fine-tuning needs weights to start from",
        ),
        (["--checkpoint.initial_load_path", "nowhere"], "weights are .*; nowhere does not exist"),
        (["--validation.freq", "0"], "freq must be 1 or more"),
        (["--training.max_norm", "-1"], "max_norm must be 0 or more; got -1"),
        (["--training.max_norm", "nan"], "training.max_norm must be finite; got nan"),
        (["--training.gc_freq", "0"], "gc_freq must be 1 or more"),
        (["--training.seq_len", "33"], "seq_len must be even"),
        (["--training.enable_cpu_offload"], "enable_cpu_offload must be false"),
        (["--checkpoint.async_mode", "async_with_pinned_mem"], "async_mode must be disabled or async"),
        (["--checkpoint.keep_latest_k", "-1"], "keep_latest_k must be 0 or more; got -1"),
        (["--profiling.enable_memory_snapshot"], "enable_memory_snapshot needs a GPU"),
        (["--profiling.profile_freq", "0"], "profile_freq must be 1 or more"),
        (["--lr_scheduler.warmup_steps", "-1"], "warmup_steps must be between 0 and 400 steps; got -1"),
        (["--lr_scheduler.warmup_steps", "401"], "warmup_steps must be between 0 and 400 steps; got 401"),
        (["--lr_scheduler.decay_ratio", "5"], "decay_ratio must be a fraction, between 0 and 1; got 5"),
        (["--lr_scheduler.min_lr_factor", "nan"], "min_lr_factor must be finite; got nan"),
        (["--lr_scheduler.min_lr_factor", "2"], "min_lr_factor must be a fraction, between 0 and 1; got 2"),
        (["--optimizer.lr", "inf"], "lr must be finite"),
        (["--optimizer.weight_decay", "inf"], "weight_decay must be finite"),
        (["--optimizer.adamw_lr", "nan"], "adamw_lr must be finite"),
        (["--debug.seed", str(2**70)], "debug.seed must be at most 9223372036854775807"),
        (["--debug.seed", "-1"], "debug.seed must be 0 or more"),
        (["--debug.seed", "2**70"], "2\\*\\*70"),
        (["--training.steps", str(2**31)], "training.steps must be at most 2147483647"),
        (["--training.seq_len", "9" * 500], r"seq_len must be at most 2147483647; got 9{40}$"),
        (["--training.lanes", str(10**6)], "training.lanes must be at most 65536"),
        (["--validation.seq_len", "-2"], "validation.seq_len must be 0 or more"),
        (["--validation.local_batch_size", "-1"], "local_batch_size must be 0 or more"),
        (["--validation.pretrain_path", "x"], r"pretrain_path needs validation.pretrain_dataset"),
        (["--parallelism.data_parallel_shard_degree", "0"], "shard_degree must be 1 or more, or -1"),
        (["--parallelism.data_parallel_shard_degree", "-2"], "shard_degree must be 1 or more, or -1"),
        (["--parallelism.data_parallel_replicate_degree", "0"], "replicate_degree must be 1 or more"),
        (["--parallelism.enable_async_tensor_parallel"], r"enable_async_tensor_parallel needs compile.enable"),
        (["--comm.init_timeout_seconds", "0"], "init_timeout_seconds must be 1 or more"),
        (["--comm.train_timeout_seconds", "-1"], "train_timeout_seconds must be 1 or more"),
        (["--checkpoint.load_step", "-2", "--job.resume"], "load_step must be -1 or more"),
        (["--checkpoint.exclude_from_loading", "rng"], "must be of model, optimizer, .*; got 'rng'"),
        (["--activation_checkpoint.selective_ac_option", "0"], "must be op, or a number of layers; got '0'"),
        (["--activation_checkpoint.selective_ac_option", "x"], "must be op, or a number of layers; got 'x'"),
        (["--activation_checkpoint.memory_budget", "2"], "memory_budget must be between 0 and 1; got 2"),
        (["--activation_checkpoint.mode", "memory_budget"], r"memory_budget needs compile.enable"),
        (["--activation_checkpoint.determinism_check", "x"], "must be default or none"),
        (["--compile.components", "modle"], "components must be of model, loss; got 'modle'"),
        (["--compile.enable", "--compile.backend", "gcc"], "backend must be one of .*inductor.*; got 'gcc'"),
        (["--fine_tuning.held_out", "-1"], "held_out must be 0 or more"),
        (["--parallelism.pipeline_parallel_degree", "0"], "pipeline_parallel_degree must be 1, got 0"),
        (["--parallelism.context_parallel_degree", "0"], "context_parallel_degree must be 1, got 0"),
        (["--job.group", "../../.."], "job.group must name a folder below the runs'; got '../../..'"),
        (["--job.group", ""], "job.group must name a folder"),
        (["--job.group", "/tmp/x"], "job.group must name a folder"),
        (["--nosuch.flag", "1"], "unknown flag '--nosuch.flag'; see --help"),
    ],
)
def test_impossible_setting_refuses_in_one_line(flags, message):
    with pytest.raises((UserError, ValueError), match=message) as error:
        parse_config([STDLIB, *flags])
    assert "\n" not in str(error.value)


def test_nul_in_a_path_refuses_in_one_line(tmp_path):
    (tmp_path / "c.toml").write_text('[job]\ngroup = "a\\u0000b"\n')
    with pytest.raises(ConfigError, match=r"job.group' must be text without NUL, got 'a\\x00b'"):
        parse_config([STDLIB, str(tmp_path / "c.toml")])


def test_profile_shorter_than_its_parts_refuses(monkeypatch):
    monkeypatch.setattr("Llama.sections.on_cpu", lambda: False)
    with pytest.raises(
        ConfigError, match=r"profile_freq must be profiler_warmup \+ profiler_active, 4 steps, or more; got 3"
    ):
        parse_config([STDLIB, "--profiling.enable_profiling", "--profiling.profile_freq", "3"])


def test_large_model_without_gpus_refuses_with_its_memory_and_the_small_command(monkeypatch):
    monkeypatch.setattr("Llama.checks.on_cpu", lambda: True)
    monkeypatch.setattr(Llama.cpu.CPU, "get_device_properties", lambda: type("Small", (), {"total_memory": 24e9}))
    with pytest.raises(ConfigError, match=r"needs about 81 GB .* 24 GB .* bash Llama/run.sh"):
        parse_config([PAPER])


LITERALS = {
    "expert_parallel_comm_backend": '"deepep"',
    "context_parallel_rotate_method": '"alltoall"',
    "module_fqns_per_model_part": '[["x"]]',
}


@pytest.mark.parametrize("name", NOT_READ)
def test_key_that_torchtitan_reads_and_this_repository_does_not_refuses(name, tmp_path):
    full, default = next(
        item for item in flat(JobConfig()).items() if item[0] == name or item[0].startswith(f"{name}.")
    )
    section, _, key = full.rpartition(".")
    value = '["x"]' if isinstance(default, list) else '"x"'
    if key in LITERALS or isinstance(default, bool):
        value = LITERALS.get(key) or str(not default).lower()
    elif isinstance(default, int) or key == "pipeline_parallel_layers_per_stage":
        value = "3"
    (tmp_path / "c.toml").write_text(f"[{section}]\n{key} = {value}\n")
    with pytest.raises(ConfigError, match=f"{re.escape(name)} must be left out, since nothing here reads it"):
        parse_config([STDLIB, str(tmp_path / "c.toml")])


def test_ranks_that_cannot_share_the_lanes_refuse(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"training.lanes must be a multiple of the 3 .* got 8"):
        parse_config([STDLIB, "--training.global_batch_size", "12"])
    with pytest.raises(ConfigError, match=r"global_batch_size must be a multiple of the 3 .* got 8"):
        parse_config([STDLIB])


@pytest.mark.parametrize(("ranks", "local"), [(1, 4), (2, 4), (4, 2), (8, 1)])
def test_micro_batches_match_a_ranks_share_of_the_global_batch(ranks, local, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert parse_config([STDLIB]).training.local_batch_size == local


def test_every_optimizer_key_matches_an_option_of_the_built_rule():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 8, bias=False))
    asked = {"betas": (0.8, 0.9), "ns_steps": 3, "ns_coefficients": "convergent", "scale": 0.1, "ns_form": "gram"}
    names = {"ns_dtype": "bfloat16", "state_dtype": "bfloat16", "wire_dtype": "float32"}
    settings = OptimizerConfig(lr=1e-3, adamw_lr=2e-3, weight_decay=0.3, options={**asked, **names})
    matrices, rest = build_optimizer(model, settings.name, **settings.arguments()).param_groups
    dtypes = {"ns_dtype": torch.bfloat16, "state_dtype": torch.bfloat16, "wire_dtype": torch.float32}
    for key, value in (asked | dtypes | {"lr": 1e-3, "weight_decay": 0.3}).items():
        assert matrices[key] == value, key
    assert (rest["rule"], rest["lr"], rest["weight_decay"]) == ("adamw", 2e-3, 0.3)
    settings = OptimizerConfig(name="muon", lr=1e-3, options={"momentum": 0.7, "nesterov": False})
    (muon, _) = build_optimizer(model, settings.name, **settings.arguments()).param_groups
    assert (muon["momentum"], muon["nesterov"]) == (0.7, False)


@pytest.mark.parametrize("lost", [".metadata", "__0_0.distcp", "manifest.json"])
def test_checkpoint_that_lost_a_file_refuses_and_names_it(tmp_path, lost):
    from common.manifest import write_manifest
    from Llama.checkpoints import find_step

    step = tmp_path / "step-1"
    step.mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (step / name).write_bytes(b"\x00")
    write_manifest(step, {"step": 1})
    (step / lost).unlink()
    with pytest.raises(UserError, match=r"a checkpoint must be undamaged; none in .* is") as refused:
        find_step(tmp_path)
    assert lost == "manifest.json" or lost in str(refused.value)
