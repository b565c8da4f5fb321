"""The layout of a parameter's shards over ranks, read from the tensor and validated.

A layout is a grid of ranks (R, W): R replicas, each cut into W shards along one dimension of the tensor.

    plain tensor, process_group     (ranks, 1)      replicated
    DTensor, one Shard              (1, ranks)      sharded: FSDP2, tensor parallelism
    DTensor, Replicate and Shard    (R, W)          hsdp
    DTensor, anything else          no grid         gathered: several Shards (FSDP x TP), several replicated axes
    no other process needed         no layout       local
"""

from dataclasses import dataclass, field
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor

from .checks import BadValue

Groups = tuple[dist.ProcessGroup, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The ranks that hold one parameter, and its division among them.

    Attributes:
        ranks: global ranks that hold the parameter, in the order of the group or mesh.
        grid: (R, W) global ranks, one row per replica, one column per shard. Empty for gathered.
        dim: tensor dimension that is cut into W shards; 0 if W is 1.
        placements: of the DTensor, for gathered.
        shard_groups: groups along which the tensor is cut; in a grid at most one, whose rank s holds shard s.
        replica_groups: groups whose ranks hold the same shard; in a grid at most one, whose rank r holds replica r.
    """

    ranks: tuple[int, ...]
    grid: tuple[tuple[int, ...], ...] = ()
    dim: int = 0
    placements: tuple = ()
    shard_groups: Groups = field(default=(), compare=False)
    replica_groups: Groups = field(default=(), compare=False)

    @property
    def kind(self) -> str:
        """replicated, sharded, hsdp or gathered."""
        if not self.grid:
            return "gathered"
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

    def shard_range(self, shape: Shape, shard: int) -> tuple[int, int]:
        """Return (start, length) of a shard along `dim`, as torch.chunk cuts: the last may be short or empty."""
        longest = -(-shape[self.dim] // self.shards)
        start = min(shard * longest, shape[self.dim])
        return start, min(longest, shape[self.dim] - start)

    def padded_shard(self, shape: Shape) -> Shape:
        """Return the shape of the longest shard, to which all shards are padded on the wire."""
        return (*shape[: self.dim], self.shard_range(shape, 0)[1], *shape[self.dim + 1 :])


def layout_of(param: Tensor, plain: Layout | None, as_matrices: str | None) -> Layout | None:
    """Return the layout of a matrix parameter; None if this process needs no other rank for it.

    plain: the layout of plain tensors. Raises ValueError for a layout that is not supported.
    """
    if not isinstance(param, DTensor):
        return plain
    _refuse_unusable(param)
    mesh, placements = param.device_mesh, cast(tuple[Any, ...], param.placements)
    axes = [axis for axis in range(mesh.ndim) if mesh.size(axis) > 1]
    shard_axes = [axis for axis in axes if not placements[axis].is_replicate()]
    replica_axes = [axis for axis in axes if axis not in shard_axes]
    if not axes:
        return None
    if as_matrices == "batch" and shard_axes and all(placements[axis].dim < param.ndim - 2 for axis in shard_axes):
        return None  # the batch is cut, each matrix is whole
    ranks = tuple(mesh.mesh.flatten().tolist())
    groups: dict[str, Any] = {
        "shard_groups": _groups_of(mesh, shard_axes),
        "replica_groups": _groups_of(mesh, replica_axes),
    }
    # FSDP over TP interleaves: neighbouring rows of a _StridedShard are on ranks that are not neighbours.
    strided = any(getattr(placements[axis], "split_factor", 1) > 1 for axis in shard_axes)
    grid = mesh.mesh.movedim(shard_axes[0], -1) if shard_axes else mesh.mesh.unsqueeze(-1)
    grid = grid.reshape(-1, grid.shape[-1])  # (R, W)
    ordered = all(line == sorted(line) for line in grid.tolist() + grid.mT.tolist())  # as groups number their ranks
    if len(shard_axes) > 1 or len(replica_axes) > 1 or strided or not ordered:
        return Layout(ranks, placements=placements, **groups)
    dim = placements[shard_axes[0]].dim if shard_axes else 0
    return Layout(ranks, tuple(map(tuple, grid.tolist())), dim, **groups)


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


def local_of(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: a DTensor's shard, which shares its memory, or itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
