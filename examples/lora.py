"""LoRA with peft: adapters A (rank, inputs) and B (outputs, rank) trained as matrices, or all by AdamW.

    pip install peft
    python -m examples.lora              # seconds: one run per optimizer
    python -m examples.lora --compare    # minutes: rates and seeds, the table of RESULTS.md

A small GPT-2 learns Python source and is frozen; its adapters then learn the English of Python's manual. Measured with
three seeds (RESULTS.md): OLion, Muon and AdamW are equal at their best rates; AdamW is ahead at low rates and fails at
high ones, where the matrix rules do not. Use AdamW unless memory matters: OLion and Muon keep one number per entry,
AdamW two.
"""

import argparse
import copy
import pydoc_data.topics
import statistics
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from optimizers import build_optimizer

CONTEXT = 64
RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
BEST = {"olion": 1.6e-2, "muon": 1.6e-2, "adamw": 1.6e-2}  # of RATES, by --compare


def windows_of(path: str) -> torch.Tensor:
    """Return the bytes of a file as tokens (windows, CONTEXT)."""
    text = Path(path).read_bytes()[:300_000]
    whole = text[: len(text) // CONTEXT * CONTEXT]
    return torch.frombuffer(bytearray(whole), dtype=torch.uint8).long().view(-1, CONTEXT)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, windows: torch.Tensor, steps: int) -> None:
    """Train on random windows, with a rate that decays linearly to 0."""
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        rows = windows[torch.randint(len(windows), (4,))]
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def pretrain(steps: int = 200) -> GPT2LMHeadModel:
    """Return a small GPT-2 trained on Python source."""
    torch.manual_seed(0)
    size = dict(n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, bos_token_id=None, eos_token_id=None, **size))
    train(model, build_optimizer(model, "olion", lr=1e-2), windows_of(argparse.__file__), steps)
    return model


def fine_tune(base: GPT2LMHeadModel, name: str, lr: float, seed: int = 1, steps: int = 100) -> float:
    """Fine-tune fresh adapters of a copy; returns the loss on held-out text, nats per byte."""
    torch.manual_seed(seed)
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = get_peft_model(copy.deepcopy(base), adapters)  # freezes all but the adapters
    windows = windows_of(pydoc_data.topics.__file__)
    held_out, windows = windows[-128:], windows[:-128]
    optimizer = build_optimizer(model, name, lr=lr, weight_decay=0.0, roles={"*.lora_?.*": "matrix"})
    train(model, optimizer, windows, steps)
    model.eval()
    with torch.no_grad():
        return model(input_ids=held_out, labels=held_out).loss.item()


def compare(base: GPT2LMHeadModel) -> None:
    """Print the loss at each rate on seed 1, and at each best rate on three seeds."""
    for name in BEST:
        losses = {lr: fine_tune(base, name, lr) for lr in RATES}
        best = min(losses, key=losses.__getitem__)
        seeds = [losses[best], *(fine_tune(base, name, best, seed) for seed in (2, 3))]
        print(name, " ".join(f"{lr:g}: {loss:.3f}" for lr, loss in losses.items()))
        print(f"{name} at {best:g}: {statistics.fmean(seeds):.3f} ± {statistics.stdev(seeds):.3f}", flush=True)


def main(steps: int = 100) -> dict[str, float]:
    """Fine-tune once with each optimizer; returns the losses, with the base model's as "none"."""
    base = pretrain(2 * steps)
    losses = {"none": fine_tune(base, "olion", 0.0, steps=1)}
    losses |= {name: fine_tune(base, name, lr, steps=steps) for name, lr in BEST.items()}
    for name, loss in losses.items():
        print(f"{name}: {loss:.3f} nats per byte")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="try rates and seeds, in minutes")
    if parser.parse_args().compare:
        compare(pretrain())
    else:
        main()
