"""A training run: its folder, step, counters, log, progress bar, checkpoints, requests to stop, and end.

    with Run(settings, process, ...) as run:
        for step in run.steps():
            ...                                    # the experiment's own: losses and gradient norm, then
            (loss,), norm = run.read(losses, norm)
            if run.accepts(loss, norm):
                optimizer.step()
            run.count_step()
            run.log({"train/loss": loss, **run.measurements()} if run.is_due(settings.log_every) else {})
            run.save_if_due()

A Run never calls the model, the loss or `optimizer.step()`: a train.py still reads as its algorithm.
"""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from common import Diverged, checkpoint, config, launch, progress, warn
from common.json_files import check
from common.runlog import RunLog, move_aside, run_name, write_end
from common.schedule import multiplier
from common.timer import Timer

RUNS_AFTER = "RUNS_AFTER"  # set by run scripts: the number of runs that follow this one
MAX_SKIPPED = 10  # non-finite steps in a row that end a run; fp16's loss scale recovers within fewer
EXTRA = {"config": dict, "scaler": dict, "skipped": int, "in_a_row": int}  # a checkpoint's fields besides tensors


def execute(train: Callable[[Any, launch.Process], bool], settings: Any) -> None:
    """Call `train(settings, process)` in the launcher's process group; a stopped run exits with SIGTERM's status."""
    finished = train(settings, launch.start(settings.device))
    launch.stop()  # not after a failure: it waits for ranks that may be waiting for this one
    if not finished:
        sys.exit(128 + signal.SIGTERM)


class Run:
    """One run of an experiment, new or resumed; a context manager that closes log, bar and signal handlers.

    settings: a RunConfig with an [optimizer] and, in `eval.every`, the steps between validations.
    model, optimizer: saved in checkpoints, and restored where `settings.resume` asks for it.
    scaler: the loss scaler, saved with them.
    unit, units_per_step: name of the unit of data ("tokens"), and units per step over all ranks.
    fixed, free: settings and sections that a resumed run must share with its checkpoint, and exceptions among them.

    Raises UserError if the checkpoint is of another experiment.
    """

    def __init__(
        self,
        settings: Any,
        process: launch.Process,
        *,
        experiment: str,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        unit: str,
        units_per_step: int,
        fixed: Sequence[str],
        free: Sequence[str],
    ) -> None:
        self.settings, self.process, self.timer = settings, process, Timer(process.device)
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._unit, self._units_per_step = unit, units_per_step
        self._lr = settings.optimizer.peak_lr()
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self.name = run_name(settings.optimizer.name, self._lr, settings.seed, settings.optimizer.adamw_lr)
        self.folder = Path(settings.out, settings.group, self.name)
        self.step = 0  # steps taken
        self._skipped, self._in_a_row, self._norm, self._shown = 0, 0, math.nan, {}
        self._saved_step: int | None = None
        self._save_owed = self._stop_agreed = False
        self._validation: dict[str, float] = {}
        if settings.resume:
            self._restore(fixed, free)
        if self.step == 0 and process.is_main:
            move_aside(self.folder)
        record = config.to_dict(settings)
        record["optimizer"]["lr"] = self._lr  # resolved: a sweep's plots need the rate that was used
        self._runlog = RunLog(
            self.folder,
            config=record,
            experiment=experiment,
            name=self.name,
            group=settings.group,
            tags=[settings.optimizer.name],
            wandb_mode=settings.wandb,
            resume_step=self.step or None,
            is_main=process.is_main,
        )
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self._open.close()
        self._runlog.finish()

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return self.step >= self.settings.steps

    def steps(self) -> Iterator[int]:
        """Yield the number of each step, from 0, with its learning rates set, until the end or a request to stop.

        Raises Diverged, on all ranks, if the last validation is not finite.
        """
        total, warmup = self.settings.steps, self.settings.schedule.warmup
        if warmup > total and self.process.is_main:  # useful only for a short trial
            warn(f"the rate never reaches its peak: schedule.warmup is {warmup} and steps {total}; lower the warm-up")
        bar = progress(total=total, initial=self.step, desc=self.name, is_main=self.process.is_main)
        self._bar = self._open.enter_context(bar)
        self._stop = self._open.enter_context(launch.StopRequest())
        while not (self.finished or self._stop_agreed):
            self.timer.start()
            self._rate = multiplier(self.step, steps=total, **vars(self.settings.schedule))
            for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
                group["lr"] = peak * self._rate
            yield self.step
            if self.finished:
                self._end()
            self._bar.update()
        self._open.close()
        if self.process.is_main:
            print(self._end_message())

    def read(self, losses: Tensor, norm: Tensor) -> tuple[list[float], float]:
        """Return a step's losses, (k,) on each rank, summed over the ranks, and its gradient norm.

        This is where, once per step, the host waits for the device and the ranks agree on a request to stop.
        """
        sums = launch.sum_over_ranks(torch.cat([losses.reshape(-1), self._stop.as_tensor(losses.device)]))
        *totals, asked, norm_read = torch.cat([sums, norm.reshape(1)]).tolist()
        self._stop_agreed = asked > 0
        return totals, norm_read

    def accepts(self, loss: float, norm: float) -> bool:
        """Return whether a step's loss and gradient norm are finite; counts it as skipped otherwise."""
        self._norm = norm
        if math.isfinite(loss) and math.isfinite(norm):
            self._in_a_row = 0
            return True
        self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1
        return False

    def count_step(self) -> None:
        """End a step; raises Diverged, on all ranks, after MAX_SKIPPED steps in a row that were not finite."""
        self.step += 1
        self.timer.stop()
        self._validation = {}
        if self._in_a_row >= MAX_SKIPPED:
            self._diverge(f"the {self._in_a_row} steps up to {self.step} had none")

    def is_due(self, every: int) -> bool:
        """Return whether an action is due: at each multiple of `every` steps, and after the last step."""
        return self.step % every == 0 or self.finished

    def measurements(self) -> dict[str, float]:
        """Return rate, gradient norm, times and memory of the steps since the last call."""
        step_ms, optimizer_ms = self.timer.medians()
        return {
            "lr": self._lr * self._rate,
            "grad_norm": self._norm,
            "skipped": self._skipped,
            "step_ms": step_ms,
            "optimizer_ms": optimizer_ms,
            f"{self._unit}_per_second": self._units_per_step / step_ms * 1000,
            "peak_memory_mb": launch.peak_memory_mb(self.process.device),
        }

    def log(self, metrics: dict[str, Any]) -> None:
        """Record this step's metrics, if any; losses are also shown beside the progress bar."""
        if not metrics:
            return
        self._runlog.log(self.step, {self._unit: self.step * self._units_per_step, **metrics})
        self._shown |= {key: f"{metrics[key]:.4f}" for key in ("train/loss", "val/loss") if key in metrics}
        if "val/loss" in metrics:
            self._validation = metrics
        if self.step:
            self._bar.set_postfix(self._shown | self._end_of_all(), refresh=False)

    def save_if_due(self) -> None:
        """Save a checkpoint when due or stopping, unless the step, the weights or the state are not finite.

        A checkpoint skipped for that reason is saved after the next finite step.
        """
        every = self.settings.checkpoint.every
        if self.process.world_size == 1:  # many leave after the step in which they agreed on it
            self._stop_agreed = self._stop.requested
        if not every or not (self._save_owed or self._stop_agreed or self.is_due(every)):
            return
        owed_before, self._save_owed = self._save_owed, not self._is_finite()
        if self._save_owed:
            if self.process.is_main and not owed_before:
                warn(f"no checkpoint at step {self.step}: {self._unsound}; {self._last_checkpoint()}")
            return
        extra = {"config": config.to_dict(self.settings), "scaler": self._scaler.state_dict()}
        extra |= {"skipped": self._skipped, "in_a_row": self._in_a_row}
        folder, keep = self.folder / "checkpoints", self.settings.checkpoint.keep
        checkpoint.save(folder, self.step, self._model, self._optimizer, extra, keep)
        self._saved_step = self.step

    def _restore(self, fixed: Sequence[str], free: Sequence[str]) -> None:
        folder = self.folder / "checkpoints"
        saved = launch.on_main(lambda: checkpoint.read_extra(folder))
        if saved is not None:
            check(saved, f"the newest checkpoint in {folder}", EXTRA, "resume one that this program saved")
            config.refuse_changes(saved["config"], config.to_dict(self.settings), fixed, free)
        saved = checkpoint.load(folder, self._model, self._optimizer)
        if saved:
            self.step, self._skipped, self._in_a_row = saved["step"], saved["skipped"], saved["in_a_row"]
            self._saved_step = self.step
            self._scaler.load_state_dict(saved["scaler"])
        elif self.process.is_main:
            print(f"no checkpoint in {self.folder}: starting at step 0")

    def _is_finite(self) -> bool:
        """Return, on all ranks alike, whether last step, validation, weights and optimizer state are finite."""
        self._unsound = ""
        if self._in_a_row:
            self._unsound = "the last step's loss or gradient is not finite"
        elif not math.isfinite(self._validation.get("val/loss", 0.0)):
            self._unsound = "the validation loss is not finite"
        else:
            state = [value for buffers in self._optimizer.state.values() for value in buffers.values()]
            tensors = [*self._model.state_dict().values(), *state]
            if launch.all_reduce_sum([float(not all_finite(tensors))], self.process)[0]:
                self._unsound = "weights or optimizer state are not finite"
        return not self._unsound

    def _last_checkpoint(self) -> str:
        if self._saved_step is None:
            return "no checkpoint was saved"
        return f"the last checkpoint is of step {self._saved_step}, and finite"

    def _diverge(self, reason: str) -> None:
        if self.process.is_main:
            write_end(self.folder, self.step, {})
        raise Diverged(
            f"training needs finite losses and gradients, and {reason}; start over with a lower learning rate "
            f"({self._last_checkpoint()})"
        )

    def _end(self) -> None:
        """Write finished.json; raises Diverged if the last validation is not finite."""
        loss = self._validation.get("val/loss", math.nan)
        if not math.isfinite(loss):
            self._diverge(f"the validation after the last step, {self.step}, had loss {loss}")
        if self.process.is_main:
            write_end(self.folder, self.step, self._validation)

    def _end_of_all(self) -> dict[str, str]:
        """Return the expected end of this run and those after it, if a run script gives their number."""
        after = os.environ.get(RUNS_AFTER, "")
        if not self.process.is_main or not after.isdecimal() or int(after) == 0:  # bars of other ranks are disabled
            return {}
        taken = self._bar.n - self._bar.initial
        if taken < 1:
            return {}
        total = self.settings.steps
        left = total - self._bar.n + int(after) * total  # steps
        end = time.time() + left * self._bar.format_dict["elapsed"] / taken
        return {"all done": time.strftime("%H:%M", time.localtime(end))}

    def _end_message(self) -> str:
        if self.finished:
            return f"{self.folder}: {self.step} steps, " + ", ".join(
                f"{key} {text}" for key, text in self._shown.items()
            )
        every = self.settings.checkpoint.every
        after = "the same command with --resume continues" if every else "checkpoints are off"
        return f"stopped at step {self.step} of {self.settings.steps}; {after}"


def all_finite(tensors: Sequence[Any]) -> bool:
    """Return whether this rank's shards of all floating-point tensors are finite; other values are ignored."""
    locals_ = [each.to_local() if isinstance(each, DTensor) else each for each in tensors if isinstance(each, Tensor)]
    checks = [each.isfinite().all().cpu() for each in locals_ if each.is_floating_point()]
    return bool(torch.stack(checks).all()) if checks else True
