"""The plan of a step, made once when an optimizer is built: which route each matrix takes, who owns it, what it costs.

    print(optimizer.plan)

Owners are balanced by the floating-point operations of their orthogonalizations, over all param groups together:
the costliest matrix first, each to the rank with the least so far.
"""

import heapq
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from . import polar
from .buckets import Matrix
from .checks import name_of
from .layout import Layout, agree, layout_of, local_of
from .owned import Owned
from .routes import Gathered, Local, shape_in
from .rule import UpdateRule, rule_named
from .wire import Traffic


@dataclass(frozen=True)
class Entry:
    """One parameter of the plan; layout and owner (a global rank) are None where no other process is needed."""

    name: str
    shape: tuple[int, ...]
    rule: str
    layout: Layout | None = None
    owner: int | None = None
    flops: float = 0.0

    @property
    def route(self) -> str:
        """local, replicated, sharded, hsdp or gathered."""
        return self.layout.route if self.layout else "local"


@dataclass(frozen=True)
class Part:
    """Parameters of one group that take one route; None is the elementwise rules', which need none."""

    indices: list[int]
    route: Local | Owned | Gathered | None


@dataclass(frozen=True)
class Plan:
    """What `optimizer.step()` will do.

    entries: one a parameter. parts: for each param group, its parameters by route.
    """

    entries: list[Entry]
    parts: list[list[Part]]
    rules: list[UpdateRule]

    def traffic(self, rank: int | None = None) -> Traffic:
        """Return what a global rank (None: this one) sends and receives a step, when no direction has a zero."""
        total = Traffic()
        rank = dist.get_rank() if rank is None and dist.is_initialized() else rank
        for parts, rule in zip(self.parts, self.rules, strict=True):
            for route in (part.route for part in parts if part.route and part.route.collective):
                if rank in route.layout.ranks:
                    route.add_traffic(total, rank, rescales=rule.rms is not None)
        return total

    def loads(self) -> dict[tuple[int, ...], list[float]]:
        """Return, for each set of ranks that share matrices, the operations a step of every one of them."""
        loads: dict[tuple[int, ...], list[float]] = {}
        for entry in self.entries:
            if entry.owner is not None:
                ranks = entry.layout.ranks
                loads.setdefault(ranks, [0.0] * len(ranks))[ranks.index(entry.owner)] += entry.flops
        return loads

    def balance(self) -> float:
        """Return the largest owner's operations over the mean; 1 is perfect, or nothing to share."""
        return max((max(load) * len(load) / sum(load) for load in self.loads().values() if sum(load)), default=1.0)

    def __str__(self) -> str:
        rows = [("parameter", "shape", "rule", "route", "owner", "GFLOP")]
        for entry in self.entries:
            shape, owner = "x".join(map(str, entry.shape)), "" if entry.owner is None else str(entry.owner)
            flops = f"{entry.flops / 1e9:.3g}" if entry.flops else ""
            rows.append((entry.name, shape, entry.rule, entry.route, owner, flops))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        traffic = self.traffic()
        for kind in sorted(traffic.sent.keys() | traffic.received.keys()):
            sent, received = traffic.sent[kind], traffic.received[kind]
            lines.append(f"{kind}: this rank sends {sent:,} and receives {received:,} bytes a step")
        if self.loads():
            lines.append(f"the busiest owner computes {self.balance():.2f} times the mean")
        return "\n".join(lines)


def make_plan(groups: list[dict], process_group: dist.ProcessGroup | None) -> Plan:
    """Plan a step over param groups; every rank of the layouts' groups must call it.

    Raises ValueError, naming the parameter, for a layout that cannot be done, and on every rank where the ranks
    disagree about the parameters.
    """
    rules = [rule_named(group["rule"]) for group in groups]
    entries = [
        _entry(group, position, rule, process_group)
        for group, rule in zip(groups, rules, strict=True)
        for position in range(len(group["params"]))
    ]
    params = [param for group in groups for param in group["params"]]
    _refuse_disagreement(entries, params)
    entries = _with_owners(entries)
    parts, start = [], 0
    for group, rule in zip(groups, rules, strict=True):
        mine = entries[start : start + len(group["params"])]
        parts.append(_parts(group, rule, mine) if rule.direct else [Part(list(range(len(mine))), None)])
        start += len(mine)
    return Plan(entries, parts, rules)


def _entry(group: dict, position: int, rule: UpdateRule, process_group: dist.ProcessGroup | None) -> Entry:
    param, name = group["params"][position], name_of(group, position)
    entry = Entry(name, tuple(param.shape), rule.name)
    if not rule.direct:
        return entry
    try:
        layout = layout_of(param, process_group, group.get("as_matrices"))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    batch, m, n = shape_in(group, param if layout else local_of(param))
    return replace(entry, layout=layout, flops=batch * _flops(m, n, group, param))


def _flops(m: int, n: int, group: dict, param: Tensor) -> float:
    """Operations of one direction; of a rule without Newton-Schulz options, what the default iteration takes."""
    form = group.get("ns_form", "auto")
    form = "plain" if form == "svd" else form  # about as much, and what matters is the order
    options = {name: group[name] for name in ("ns_steps", "ns_coefficients") if name in group}
    dtype = group.get("ns_dtype") or polar.default_dtype(param)
    return polar.flops(m, n, form=form, dtype=dtype, device=param.device, **options)


def _refuse_disagreement(entries: list[Entry], params: list[Tensor]) -> None:
    outlines: dict[tuple[int, ...], tuple[Layout, Tensor, list[str]]] = {}
    for entry, param in zip(entries, params, strict=True):
        if entry.layout:
            _, _, outline = outlines.setdefault(entry.layout.ranks, (entry.layout, param, []))
            outline.append(f"{entry.name} {entry.shape} {param.dtype} {entry.rule} {entry.route} of {entry.layout.dim}")
    for layout, param, outline in outlines.values():
        agree(layout.axes, outline, param.device)


def _with_owners(entries: list[Entry]) -> list[Entry]:
    """Give every matrix that is not gathered an owner among the ranks that hold it."""
    by_ranks = defaultdict(list)
    for i, entry in enumerate(entries):
        if entry.layout and entry.layout.grid:
            by_ranks[entry.layout.ranks].append(i)
    owned = list(entries)
    for indices in by_ranks.values():
        # Down the columns: equal matrices go to all replicas in turn, which each then have as much to pass on.
        grid = entries[indices[0]].layout.grid
        order = chain.from_iterable(zip(*grid, strict=True))
        loads = [(0.0, place, rank) for place, rank in enumerate(order)]  # a heap
        for i in sorted(indices, key=lambda i: -entries[i].flops):
            load, place, rank = loads[0]
            owned[i] = replace(entries[i], owner=rank)
            heapq.heapreplace(loads, (load + entries[i].flops, place, rank))
    return owned


def _parts(group: dict, rule: UpdateRule, entries: list[Entry]) -> list[Part]:
    """Divide a group's parameters by route; those of one route lie alike and travel in the same precision."""
    alike = defaultdict(list)
    for i, (param, entry) in enumerate(zip(group["params"], entries, strict=True)):
        alike[entry.layout, _inward(group, param)].append(i)
    parts = []
    for (layout, inward), indices in alike.items():
        params = [group["params"][i] for i in indices]
        shapes = [shape_in(group, param if layout else local_of(param)) for param in params]
        if layout is None:
            route = Local(shapes)
        elif not layout.grid:
            route = Gathered(params, shapes, layout, inward)
        else:
            matrices = [
                Matrix(entries[i].shape, shape, entries[i].owner) for i, shape in zip(indices, shapes, strict=True)
            ]
            outward = group.get("wire_dtype") or (None if rule.signs else torch.bfloat16)
            route = Owned(matrices, layout, inward, outward)
        parts.append(Part(indices, route))
    return parts


def _inward(group: dict, param: Tensor) -> torch.dtype:
    """The precision in which shards travel to the owners: where these compute in bfloat16, that loses nothing more."""
    if "ns_dtype" in group and (group["ns_dtype"] or polar.default_dtype(param)) == torch.bfloat16:
        return torch.bfloat16
    return torch.promote_types(param.dtype, group.get("state_dtype") or param.dtype)
