"""Validation on fixed windows: the same at every step, in every run, and on any number of ranks."""

import math

from torchtitan.components.validate import BaseValidator, Validator

from Llama.config import JobConfig
from Llama.data import to_batch, validation_windows


class FixedWindows(Validator):
    """torchtitan's validator over windows that are read once; at step 0, every `freq` steps and at the end."""

    def __init__(self, job_config: JobConfig, dp_world_size: int, dp_rank: int, tokenizer, **parts):
        """parts: what torchtitan's validator keeps besides: the loss, its mesh, pipeline schedule and so on."""
        BaseValidator.__init__(self, job_config)
        windows, bytes_per_token = validation_windows(tokenizer, job_config)
        mine = windows[dp_rank::dp_world_size]
        # torchtitan takes the mean of the batches' means: they must be of one size.
        size = next(size for size in range(job_config.validation.local_batch_size, 0, -1) if len(mine) % size == 0)
        self.validation_dataloader = [to_batch(mine[start : start + size]) for start in range(0, len(mine), size)]
        self.tokenizer = tokenizer
        vars(self).update(parts)
        self.metrics_processor.bits_per_byte_per_nat = 1 / math.log(2) / bytes_per_token

    def should_validate(self, step: int) -> bool:
        return step % self.job_config.validation.freq == 0 or step == self.job_config.training.steps
