"""Layout of a model over the ranks: replicated (DDP), sharded (FSDP), or sharded within replicated groups (HSDP).

    network = distribute(model, settings, ranks, torch.bfloat16)
    with synchronizing(network, last_micro_batch), autocast(torch.bfloat16, ranks): ...

Optimizer and checkpoints read the layout from the parameters, which are DTensors where they are sharded.
"""

import contextlib
import itertools
import warnings
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from common import UserError, gpu, launch
from common.run_config import ParallelConfig


def precision(dtype: str, ranks: launch.Launch) -> torch.dtype:
    """Return the dtype that a config's word means; auto is bfloat16 on GPUs and float32 elsewhere.

    A GPU without bfloat16 computes in float16 instead, and says so.
    """
    on_gpu = ranks.device.type == "cuda"
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    if dtype == "bfloat16" and on_gpu and not gpu.has_bfloat16(ranks.device):
        dtype = "float16"
        if ranks.is_main:
            gpu.warn_without_bfloat16(ranks.device, dtype)
    return getattr(torch, dtype)


def place(
    model: nn.Module,
    settings: ParallelConfig,
    ranks: launch.Launch,
    dtype: torch.dtype,
    compile: bool = False,
    trained: bool = False,
) -> nn.Module:
    """Put a model with `blocks` on the ranks' devices, whole or in shards, as is enough where it is not `trained`.

    A single process holds all, whatever the mode. In shards the parameters are DTensors; a block's are gathered in
    `dtype` while it computes, and gradients are averaged in fp32 or more.

    Raises UserError when the shards of hsdp do not divide the ranks.
    """
    if settings.mode != "ddp" and ranks.world_size > 1:
        return _shard(model, _mesh(settings, ranks), dtype, compile, trained)
    model = model.to(ranks.device)
    return cast(nn.Module, torch.compile(model, dynamic=False)) if compile else model


def distribute(
    model: nn.Module, settings: ParallelConfig, ranks: launch.Launch, dtype: torch.dtype, compile: bool = False
) -> nn.Module:
    """Place a model; returns the network to train: itself, compiled, or under DDP."""
    network = place(model, settings, ranks, dtype, compile, trained=True)
    if settings.mode == "ddp" and ranks.world_size > 1:
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        # torch 2.13 has a new name for it, which 2.11 does not know.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        network = DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)  # they are constants
    return network


def _mesh(settings: ParallelConfig, ranks: launch.Launch) -> DeviceMesh:
    shard = ranks.world_size if settings.mode == "fsdp" else settings.shard or ranks.local_world_size
    if ranks.world_size % shard:
        raise UserError(
            f"parallel.shard must divide the number of ranks, {ranks.world_size}; got {shard}: take a divisor, or fsdp"
        )
    return launch.device_mesh(ranks, replicate=ranks.world_size // shard, shard=shard)


def _shard(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, compile: bool, trained: bool) -> nn.Module:
    # The weights alone are cast, as autocast casts them under DDP; activations are autocast's in both, so that the
    # residual stream, norms and losses are fp32 in every layout. Of a block only its norms' weights differ: bf16 here.
    full = torch.promote_types(dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=full, cast_forward_inputs=False)
    # A warning about outputs, which nothing here writes into in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for block in cast(nn.ModuleList, model.blocks):
        if compile:
            block.compile(dynamic=False)  # inside the gathering, which torch.compile cannot trace
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The rest is one group, so that the embedding and the head stay one tensor; unrounded, as the stream begins there.
    policy = replace(policy, param_dtype=full)
    # It stays gathered until its backward pass, by default: where none comes, what is written into the shards
    # meanwhile would be lost on the next forward pass.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=None if trained else True)
    return model


def cut_batch(batch_size: int, micro_batch: int, ranks: launch.Launch) -> list[tuple[slice, int]]:
    """Cut a rank's rows of a global batch into micro-batches: (slice, number of real rows) per micro-batch.

    FSDP needs as many passes on every rank: an empty micro-batch takes one row, of which none counts.
    """
    shares = ranks.world_size
    count = -(-batch_size // (shares * micro_batch))
    first = ranks.rank * count
    bounds = [batch_size * piece // (shares * count) for piece in range(first, first + count + 1)]
    return [(slice(start, max(stop, start + 1)), stop - start) for start, stop in itertools.pairwise(bounds)]


def synchronizing(network: nn.Module, synchronize: bool) -> AbstractContextManager:
    """Return the context of one forward and backward pass: gradients are reduced over the ranks at its end, or kept."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(synchronize)
    elif isinstance(network, DistributedDataParallel) and not synchronize:
        return network.no_sync()
    return contextlib.nullcontext()


def autocast(dtype: torch.dtype, ranks: launch.Launch) -> AbstractContextManager:
    """Return the autocast to `dtype`, in every layout; of float32 and float64 it is none."""
    return torch.autocast(ranks.device.type, dtype, enabled=dtype.itemsize < 4)


def clip_gradient(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradient down to this norm, where it is larger; returns the norm before, (), the same on every rank."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
