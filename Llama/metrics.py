"""torchtitan's metrics in the run log of this repository, under the keys that all experiments share."""

from pathlib import Path
from typing import Any

import torch
from torchtitan.components import metrics as titan
from torchtitan.tools.utils import device_type

from common import config
from common.runlog import RunLog, run_name
from common.timer import Timer
from Llama.config import JobConfig, peak_lr

# What nanoGPT calls it. The rest keeps torchtitan's name.
SHARED_KEYS = {
    "loss_metrics/global_avg_loss": "train/loss",
    "validation_metrics/loss": "val/loss",
    "throughput(tps)": "tokens_per_second",  # of one device; made the run's below
}
# Settings that make no other run: figures must not tell runs apart by them.
BOOKKEEPING = ("job", "profiling", "metrics", "comm", "memory_estimation", "fault_tolerance", "experimental", "debug")


def name_of(settings: JobConfig) -> str:
    """Name a run after what is varied."""
    optimizer = settings.optimizer
    return run_name(optimizer.name, peak_lr(optimizer), settings.debug.seed, optimizer.adamw_lr)


class MetricsProcessor(titan.MetricsProcessor):
    """torchtitan's, which also writes metrics.jsonl; open() it once the checkpoint is loaded."""

    bits_per_nat = float("nan")  # of validation text, a byte; set by the validator

    def __init__(self, job_config: JobConfig, parallel_dims, model_args=None):
        super().__init__(job_config, parallel_dims)
        self.timer = Timer(torch.device(device_type))
        self.rank = titan._get_metrics_rank(parallel_dims, job_config)

    def open(self, step: int) -> None:
        """Start the run log, or continue it after `step`."""
        settings = self.job_config
        record = {key: value for key, value in config.to_dict(settings).items() if key not in BOOKKEEPING}
        runlog = RunLog(
            Path(settings.job.dump_folder),
            config={"seed": settings.debug.seed, **record},
            experiment="llama",
            name=name_of(settings),
            group=settings.job.group,
            tags=[settings.optimizer.name],
            wandb_mode=settings.metrics.wandb,
            resume_step=step or None,
            is_main=torch.distributed.get_rank() == self.rank,
        )
        self.logger = _Logger(self, self.logger, runlog)

    def should_log(self, step: int) -> bool:
        return super().should_log(step) or step == self.job_config.training.steps


class _Logger(titan.BaseLogger):
    """Hands what torchtitan logs to its own logger (TensorBoard, if asked for) and to the run log."""

    def __init__(self, processor: MetricsProcessor, inner: titan.BaseLogger, runlog: RunLog):
        self.processor, self.inner, self.runlog = processor, inner, runlog

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.inner.log(metrics, step)
        training = self.processor.job_config.training
        shared = {"tokens": step * training.global_batch_size * training.seq_len}
        shared |= {SHARED_KEYS.get(key, key): value for key, value in metrics.items()}
        if "val/loss" in shared:
            shared["val/bits_per_byte"] = shared["val/loss"] * self.processor.bits_per_nat
        else:
            shared["step_ms"], shared["optimizer_ms"] = self.processor.timer.medians()
            shared["tokens_per_second"] = training.global_batch_size * training.seq_len / shared["step_ms"] * 1000
        if step == 0:
            optimizers = self.processor.optimizers
            shared["optimizer_state_mb"] = sum(optimizer.state_size() for optimizer in optimizers) / 1e6
        self.runlog.log(step, shared)

    def close(self) -> None:
        self.inner.close()
        self.runlog.finish()
