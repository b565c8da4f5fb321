"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import optimizers
from optimizers.rule import RULES

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.blocks = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        self.head = nn.Linear(8, 16, bias=False)

    def forward(self, tokens):
        return self.head(self.blocks(self.embedding(tokens)))


@pytest.fixture
def group(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_every_python_block_of_the_readme_trains_a_model(group):
    assert len(BLOCKS) == 3
    try:
        for block in BLOCKS:
            torch.manual_seed(0)
            model = Tiny()
            scope = {"model": model, "matrices": list(model.blocks.parameters()), "group": group}
            exec(block, scope)
            losses = []
            for _ in range(20):
                loss = nn.functional.cross_entropy(model(torch.arange(16)), torch.arange(16))
                loss.backward()
                scope["optimizer"].step()
                model.zero_grad()
                losses.append(loss.item())
            assert losses[-1] < losses[0]
    finally:
        RULES.pop("signed_polar", None)


def test_every_public_name_is_there_and_documented():
    for name in optimizers.__all__:
        assert getattr(optimizers, name).__doc__, name
