"""Plain DistributedDataParallel: the optimizer takes the wrapped model, and the ranks share its work.

    torchrun --nproc-per-node 2 -m examples.ddp

Each matrix is orthogonalized by one rank, its owner: see `print(optimizer.plan)`.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from optimizers import build_optimizer


def main(steps: int = 40) -> list[float]:
    """Train on this rank's share of the data; returns the loss at each step."""
    dist.init_process_group("gloo")  # "nccl" on GPUs
    torch.manual_seed(0)
    teacher, student = (
        nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)) for _ in range(2)
    )
    model = DistributedDataParallel(student)
    optimizer = build_optimizer(model, "olion", lr=1e-2)
    torch.manual_seed(dist.get_rank())  # different data per rank
    losses = []
    for _ in range(steps):
        inputs = torch.randn(128, 32)
        loss = nn.functional.mse_loss(model(inputs), teacher(inputs).detach())
        loss.backward()  # averages the gradients over the ranks
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if dist.get_rank() == 0:
        print(f"{optimizer.plan}\nloss {losses[0]:.3f} -> {losses[-1]:.3f}")
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
