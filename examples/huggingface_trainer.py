"""The Trainer of transformers, with OLion on the matrices of a GPT-2 and AdamW on the rest.

    python -m examples.huggingface_trainer

The Trainer uses the given optimizer, and clips, schedules and saves as usual.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from optimizers import build_optimizer

TEXT = Path(argparse.__file__).read_bytes()  # a long file of Python's standard library; its bytes are the tokens
CONTEXT = 64


def main(steps: int = 60) -> list[float]:
    """Train a small GPT-2; returns the loss at each logged step."""
    torch.manual_seed(0)
    windows = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8).long()[: len(TEXT) // CONTEXT * CONTEXT]
    data = [{"input_ids": window, "labels": window} for window in windows.view(-1, CONTEXT)]
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=2))
    optimizer = build_optimizer(model, "olion", lr=1e-2)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))  # None: its own schedule
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
