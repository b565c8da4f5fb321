"""Validation on fixed sequences: the same at every step, in every run and on any number of ranks."""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.validate import BaseValidator, Validator
from torchtitan.distributed.utils import dist_sum
from torchtitan.tools.utils import device_type

from Llama.checks import is_fine_tuning
from Llama.config import JobConfig
from Llama.data import Batch, validation_windows
from Llama.instructions import validation_rows


class FixedSequences(Validator):
    """Means over the label tokens of fixed sequences; at step 0, every `freq` steps and at the end."""

    def __init__(self, job_config: JobConfig, dp_world_size: int, dp_rank: int, tokenizer, **parts):
        """parts: further attributes of torchtitan's validator: loss, mesh, pipeline schedule and so on."""
        BaseValidator.__init__(self, job_config)
        self.tokenizer = tokenizer
        vars(self).update(parts)
        settings = job_config.validation
        self._text, self._instructions = None, None
        mine = slice(dp_rank, None, dp_world_size)
        if is_fine_tuning(job_config):
            self._instructions = validation_rows(tokenizer, job_config, mine)
            name, path = settings.pretrain_dataset, settings.pretrain_path
        else:
            name, path = settings.dataset, settings.dataset_path
        if name:
            self._text, self._bytes_per_token = validation_windows(tokenizer, job_config, name, path, mine)

    def should_validate(self, step: int) -> bool:
        return step % self.job_config.validation.freq == 0 or step == self.job_config.training.steps

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Measure and log the loss and, of instructions, the fraction of responses that greedy decoding reproduces."""
        (model,) = model_parts
        model.eval()
        if self._instructions is None:
            loss, _ = self._measure(model, self._text)
            more = {"val/bits_per_byte": loss / math.log(2) / self._bytes_per_token}
        else:
            loss, exact = self._measure(model, self._instructions, count_exact=True)
            more = {"val/exact_match": exact}
            if self._text:
                more["val/pretrain_loss"], _ = self._measure(model, self._text)
        model.train()
        self.metrics_processor.log_validation(loss=loss, step=step, extra_metrics=more)

    @torch.no_grad()
    def _measure(self, model: nn.Module, batches: list[Batch], count_exact: bool = False) -> tuple[float, float]:
        """Return the mean loss per label token, and the fraction of rows whose labels are all the likeliest tokens.

        The latter is exact match: greedy decoding reproduces a response if and only if each of its tokens is the
        likeliest after the previous ones.
        """
        loss, tokens, exact, rows = torch.zeros(4, device=device_type)
        for inputs, labels in batches:
            inputs, labels = {key: value.to(device_type) for key, value in inputs.items()}, labels.to(device_type)
            tokens_in, labels, *others = self.post_dataloading_process(inputs, labels, [model])
            with self.validation_context(), self.maybe_enable_amp:
                logits = model(tokens_in, **others[0], **others[1])  # (b, T, vocabulary)
                part = self.loss_fn(logits, labels)
            loss += part.full_tensor() if isinstance(part, DTensor) else part
            tokens += (labels != IGNORE_INDEX).sum()
            if count_exact:
                logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
                wrong = (logits.argmax(-1) != labels) & (labels != IGNORE_INDEX)
                exact += (~wrong.any(1)).sum()
                rows += len(labels)
        mesh = self.parallel_dims.get_mesh("batch") if self.parallel_dims.dp_enabled else None
        loss, tokens, exact, rows = (dist_sum(value, mesh) for value in (loss, tokens, exact, rows))
        return loss / tokens, exact / max(rows, 1)
