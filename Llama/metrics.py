"""torchtitan's metrics in this repository's run log, under the keys of all experiments."""

import hashlib
import math
from pathlib import Path
from typing import Any, NoReturn

import torch
from torchtitan.components import metrics as titan
from torchtitan.tools.utils import device_type

from common import Diverged, config, gpu, launch
from common.runlog import RunLog, run_name, write_end
from common.timer import Timer
from Llama.checks import is_fine_tuning
from Llama.config import JobConfig

# Sections that do not distinguish runs in figures.
BOOKKEEPING = ("job", "profiling", "metrics", "comm", "memory_estimation", "fault_tolerance", "experimental", "debug")


def name_of(settings: JobConfig) -> str:
    """Return a run's name, from the settings that are varied."""
    optimizer = settings.optimizer
    return run_name(optimizer.name, optimizer.peak_lr(), settings.debug.seed, optimizer.adamw_lr)


def record_of(settings: JobConfig) -> dict[str, Any]:
    """Return the settings that distinguish runs, for config.json."""
    sections = {key: value for key, value in config.to_dict(settings).items() if key not in BOOKKEEPING}
    tokenizer = Path(settings.model.hf_assets_path, "tokenizer.json")  # it may be prepared again, differently
    digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else None
    return {"seed": settings.debug.seed, "tokenizer": digest, **sections}


def work(settings: JobConfig) -> tuple[str, int]:
    """Return the unit of data and its number per step: tokens, or rows in fine-tuning, where many are padding."""
    training = settings.training
    if is_fine_tuning(settings):
        return "rows", training.global_batch_size
    return "tokens", training.global_batch_size * training.seq_len


class MetricsProcessor(titan.MetricsProcessor):
    """torchtitan's processor, which also writes metrics.jsonl; `open` it after the checkpoint is loaded."""

    def __init__(self, job_config: JobConfig, parallel_dims, model_args=None):
        super().__init__(job_config, parallel_dims)
        self.timer = Timer(torch.device(device_type))
        peak = None if device_type == "cpu" else gpu.peak_flops(self.device_memory_monitor.device_name)
        self.knows_peak = peak is not None
        self.gpu_peak_flops = peak or self.gpu_peak_flops  # for the console's MFU; else torchtitan's guess
        self.probed: dict[str, Any] = {}  # measured before this step's update

    def open(self, step: int) -> None:
        """Open the run log, new or continued after `step`."""
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
            is_main=launch.process_rank() == 0,
        )
        self.logger = _Logger(self, self.logger, runlog)

    def should_log(self, step: int) -> bool:
        return super().should_log(step) or step == self.job_config.training.steps or bool(self.probed)


class _Logger(titan.BaseLogger):
    """Passes torchtitan's metrics to its own logger (TensorBoard, if enabled) and to the run log."""

    def __init__(self, processor: MetricsProcessor, inner: titan.BaseLogger, runlog: RunLog):
        self._processor, self._inner, self._runlog = processor, inner, runlog

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Log metrics of training or validation; raises Diverged, on all ranks, for non-finite losses or gradients."""
        self._inner.log(metrics, step)
        settings = self._processor.job_config
        training, (unit, per_step) = settings.training, work(settings)
        if "validation_metrics/loss" in metrics:
            shared = self._validation(metrics, step)
        else:
            shared = self._training(metrics)
            shared[f"{unit}_per_second"] = per_step / shared["step_ms"] * 1000  # of all ranks
        self._runlog.log(step, {unit: step * per_step, **shared})
        if "val/loss" in shared:
            if step == training.steps:
                self._last_validation(step, shared)
            return
        loss, norm = shared["train/loss"], shared["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._diverged(step, f"losses and gradients, and step {step} had loss {loss} and gradient norm {norm}")

    def _last_validation(self, step: int, validation: dict[str, float]) -> None:
        if not math.isfinite(validation["val/loss"]):
            self._diverged(step, f"losses, and the last validation, after step {step}, was {validation['val/loss']}")
        self._end(step, validation)

    def _diverged(self, step: int, needed: str) -> NoReturn:
        self._end(step, {})
        raise Diverged(
            f"training needs finite {needed}; start over with a lower learning rate, or from the weights of an earlier "
            "step: --checkpoint.initial_load_path RUN/checkpoint/step-N"
        )

    def _end(self, step: int, validation: dict[str, float]) -> None:
        if launch.process_rank() == 0:
            write_end(Path(self._processor.job_config.job.dump_folder), step, validation)

    def _validation(self, metrics: dict[str, Any], step: int) -> dict[str, float]:
        shared = {"val/loss": metrics["validation_metrics/loss"]}
        shared |= {key: value for key, value in metrics.items() if key.startswith("val/")}
        if step == 0:
            shared["optimizer_state_mb"] = sum(each.state_size() for each in self._processor.optimizers) / 1e6
        return shared

    def _training(self, metrics: dict[str, Any]) -> dict[str, float]:
        step_ms, optimizer_ms = self._processor.timer.medians()
        shared = {
            "train/loss": metrics["loss_metrics/global_avg_loss"],
            "train/max_loss": metrics["loss_metrics/global_max_loss"],  # of the ranks' own means
            "lr": metrics["lr"],
            "grad_norm": metrics["grad_norm"],
            "step_ms": step_ms,
            "optimizer_ms": optimizer_ms,
            "data_ms": metrics["time_metrics/data_loading(s)"] * 1000,  # of one micro-batch
            "peak_memory_mb": metrics["memory/max_active(GiB)"] * 1024,
        }
        shared |= self._processor.probed
        if self._processor.knows_peak:  # torchtitan assumes an A100 otherwise
            shared["mfu"] = metrics["mfu(%)"] / 100
        return shared

    def close(self) -> None:
        self._inner.close()
        self._runlog.finish()
