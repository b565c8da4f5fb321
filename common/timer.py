"""Time per training step, and per optimizer step within it."""

import statistics
import time

import torch


class Timer:
    """Times of training steps and of their optimizer steps, in ms; each reading waits for the device's queue.

    Example:
        timer.start(); backward(); timer.optimizer(); optimizer.step(); timer.stop()
        step_ms, optimizer_ms = timer.medians()
    """

    def __init__(self, device: torch.device):
        self.device, self.steps, self.updates = device, [], []

    def start(self) -> None:
        """Begin a step."""
        self.started = self._now()

    def optimizer(self) -> None:
        """Begin the optimizer's part of the step."""
        self.updating = self._now()

    def stop(self) -> None:
        """End the step."""
        now = self._now()
        self.steps.append(now - self.started)
        self.updates.append(now - self.updating)

    def medians(self) -> tuple[float, float]:
        """Return the median step and optimizer time since the last call."""
        medians = statistics.median(self.steps), statistics.median(self.updates)
        self.steps, self.updates = [], []
        return medians

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1000 * time.perf_counter()
