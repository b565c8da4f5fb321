"""The owner of each matrix, and the agreement of all ranks on the matrices."""

import hashlib
import heapq
from collections import defaultdict
from itertools import chain, zip_longest
from typing import Any

import torch
import torch.distributed as dist

from .checks import BadValue
from .layout import Groups, Layout
from .routes import Entry


def assign_owners(entries: list[Entry]) -> None:
    """Give every matrix an owner among the ranks of its layout.

    Owners are balanced by the floating-point operations of their orthogonalizations, over all param groups together:
    the costliest matrix first, each to the rank with the least so far.
    """
    sharing: dict[tuple[int, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.layout:
            sharing[entry.layout.ranks].append(entry)
    for matrices in sharing.values():
        # Column by column of the grid: equal matrices go to the replicas in turn, so that all forward equally many.
        ranks = chain(*zip(*matrices[0].layout.grid, strict=True))
        loads = [(0.0, order, rank) for order, rank in enumerate(ranks)]  # a heap
        for entry in sorted(matrices, key=lambda entry: -entry.flops):
            load, order, entry.owner = loads[0]
            heapq.heapreplace(loads, (load + entry.flops, order, entry.owner))


def refuse_disagreement(entries: list[Entry], plain: Layout | None, device: torch.device) -> None:
    """Raise ValueError, on every rank, unless all ranks of each layout have the same matrices in it.

    plain: the layout of plain tensors, whose ranks are asked even if this one has no matrix: others may have some.
    """
    outlines: dict[tuple[int, ...], tuple[Groups, list[str]]] = {plain.ranks: (plain.groups, [])} if plain else {}
    for entry in entries:
        if entry.layout:
            outlines.setdefault(entry.layout.ranks, (entry.layout.groups, []))[1].append(entry.outline)
    for groups, outline in outlines.values() if device.type != "meta" else ():  # a plan without ranks
        _compare(groups, outline, device)


def _compare(groups: Groups, outline: list[str], device: torch.device) -> None:
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
            mine = torch.zeros_like(mine)  # the next axis passes it on to the others
    if complaint:
        raise BadValue(
            f"all ranks must hand the optimizer the same parameters in the same order; {complaint}; "
            "build the same model on every rank"
        )


def _first_difference(outlines: list[list[str]], ranks: list[int]) -> str:
    for rank, other in zip(ranks, outlines, strict=True):
        for here, there in zip_longest(outlines[0], other, fillvalue="no more"):
            if here != there:
                return f"rank {ranks[0]} has {here}, rank {rank} has {there}"
    return "ranks of another row of the mesh differ"
