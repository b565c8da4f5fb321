"""Train a Llama-2 with one of the optimizers, through torchtitan.

    torchrun --standalone --nproc-per-node 8 -m Llama.train Llama/train_configs/llama2_7b.toml
    torchrun --standalone --nproc-per-node 2 -m Llama.train Llama/train_configs/stdlib.toml --optimizer.name muon
    python -m Llama.train Llama/train_configs/stdlib.toml --job.resume

The run's folder, runs/llama/GROUP/NAME, holds metrics.jsonl, config.json, checkpoint/ and wandb/. Every section and
flag of torchtitan 0.2.2 is there, but for those that Llama/config.py replaces; --help lists them.
"""

import logging
import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torchtitan import train as titan
from torchtitan.tools.logging import init_logger

import Llama.spec  # noqa: F401  (registers the TrainSpec)
from common import launch
from common.runlog import move_aside
from Llama.config import JobConfig, parse_config
from Llama.metrics import name_of


class Trainer(titan.Trainer):
    """torchtitan's trainer, with a validation at step 0, and times."""

    def __init__(self, job_config: JobConfig):
        super().__init__(job_config)
        self.timer = self.metrics_processor.timer
        self.optimizers.register_step_pre_hook(lambda *_: self.timer.optimizer())
        self.optimizers.register_step_post_hook(lambda *_: self.timer.stop())

    def batch_generator(self, data_iterable):
        """Begin: torchtitan calls this once, when the checkpoint is loaded and before the first step."""
        self.metrics_processor.open(self.step)
        if self.step == 0 and self.job_config.validation.enable:
            self.validator.validate(self.model_parts, 0)
        return super().batch_generator(data_iterable)

    def forward_backward_step(self, *, global_valid_tokens: torch.Tensor, **batch) -> torch.Tensor:
        """Make DDP's mean over ranks a sum, as FSDP's is here: torchtitan's losses are shares of the global mean."""
        dims = self.parallel_dims
        ranks = dims.dp_replicate if dims.dp_replicate_enabled and not dims.fsdp_enabled else 1
        return super().forward_backward_step(global_valid_tokens=global_valid_tokens / ranks, **batch) / ranks

    def train_step(self, data_iterator) -> None:
        self.timer.start()
        super().train_step(data_iterator)


def main() -> None:
    """Read the configuration and train."""
    settings = parse_config()
    for name, alone in [("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")]:
        os.environ.setdefault(name, alone)  # torchrun's; without it this is the only process
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "0")
    is_main = os.environ["RANK"] == "0"
    init_logger()
    logging.getLogger().setLevel(logging.INFO if is_main else logging.WARNING)
    warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype is not supported")

    folder = Path(settings.job.dump_folder, settings.job.group, name_of(settings))
    settings = replace(settings, job=replace(settings.job, dump_folder=str(folder)))
    if is_main and not settings.job.resume:
        move_aside(folder)  # before this rank joins the others, who look for checkpoints after that
    train(settings)
    launch.stop()


def train(settings: JobConfig) -> None:
    """Train to the end."""
    torch.set_flush_denormal(True)  # saturated attention is subnormal: see nanoGPT/train.py
    trainer = None
    try:
        trainer = Trainer(settings)
        trainer.train()
    finally:
        if trainer:
            trainer.close()


if __name__ == "__main__":
    launch.main_guard(main)
