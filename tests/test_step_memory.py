"""Memory of a step beyond weights, gradients and state: that of a few buckets, whatever the number of matrices.

Steps run on fake tensors, without data; live storages are counted. Ranks are those of a group of one.
"""

import contextlib
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optimizers import RuleOptimizer
from optimizers.layout import local_of
from optimizers.routes import _STACK_ENTRIES
from scripts.plan import fake_group

RANKS, SHAPE = 8, (128, 81920)  # flat: of small symmetric products, CPUs compute no blocks
FEW, MANY = 32, 64  # of them; more than the buckets in transit at once


class Peak(TorchDispatchMode):
    """Counts bytes of storages that ops make, while they live; those in `known` are not counted."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.live = self.peak = 0
        self._seen = set(known)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return False  # no flag of too many zeros
        result = function(*arguments, **(options or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def peak_of_a_step(rule: str, layout: str, count: int) -> int:
    """Return the bytes that a step of so many matrices holds at its peak."""
    options = {} if rule == "lion" else {"ns_dtype": torch.bfloat16, "ns_steps": 1}  # as on a GPU, but soon done
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.nullcontext() if layout == "local" else fake_group(RANKS, 0):
        group = dist.group.WORLD if layout == "ddp" else None
        with fake:
            rows = SHAPE[0] // RANKS if "fsdp" in layout else SHAPE[0]
            wholes = [torch.empty(rows, SHAPE[1]) for _ in range(2 * count)]
        if "fsdp" in layout:
            mesh = init_device_mesh("cpu", (2, RANKS // 2) if "tp" in layout else (RANKS,))
            placements = [_StridedShard(0, split_factor=RANKS // 2), Shard(0)] if "tp" in layout else [Shard(0)]
            lie = {"run_check": False, "shape": SHAPE, "stride": (SHAPE[1], 1)}
            wholes = [DTensor.from_local(each, mesh, placements, **lie) for each in wholes]
        params = [nn.Parameter(each) for each in wholes[:count]]
        optimizer = RuleOptimizer(params, rule, process_group=group, **options)
        for param, grad in zip(params, wholes[count:], strict=True):
            param.grad = grad
        buffers = [buffer for state in optimizer.state.values() for buffer in state.values()]
        held = [local_of(tensor) for tensor in (*wholes, *buffers)]
        with fake, Peak({tensor.untyped_storage()._cdata for tensor in held}) as peak:
            optimizer.step()
        return peak.peak


@pytest.mark.parametrize("layout", ["local", "ddp", "fsdp", "fsdp x tp"])
@pytest.mark.parametrize("rule", ["olion", "adamuon", "lion"])
def test_peak_of_a_step_matches_that_of_a_few_matrices(monkeypatch, rule, layout):
    monkeypatch.setattr("optimizers.plan.refuse_disagreement", lambda *_: None)  # fake tensors cannot be compared
    if layout != "local" and rule == "lion":
        pytest.skip("its route sends nothing, and is local's")
    entries = SHAPE[0] * SHAPE[1]
    few, many = peak_of_a_step(rule, layout, FEW), peak_of_a_step(rule, layout, MANY)
    # Packed signs wait for one another: a bit per entry, and as much for the owner's zeros.
    waiting = MANY * entries // 8 * (2 if rule == "olion" and layout != "local" else 0)
    assert many <= 1.1 * few + waiting
    if layout == "local":
        assert many <= 6 * 4 * _STACK_ENTRIES  # stacks in float32: nothing outlives its use
    assert many < 4 * MANY * entries / 2  # whole float32 copies of all matrices are far from it
