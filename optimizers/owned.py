"""State of plain parameters that one rank holds for all: DTensors on a mesh of that rank alone.

All ranks have it under the same keys and of the same shape, with an empty part on the others, so that
torch.distributed.checkpoint saves it from its owner and loads it in any other layout.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate

from .checks import BadValue

Buffers = dict[str, Tensor]
Group = dist.ProcessGroup | None


@cache
def _mesh(device_type: str, owner: int, rank: int) -> DeviceMesh:
    """Return the mesh of one rank, as this one sees it; it needs no process group, as nothing is sent on it."""
    return DeviceMesh(device_type, [owner], _init_backend=False, _rank=rank)


def is_held(param: Tensor, buffer: Tensor) -> bool:
    """Return whether one rank holds this buffer of a parameter for all."""
    return isinstance(buffer, DTensor) and not isinstance(param, DTensor) and buffer.device_mesh.size() == 1


def at_owner(param: Tensor, buffer: Tensor, owner: int, group: Group) -> Tensor:
    """Return a buffer that its owner holds for all; a collective of the group if another rank did before."""
    if is_held(param, buffer) and _owner_of(buffer) == owner:
        return buffer
    buffer, rank = whole(param, buffer, group), dist.get_rank()
    mesh = _mesh("cpu" if buffer.is_meta else buffer.device.type, owner, rank)
    mine = buffer if rank == owner else buffer.new_empty(0)
    shape, stride = buffer.shape, buffer.stride()
    return DTensor.from_local(mine, mesh, [Replicate()], run_check=False, shape=shape, stride=stride)


def refuse_missing(saved: Mapping[Tensor, Buffers], group: Group) -> None:
    """Raise ValueError, on all ranks of the group, if an owner's buffer is empty: a rank without it has saved it."""
    held = [buffer for param, buffers in saved.items() for buffer in buffers.values() if is_held(param, buffer)]
    if not held:
        return
    locals_ = [(_owner_of(buffer), buffer.shape, cast(DTensor, buffer).to_local()) for buffer in held]
    here = [(shape, local) for owner, shape, local in locals_ if group is None or owner == dist.get_rank()]
    missing = torch.tensor(any(local.shape != shape for shape, local in here), device=locals_[0][2].device).float()
    if group is not None:
        dist.all_reduce(missing, group=group)
    if missing:
        raise BadValue(
            "the state of a matrix must be its owner's, got the empty part of another rank; let every rank load the "
            "state that it saved, or save by torch.distributed.checkpoint"
        )


def whole(param: Tensor, buffer: Tensor, group: Group) -> Tensor:
    """Return the whole of a buffer, which its owner sends to the group if it holds it for all."""
    if not is_held(param, buffer):
        return buffer
    owner, local = _owner_of(buffer), cast(DTensor, buffer).to_local()
    rank = owner if group is None else dist.get_rank()
    if owner != rank:
        local = torch.empty(buffer.shape, dtype=buffer.dtype, device=local.device)
    if group is not None and not buffer.is_meta:
        dist.broadcast(local, owner, group)
    return local


def outline(param: Tensor, buffers: Buffers) -> Buffers:
    """Return the buffers; of those that one rank holds, their shapes alone."""
    return {
        name: torch.empty(buffer.shape, device="meta") if is_held(param, buffer) else buffer
        for name, buffer in buffers.items()
    }


def here(param: Tensor, buffers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the buffers that this rank has, all plain if the parameter is."""
    found = {}
    for name, buffer in buffers.items():
        if not is_held(param, buffer):
            found[name] = buffer
        elif _owner_of(buffer) == dist.get_rank():
            found[name] = cast(DTensor, buffer).to_local()
    return found


def _owner_of(buffer: Tensor) -> int:
    return int(cast(DTensor, buffer).device_mesh.mesh.item())
