"""A convolutional network on handwritten digits: kernels as matrices (out, in x height x width), by OLion and AdamW.

python -m examples.convnet
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from optimizers import build_optimizer


class Net(nn.Module):
    """Three convolutions and a classifier, for images (batch, 1, 8, 8)."""

    def __init__(self, width: int = 32):
        super().__init__()
        widths = [1, width, width, 2 * width]
        layers = []
        for inputs, outputs, stride in zip(widths, widths[1:], (1, 2, 2), strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(2 * width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, 10)."""
        return self.head(self.body(images))


def train(name: str, lr: float, seed: int = 0, epochs: int = 3) -> float:
    """Train with one optimizer; returns the accuracy on held-out digits."""
    torch.manual_seed(seed)
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # the same split for all seeds
    train_rows, test_rows = order[360:], order[:360]
    model = Net()
    optimizer = build_optimizer(
        model,
        name,
        lr=lr,
        adamw_lr=1e-2,
        roles={"body.0.weight": "embedding", "head.weight": "head"},  # the layers of pixels and classes
        as_matrices="flatten",
    )
    steps = epochs * (len(train_rows) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in train_rows[torch.randperm(len(train_rows))].split(64)[: steps // epochs]:
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return (model(images[test_rows]).argmax(1) == labels[test_rows]).float().mean().item()


def main(epochs: int = 3) -> dict[str, float]:
    """Train with both optimizers; returns the accuracy of each."""
    accuracies = {name: train(name, lr, epochs=epochs) for name, lr in {"olion": 1e-2, "adamw": 1e-2}.items()}
    for name, accuracy in accuracies.items():
        print(f"{name}: {accuracy:.1%} of 360 held-out digits")
    return accuracies


if __name__ == "__main__":
    main()
