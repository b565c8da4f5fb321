"""The owner of each matrix, and the agreement of all ranks on the matrices.

Owners are balanced by the floating-point operations of their orthogonalizations, over all param groups together:
the costliest matrix first, each to the rank with the least so far.
"""

import hashlib
import heapq
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from .layout import Groups, Layout


def assign_owners(layout: Layout, flops: list[float]) -> list[int]:
    """Return the owner, a global rank of the layout's grid, of each matrix, given the operations of each."""
    # Shard by shard: equal matrices go to all replicas in turn, which each then have as much to pass on.
    ranks = chain.from_iterable(zip(*layout.grid, strict=True))
    loads = [(0.0, order, rank) for order, rank in enumerate(ranks)]  # a heap
    owners = [0] * len(flops)
    for i in sorted(range(len(flops)), key=lambda i: -flops[i]):
        load, order, rank = loads[0]
        owners[i] = rank
        heapq.heapreplace(loads, (load + flops[i], order, rank))
    return owners


def refuse_disagreement(groups: Groups, outline: list[str], device: torch.device) -> None:
    """Raise ValueError, on every rank, unless all ranks that `groups` connect have the same outline (line by line)."""
    if device.type == "meta":
        return  # a plan on paper: there is no other rank to ask
    digest = hashlib.sha256("\n".join(outline).encode()).digest()
    mine = torch.tensor(list(digest), dtype=torch.uint8, device=device)  # (32,)
    complaint = None
    for group in groups:
        everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine, group=group)
        if not all(torch.equal(mine, each) for each in everyone):
            outlines: list[Any] = [None] * len(everyone)
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
