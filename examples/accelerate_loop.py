"""A loop with Accelerate, on one process or several.

    python -m examples.accelerate_loop
    accelerate launch --cpu --num_processes 2 -m examples.accelerate_loop

Prepare the model first, then build the optimizer for the result (a DDP or FSDP2 model), so that the ranks share the
orthogonalizations.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from optimizers import build_optimizer


def main(epochs: int = 6) -> list[float]:
    """Train a small network to imitate another; returns the mean loss of each epoch."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    teacher, student = (nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)) for _ in range(2))
    inputs = torch.randn(1024, 32)
    data = DataLoader(TensorDataset(inputs, teacher(inputs).detach()), batch_size=64, shuffle=True)

    model, data = accelerator.prepare(student, data)
    optimizer = build_optimizer(model, "olion", lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    optimizer, schedule = accelerator.prepare(optimizer, schedule)

    losses = []
    for _ in range(epochs):
        total = torch.zeros((), device=accelerator.device)
        for batch, targets in data:
            loss = nn.functional.mse_loss(model(batch), targets)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        schedule.step()
        losses.append(accelerator.reduce(total / len(data), "mean").item())
    accelerator.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
