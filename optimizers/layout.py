"""How a parameter lies over processes: what a plain tensor or a DTensor says of itself, checked.

A layout is a grid of ranks (R, W): R replicas, each cut into W shards along one dimension of the tensor.

    plain tensor, process_group     (ranks, 1)      replicated
    DTensor, one Shard              (1, ranks)      sharded: FSDP2, tensor parallelism
    DTensor, Replicate and Shard    (R, W)          hsdp
    DTensor, anything else          no grid         gathered: several Shards (FSDP x TP), several replicated axes
    no other process needed         no layout       local
"""

import hashlib
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor


@dataclass(frozen=True)
class Layout:
    """Where the shards of a parameter are.

    Attributes:
        route: replicated, sharded, hsdp or gathered.
        ranks: the global ranks that hold the parameter, in the order of the group or mesh.
        grid: (R, W) global ranks, a replica a row, a shard a column. Empty for gathered.
        dim: the dimension that is cut into W shards; None where each replica is one rank.
        placements: of gathered, the DTensor's.
        row: the group of this rank's replica, shard s being its rank s; None where W is 1.
        column: the group of the ranks that hold the same shard, replica r being its rank r; None where R is 1.
        axes: groups that lead from every rank to every other.
        cut: those of them along which the tensor is cut.
    """

    route: str
    ranks: tuple[int, ...]
    grid: tuple[tuple[int, ...], ...] = ()
    dim: int | None = None
    placements: tuple = ()
    row: dist.ProcessGroup | None = field(default=None, compare=False)
    column: dist.ProcessGroup | None = field(default=None, compare=False)
    axes: tuple[dist.ProcessGroup, ...] = field(default=(), compare=False)
    cut: tuple[dist.ProcessGroup, ...] = field(default=(), compare=False)

    @property
    def shards(self) -> int:
        """Shards that a replica is cut into."""
        return len(self.grid[0])

    @property
    def here(self) -> tuple[int, int]:
        """The (replica, shard) that this process holds."""
        return self.place(dist.get_rank())

    def place(self, rank: int) -> tuple[int, int]:
        """Return the (replica, shard) that a global rank holds."""
        return next((replica, row.index(rank)) for replica, row in enumerate(self.grid) if rank in row)


def layout_of(param: Tensor, shared: Layout | None, as_matrices: str | None) -> Layout | None:
    """Return the layout of a matrix parameter, None where this process needs no other for it.

    shared: the layout of plain tensors. Raises ValueError for a layout that cannot be done, saying what to do.
    """
    if not isinstance(param, DTensor):
        return shared
    _refuse_unusable(param)
    mesh, placements = param.device_mesh, param.placements
    axes = [axis for axis in range(mesh.ndim) if mesh.size(axis) > 1]
    cut = [axis for axis in axes if not placements[axis].is_replicate()]
    if not axes:
        return None
    if as_matrices == "batch" and cut and all(placements[axis].dim < param.ndim - 2 for axis in cut):
        return None  # the batch is cut, each matrix is whole
    groups = _groups_of(mesh, axes)
    replicas = [axis for axis in axes if axis not in cut]
    # FSDP over TP interleaves: neighbouring rows of a _StridedShard are on ranks that are not neighbours.
    strided = any(getattr(placements[axis], "split_factor", 1) > 1 for axis in cut)
    table = mesh.mesh.movedim(cut[0], -1).reshape(-1, mesh.size(cut[0])) if cut else mesh.mesh.reshape(-1, 1)  # (R, W)
    ordered = all(line == sorted(line) for line in table.tolist() + table.mT.tolist())  # as groups number their ranks
    ranks = tuple(mesh.mesh.flatten().tolist())
    if len(cut) > 1 or len(replicas) > 1 or strided or not ordered:
        return Layout("gathered", ranks, placements=placements, axes=groups, cut=tuple(map(mesh.get_group, cut)))
    return Layout(
        route="replicated" if not cut else "hsdp" if replicas else "sharded",
        ranks=ranks,
        grid=tuple(map(tuple, table.tolist())),
        dim=placements[cut[0]].dim if cut else None,
        row=mesh.get_group(cut[0]) if cut else None,
        column=mesh.get_group(replicas[0]) if replicas else None,
        axes=groups,
    )


def _refuse_unusable(param: DTensor) -> None:
    mesh, where = param.device_mesh, local_of(param).device
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"every rank that builds the optimizer must be in the parameter's {mesh}; rank {dist.get_rank()} is not: "
            "build it on the mesh's ranks only"
        )
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"a parameter must be sharded or replicated, got placements {param.placements}; redistribute it to Shard "
            "or Replicate before building the optimizer"
        )
    if where.type not in (mesh.device_type, "meta"):
        raise ValueError(
            f"a matrix must be where its {mesh.device_type} mesh sends from, got it on {where}; train without CPU "
            "offload"
        )


def replicated(group: dist.ProcessGroup | None) -> Layout | None:
    """Return the layout of plain tensors that the ranks of a group hold alike; None without other ranks.

    Raises ValueError for what is no process group of this rank.
    """
    if group is None:
        return None
    if not dist.is_initialized():
        raise ValueError("process_group needs torch.distributed; call init_process_group first, or leave it out")
    # What torch gives to ranks outside a group is no ProcessGroup but a marker.
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError(
            f"process_group must be a torch.distributed group that this rank ({dist.get_rank()}) is in, got {group}; "
            "build the optimizer on the group's ranks only"
        )
    ranks = tuple(dist.get_process_group_ranks(group))
    if len(ranks) == 1:
        return None
    return Layout("replicated", ranks, tuple((rank,) for rank in ranks), column=group, axes=(group,))


def _groups_of(mesh: DeviceMesh, axes: list[int]) -> tuple[dist.ProcessGroup, ...]:
    try:
        return tuple(mesh.get_group(axis) for axis in axes)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"the parameter's {mesh} must have process groups, but it has not been initialized; make it with "
            "torch.distributed.init_device_mesh"
        ) from error


def local_of(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: itself, or its shard, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_length(size: int, shards: int, shard: int) -> int:
    """Return the length of a shard of a dimension: as torch.chunk cuts, so the last ones may be short or empty."""
    longest = -(-size // shards)
    return max(0, min(longest, size - shard * longest))


def agree(groups: tuple[dist.ProcessGroup, ...], outline: list[str], device: torch.device) -> None:
    """Raise ValueError, on every rank, unless all ranks that the groups connect outline their parameters alike."""
    if device.type == "meta":
        return  # a plan on paper: there is no other rank to ask
    digest = hashlib.sha256("\n".join(outline).encode()).digest()
    mine = torch.tensor(list(digest), dtype=torch.uint8, device=device)  # (32,)
    complaint = None
    for group in groups:
        everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine, group=group)
        if not all(torch.equal(mine, each) for each in everyone):
            outlines = [None] * len(everyone)
            dist.all_gather_object(outlines, outline, group=group)
            complaint = complaint or _first_difference(outlines, dist.get_process_group_ranks(group))
            mine = torch.zeros_like(mine)  # along the next axis the others learn of it
    if complaint:
        raise ValueError(
            f"all ranks must hand the optimizer the same parameters in the same order; {complaint}; "
            "build the same model on every rank"
        )


def _first_difference(outlines: list[list[str]], ranks: list[int]) -> str:
    first = outlines[0]
    for rank, other in zip(ranks, outlines, strict=True):
        for i in range(max(len(first), len(other))):
            here, there = (each[i] if i < len(each) else "no more" for each in (first, other))
            if here != there:
                return f"rank {ranks[0]} has {here}, rank {rank} has {there}"
    return "ranks of another row of the mesh differ"
