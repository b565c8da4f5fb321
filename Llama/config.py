"""Settings of a run: its options (Llama/options.py), read, checked and filled in.

    settings = parse_config(["Llama/train_configs/stdlib.toml", "--optimizer.name", "muon"])

Options of the optimizer are checked when the config is read.
"""

import os
from dataclasses import replace
from pathlib import Path

from torch import nn

from common.config import ConfigError
from common.config import parse_config as parse
from Llama.checks import (
    check_batches,
    check_data,
    check_flavor,
    data_ranks,
    is_fine_tuning,
    shape_of,
)
from Llama.options import JobConfig
from Llama.sections import check_sections
from Llama.weights import check_weights, find_weights
from optimizers import build_optimizer
from optimizers.build import check_name


def parse_config(argv: list[str] | None = None) -> JobConfig:
    """Read and check `[CONFIG.toml ...] [--section.key value ...]`; see common.config.

    Raises ConfigError for settings that are unknown, unread, of a wrong type, or impossible with this many ranks.
    """
    settings = parse(JobConfig, argv)
    check_sections(settings, JobConfig())
    fake = settings.comm.mode == "fake_backend"  # torchtitan's dry run: one process simulates NGPU ranks
    world_size = int(os.environ.get("NGPU" if fake else "WORLD_SIZE", 1))
    check_flavor(settings)
    check_data(settings)
    ranks = data_ranks(settings, world_size)
    check_batches(settings, ranks)
    settings = filled_in(settings, ranks)
    for name in (settings.optimizer.name, *settings.optimizer.tuned_lr):
        check_name(name)
    # Checks the options on a stand-in for the model.
    build_optimizer(nn.Linear(2, 2), settings.optimizer.name, **settings.optimizer.arguments())
    return with_weights(settings)


def filled_in(settings: JobConfig, ranks: int) -> JobConfig:
    """Fill in settings that default to other settings."""
    training, validation = settings.training, settings.validation
    share = training.global_batch_size // ranks
    most = min(training.local_batch_size, share)
    training = replace(training, local_batch_size=next(size for size in range(most, 0, -1) if share % size == 0))
    if validation.dataset is None:
        validation = replace(validation, dataset=training.dataset, dataset_path=training.dataset_path)
    validation = replace(
        validation,
        seq_len=validation.seq_len or training.seq_len,
        local_batch_size=validation.local_batch_size or training.local_batch_size,
    )
    return replace(settings, training=training, validation=validation)


def with_weights(settings: JobConfig) -> JobConfig:
    """Find the initial weights; raises ConfigError or UserError if they are missing or of another model."""
    path, model = settings.checkpoint.initial_load_path, settings.model
    if path is None and is_fine_tuning(settings):
        raise ConfigError(
            "fine-tuning needs weights to start from, and checkpoint.initial_load_path is not set; name a folder of "
            "Hugging Face weights, or a run"
        )
    if path is None:
        return settings
    if not settings.checkpoint.enable:
        raise ConfigError(
            "checkpoint.initial_load_path needs checkpoint.enable, got false: torchtitan's checkpointing loads it; to "
            "save none, set checkpoint.load_only"
        )
    folder, is_hf = find_weights(Path(path))
    check_weights(folder, is_hf, shape_of(model), f"{model.name} {model.flavor}")
    checkpoint = replace(settings.checkpoint, initial_load_path=str(folder), initial_load_in_hf=is_hf)
    return replace(settings, checkpoint=checkpoint)
