"""Layout of a model over the ranks: replicated (DDP, owners), sharded (FSDP), or sharded within replicas (HSDP).

    network = distribute(model, settings, process, torch.bfloat16)
    with synchronizing(network, last_micro_batch), autocast(torch.bfloat16, process): ...

Optimizers and checkpoints read the layout from the parameters: sharded ones are DTensors.
"""

import contextlib
import itertools
import warnings
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from common import UserError, gpu, launch
from common.run_config import ParallelConfig


def precision(dtype: str, process: launch.Process) -> torch.dtype:
    """Return the dtype of a config's name; auto is bfloat16 on GPUs and float32 elsewhere.

    A GPU without bfloat16 uses float16, with a warning.
    """
    on_gpu = process.device.type == "cuda"
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    if dtype == "bfloat16" and on_gpu and not gpu.has_bfloat16(process.device):
        dtype = "float16"
        if process.is_main:
            gpu.warn_without_bfloat16(process.device, dtype)
    return getattr(torch, dtype)


def move_or_shard(
    model: nn.Module,
    settings: ParallelConfig,
    process: launch.Process,
    dtype: torch.dtype,
    compile: bool = False,
    trained: bool = False,
) -> nn.Module:
    """Move a model with `blocks` to the device, or shard it over the ranks (fsdp, hsdp).

    A single process holds the whole model in every mode. Sharded parameters are DTensors; a block's are gathered in
    `dtype` while it computes, and gradients are averaged in fp32 or wider. `trained`: whether it runs backward passes.

    Raises UserError if parallel.shard does not divide the number of ranks.
    """
    if settings.sharded and process.world_size > 1:
        return _shard(model, _mesh(settings, process), dtype, compile, trained)
    model = model.to(process.device)
    return cast(nn.Module, torch.compile(model, dynamic=False)) if compile else model


def distribute(
    model: nn.Module, settings: ParallelConfig, process: launch.Process, dtype: torch.dtype, compile: bool = False
) -> nn.Module:
    """Move or shard a model for training; returns the network to train: the model, compiled, or under DDP."""
    network = move_or_shard(model, settings, process, dtype, compile, trained=True)
    if not settings.sharded and process.world_size > 1:
        devices = [process.device] if process.device.type == "cuda" else None
        # The option is renamed in torch 2.13; 2.11 does not know the new name.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        network = DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)  # buffers are constants
    return network


def destination(settings: ParallelConfig, process: launch.Process) -> Literal["all_reduced", "to_owners"]:
    """Return the `gradients` of `build_optimizer`; a single process has all of them in every mode."""
    return "to_owners" if settings.mode == "owners" and process.world_size > 1 else "all_reduced"


def _mesh(settings: ParallelConfig, process: launch.Process) -> DeviceMesh:
    shard = process.world_size if settings.mode == "fsdp" else settings.shard or process.local_world_size
    if process.world_size % shard:
        raise UserError(
            f"parallel.shard must divide the number of ranks, {process.world_size}; got {shard}: use a divisor, or fsdp"
        )
    return launch.device_mesh(process, replicate=process.world_size // shard, shard=shard)


def _shard(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, compile: bool, trained: bool) -> nn.Module:
    # Only weights are cast, as autocast does under DDP; activations are left to autocast, so that the residual stream,
    # norms and losses are fp32 in every layout. One difference remains: the weights of a block's norms are bf16 here.
    full = torch.promote_types(dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=full, cast_forward_inputs=False)
    # The warning is about in-place writes to outputs; there are none here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for block in cast(nn.ModuleList, model.blocks):
        if compile:
            block.compile(dynamic=False)  # inside FSDP's hooks, which torch.compile cannot trace
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The rest is one group, so that embedding and head stay one tensor; in fp32, as the residual stream begins there.
    policy = replace(policy, param_dtype=full)
    # By default it stays gathered until its backward pass; without one, values written to the shards in between would
    # be lost on the next forward pass.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=None if trained else True)
    return model


def cut_batch(batch_size: int, micro_batch: int, process: launch.Process) -> list[tuple[slice, int]]:
    """Cut this rank's rows of a global batch into micro-batches: (slice, number of real rows) per micro-batch.

    FSDP needs equally many passes on every rank: an empty micro-batch has one row, which does not count.
    """
    shares = process.world_size
    count = -(-batch_size // (shares * micro_batch))
    first = process.rank * count
    bounds = [batch_size * piece // (shares * count) for piece in range(first, first + count + 1)]
    return [(slice(start, max(stop, start + 1)), stop - start) for start, stop in itertools.pairwise(bounds)]


def synchronizing(network: nn.Module, synchronize: bool) -> AbstractContextManager:
    """Return the context of a forward and backward pass that ends by reducing gradients over the ranks, or not."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(synchronize)
    elif isinstance(network, DistributedDataParallel) and not synchronize:
        return network.no_sync()
    return contextlib.nullcontext()


def autocast(dtype: torch.dtype, process: launch.Process) -> AbstractContextManager:
    """Return autocast to `dtype`, disabled for float32 and float64."""
    return torch.autocast(process.device.type, dtype, enabled=dtype.itemsize < 4)


def clip_gradient(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradient down to norm `limit` if it is larger; returns its norm before, (), equal on every rank."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
