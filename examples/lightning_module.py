"""A LightningModule that trains with OLion, with a learning-rate schedule as for any optimizer.

pip install lightning
python -m examples.lightning_module
"""

import lightning
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from optimizers import build_optimizer


class Student(lightning.LightningModule):
    """A small network that learns to imitate another."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps, self.losses = steps, []
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss of one batch."""
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.layers(inputs), targets)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict:
        """Build the optimizer; under DDP the ranks share its work."""
        group = dist.group.WORLD if dist.is_initialized() else None
        optimizer = build_optimizer(self.layers, "olion", lr=1e-2, process_group=group)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(steps: int = 80) -> list[float]:
    """Train for some steps; returns the loss at each."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    inputs = torch.randn(1024, 32)
    data = DataLoader(TensorDataset(inputs, teacher(inputs).detach()), batch_size=64, shuffle=True)
    student = Student(steps)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="auto",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(student, data)
    print(f"loss {student.losses[0]:.3f} -> {student.losses[-1]:.3f}")
    return student.losses


if __name__ == "__main__":
    main()
