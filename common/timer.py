"""Time per training step, and per optimizer step within it."""

import statistics
import time
from typing import Any

import torch


class Timer:
    """Times of training steps and of their optimizer steps, in ms.

    On a GPU they are measured by CUDA events, so that the host waits for the device only in `medians`.

    Example:
        timer.start(); backward(); timer.optimizer(); optimizer.step(); timer.stop()
        step_ms, optimizer_ms = timer.medians()
    """

    def __init__(self, device: torch.device):
        self.device, self._steps = device, []

    def start(self) -> None:
        """Begin a step."""
        self._started = self._now()

    def optimizer(self) -> None:
        """Begin the optimizer's part of the step."""
        self._updating = self._now()

    def stop(self) -> None:
        """End the step."""
        self._steps.append((self._started, self._updating, self._now()))

    def medians(self) -> tuple[float, float]:
        """Return the median step and optimizer time since the last call."""
        if self.device.type == "cuda":
            self._steps[-1][-1].synchronize()
        whole = statistics.median(_ms(started, ended) for started, _, ended in self._steps)
        updates = statistics.median(_ms(updating, ended) for _, updating, ended in self._steps)
        self._steps = []
        return whole, updates

    def _now(self) -> Any:
        """Return a time: an event on the GPU's current stream, or the host's seconds."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _ms(earlier: Any, later: Any) -> float:
    return 1000 * (later - earlier) if isinstance(later, float) else earlier.elapsed_time(later)
