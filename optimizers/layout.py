"""The layout of a parameter's shards over ranks, read from the tensor and validated.

A layout is a grid of ranks (R, W): R replicas, each cut into W shards, along one dimension of the tensor or several.

    plain tensor, process_group     (ranks, 1)      replicated
    DTensor, Shards                 (1, ranks)      sharded: FSDP2, tensor parallelism, or both
    DTensor, Replicates and Shards  (R, W)          hsdp
    no other process needed         no layout       local

Where the batch of a tensor of matrices is cut (experts), the grid is of the ranks that have the same part of it.
"""

from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor

from .checks import BadValue
from .pieces import Cut

Groups = tuple[dist.ProcessGroup, ...]


@dataclass(frozen=True)
class Layout:
    """The ranks that hold one parameter, and its division among them.

    Attributes:
        ranks: global ranks that hold the parameter, in the order of the group or mesh.
        grid: (R, W) global ranks, one row per replica, one column per shard.
        cuts: the axes of the mesh that cut the tensor into W shards, in order.
        cut_groups: the groups along these axes.
        shard_groups: the group of a row, whose rank s holds shard s; none if W is 1.
        replica_groups: the group of a column, whose rank r holds replica r; none if R is 1.
    """

    ranks: tuple[int, ...]
    grid: tuple[tuple[int, ...], ...]
    cuts: tuple[Cut, ...] = ()
    cut_groups: Groups = field(default=(), compare=False)
    shard_groups: Groups = field(default=(), compare=False)
    replica_groups: Groups = field(default=(), compare=False)

    @property
    def kind(self) -> str:
        """replicated, sharded or hsdp."""
        return "replicated" if self.shards == 1 else "sharded" if len(self.grid) == 1 else "hsdp"

    @property
    def groups(self) -> Groups:
        """Groups that together connect all ranks."""
        return self.shard_groups + self.replica_groups

    @property
    def shards(self) -> int:
        """W, the number of shards that each replica is cut into."""
        return len(self.grid[0])

    def coordinate_of(self, rank: int) -> tuple[int, int]:
        """Return the (replica, shard) that a global rank holds."""
        return next((replica, row.index(rank)) for replica, row in enumerate(self.grid) if rank in row)


def layout_of(param: Tensor, plain: Layout | None, as_matrices: str | None) -> Layout | None:
    """Return the layout of a matrix parameter; None if this process needs no other rank for it.

    plain: the layout of plain tensors. Raises ValueError for a layout that is not supported.
    """
    if not isinstance(param, DTensor):
        return plain
    _refuse_unusable(param)
    mesh, placements = param.device_mesh, cast(tuple[Any, ...], param.placements)
    coordinate, first = cast(Any, mesh.get_coordinate()), first_of_matrix(param, as_matrices)
    axes = [axis for axis in range(mesh.ndim) if mesh.size(axis) > 1]
    replica_axes = [axis for axis in axes if placements[axis].is_replicate()]
    shard_axes = [axis for axis in axes if axis not in replica_axes and placements[axis].dim >= first]
    if not replica_axes + shard_axes or not prod(local_of(param).shape[:first]):
        return None
    batch_axes = [axis for axis in range(mesh.ndim) if axis not in replica_axes + shard_axes]
    together = mesh.mesh.permute(batch_axes + replica_axes + shard_axes)[tuple(coordinate[axis] for axis in batch_axes)]
    grid = together.reshape(-1, prod(mesh.size(axis) for axis in shard_axes))  # (R, W)
    if any(line != sorted(line) for line in grid.tolist() + grid.mT.tolist()):
        raise BadValue(
            f"a parameter's mesh must number its ranks upwards along each axis, as torch's groups do; got {mesh}"
        )
    cuts = tuple(Cut.of(placements[axis], mesh.size(axis)) for axis in shard_axes)
    groups = _groups_of(mesh, shard_axes)
    row, column = (grid == dist.get_rank()).nonzero()[0]
    return Layout(
        tuple(grid.flatten().tolist()),
        tuple(map(tuple, grid.tolist())),
        cuts,
        cut_groups=groups,
        shard_groups=_one_group(groups, grid[row]),
        replica_groups=_one_group(_groups_of(mesh, replica_axes), grid[:, column]),
    )


def first_of_matrix(param: Tensor, as_matrices: str | None) -> int:
    """Return the first dimension that is not one of a batch of matrices."""
    return param.ndim - 2 if as_matrices == "batch" else 0


def whole_of(param: Tensor, layout: Layout | None, as_matrices: str | None) -> torch.Size:
    """Return the shape of what the ranks of a layout hold together: this process's part of a batch, all else whole."""
    shape, first = local_of(param).shape, first_of_matrix(param, as_matrices)
    return shape[:first] + param.shape[first:] if layout else shape


def _refuse_unusable(param: DTensor) -> None:
    mesh, device = param.device_mesh, local_of(param).device
    if mesh.get_coordinate() is None:
        raise BadValue(
            f"every rank that builds the optimizer must be in the parameter's {mesh}; rank {dist.get_rank()} is not: "
            "build it on the mesh's ranks only"
        )
    if any(placement.is_partial() for placement in param.placements):
        raise BadValue(
            f"a parameter must be sharded or replicated, got placements {param.placements}; redistribute it to Shard "
            "or Replicate before building the optimizer"
        )
    if device.type not in (mesh.device_type, "meta"):
        raise BadValue(
            f"a matrix must be on the device of its {mesh.device_type} mesh, got it on {device}; train without CPU "
            "offload"
        )


def plain_layout(group: dist.ProcessGroup | None) -> Layout | None:
    """Return the layout of plain tensors that are equal on all ranks of a group; None without other ranks.

    Raises ValueError unless `group` is a process group that this rank is in.
    """
    if group is None:
        return None
    if not dist.is_initialized():
        raise BadValue("process_group needs torch.distributed; call init_process_group first, or leave it out")
    # torch gives ranks outside a group a marker instead of a ProcessGroup.
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise BadValue(
            f"process_group must be a torch.distributed group that this rank ({dist.get_rank()}) is in, got {group}; "
            "build the optimizer on the group's ranks only"
        )
    ranks = tuple(dist.get_process_group_ranks(group))
    if len(ranks) == 1:
        return None
    return Layout(ranks, tuple((rank,) for rank in ranks), replica_groups=(group,))


def _groups_of(mesh: DeviceMesh, axes: list[int]) -> Groups:
    try:
        return tuple(mesh.get_group(axis) for axis in axes)
    except (RuntimeError, AttributeError) as error:
        raise BadValue(
            f"the parameter's {mesh} must have process groups, but it has not been initialized; make it with "
            "torch.distributed.init_device_mesh"
        ) from error


def _one_group(groups: Groups, ranks: Tensor) -> Groups:
    """Return the group of ranks that several groups connect; all of these ranks must call it."""
    return groups if len(groups) < 2 else (_group_of(dist.group.WORLD, tuple(ranks.tolist())),)


@cache
def _group_of(world: dist.ProcessGroup, ranks: tuple[int, ...]) -> dist.ProcessGroup:
    if len(ranks) == dist.get_world_size(world):
        return world
    return cast(dist.ProcessGroup, dist.new_group(list(ranks), use_local_synchronization=True))


def local_of(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: a DTensor's shard, which shares its memory, or itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
