"""torchtitan's metrics in the run log of this repository, under the keys that all experiments share."""

import math
from pathlib import Path
from typing import Any

import torch
from torchtitan.components import metrics as titan
from torchtitan.tools.utils import device_type

from common import Diverged, config
from common.runlog import RunLog, run_name
from common.timer import Timer
from Llama.config import JobConfig

# Sections that make no other run: figures must not tell runs apart by them.
BOOKKEEPING = ("job", "profiling", "metrics", "comm", "memory_estimation", "fault_tolerance", "experimental", "debug")


def name_of(settings: JobConfig) -> str:
    """Name a run after what is varied."""
    optimizer = settings.optimizer
    return run_name(optimizer.name, optimizer.peak_lr(), settings.debug.seed, optimizer.adamw_lr)


def record_of(settings: JobConfig) -> dict[str, Any]:
    """Return what of a config tells runs apart, for config.json."""
    sections = {key: value for key, value in config.to_dict(settings).items() if key not in BOOKKEEPING}
    return {"seed": settings.debug.seed, **sections}


class MetricsProcessor(titan.MetricsProcessor):
    """torchtitan's, which also writes metrics.jsonl; `open` it once the checkpoint is loaded."""

    bits_per_byte_per_nat = math.nan  # of the validation text; the validator knows it

    def __init__(self, job_config: JobConfig, parallel_dims, model_args=None):
        super().__init__(job_config, parallel_dims)
        self.timer = Timer(torch.device(device_type))

    def open(self, step: int) -> None:
        """Start the run log, or continue it after `step`."""
        settings = self.job_config
        runlog = RunLog(
            Path(settings.job.dump_folder),
            config=record_of(settings),
            experiment="llama",
            name=name_of(settings),
            group=settings.job.group,
            tags=[settings.optimizer.name],
            wandb_mode=settings.metrics.wandb,
            resume_step=step or None,
            # torchtitan's choice: the first rank that has a loss, which under pipelines is not rank 0.
            is_main=torch.distributed.get_rank() == titan._get_metrics_rank(self.parallel_dims, settings),
        )
        self.logger = _Logger(self, self.logger, runlog)

    def should_log(self, step: int) -> bool:
        return super().should_log(step) or step == self.job_config.training.steps


class _Logger(titan.BaseLogger):
    """Hands what torchtitan logs to its own logger (TensorBoard, if asked for), and to the run log."""

    def __init__(self, processor: MetricsProcessor, inner: titan.BaseLogger, runlog: RunLog):
        self._processor, self._inner, self._runlog = processor, inner, runlog

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._inner.log(metrics, step)
        training = self._processor.job_config.training
        tokens = training.global_batch_size * training.seq_len
        kind = self._validation if "validation_metrics/loss" in metrics else self._training
        self._runlog.log(step, {"tokens": step * tokens, **kind(metrics, step, tokens)})

    def _validation(self, metrics: dict[str, Any], step: int, tokens: int) -> dict[str, float]:
        loss = metrics["validation_metrics/loss"]
        shared = {"val/loss": loss, "val/bits_per_byte": loss * self._processor.bits_per_byte_per_nat}
        if step == 0:
            shared["optimizer_state_mb"] = sum(each.state_size() for each in self._processor.optimizers) / 1e6
        return shared

    def _training(self, metrics: dict[str, Any], step: int, tokens: int) -> dict[str, float]:
        """Translate a line of training; raises Diverged, on all ranks, where it cannot go on."""
        loss, norm = metrics["loss_metrics/global_avg_loss"], metrics["grad_norm"]
        step_ms, optimizer_ms = self._processor.timer.medians()
        shared = {
            "train/loss": loss,
            "train/max_loss": metrics["loss_metrics/global_max_loss"],  # of the ranks' own means
            "lr": metrics["lr"],
            "grad_norm": norm,
            "step_ms": step_ms,
            "optimizer_ms": optimizer_ms,
            "data_ms": metrics["time_metrics/data_loading(s)"] * 1000,  # of one micro-batch
            "tokens_per_second": tokens / step_ms * 1000,  # of all ranks
            "peak_memory_mb": metrics["memory/max_active(GiB)"] * 1024,
        }
        if device_type != "cpu":  # whose peak torchtitan takes for an A100's
            shared["mfu"] = metrics["mfu(%)"] / 100
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(
                f"training needs finite losses and gradients, and step {step} had loss {loss} and gradient norm "
                f"{norm}; start anew with a lower learning rate, or resume from the last checkpoint with one"
            )
        return shared

    def close(self) -> None:
        self._inner.close()
        self._runlog.finish()
