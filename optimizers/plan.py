"""The plan of a step, made once when an optimizer is built: which route each matrix takes, who owns it, what it costs.

    print(optimizer.plan)

Owners are balanced by the floating-point operations of their orthogonalizations, over all param groups together:
the costliest matrix first, each to the rank with the least so far.
"""

import heapq
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import chain
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from . import polar
from .buckets import Matrix
from .checks import name_of
from .layout import Layout, agree, layout_of, local_of, replicated
from .owned import Owned
from .routes import Gathered, Local, shape_in
from .rule import UpdateRule, rule_named
from .wire import Traffic


@dataclass(frozen=True)
class Entry:
    """One parameter of the plan; the fields after `rule` are of matrices, and layout and owner of shared ones.

    view: the (batch, m, n) that it is seen as. owner: a global rank. flops: of its direction. inward, outward: dtypes
    in which it travels to its owner and back; outward None is signs, one bit an entry.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    view: tuple[int, int, int] | None = None
    layout: Layout | None = None
    owner: int | None = None
    flops: float = 0.0
    working: torch.dtype | None = None
    inward: torch.dtype | None = None
    outward: torch.dtype | None = None

    @property
    def route(self) -> str:
        """local, replicated, sharded, hsdp or gathered."""
        return self.layout.route if self.layout else "local"

    @property
    def direction_bytes(self) -> int:
        """What the whole direction takes on the wire, when it has no zero; 0 where nothing is sent."""
        if not (self.layout and self.layout.grid):
            return 0
        return -(-prod(self.shape) // 8) + 1 if self.outward is None else prod(self.shape) * self.outward.itemsize


@dataclass(frozen=True)
class Part:
    """Parameters of one group that take one route; elementwise rules, which need no whole matrix, have none."""

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
        rows = [("parameter", "shape", "rule", "route", "owner", "GFLOP", "direction bytes")]
        for entry in self.entries:
            shape, owner = "x".join(map(str, entry.shape)), "" if entry.owner is None else str(entry.owner)
            flops = f"{entry.flops / 1e9:.3g}" if entry.flops else ""
            size = f"{entry.direction_bytes:,}" if entry.direction_bytes else ""
            rows.append((entry.name, shape, entry.rule, entry.route, owner, flops, size))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        traffic = self.traffic()
        for kind in sorted(traffic.sent.keys() | traffic.received.keys()):
            sent, received = traffic.sent[kind], traffic.received[kind]
            lines.append(f"{kind}: this rank sends {sent:,} and receives {received:,} bytes a step")
        if self.loads():
            lines.append(f"the busiest owner computes {self.balance():.2f} times the mean")
        return "\n".join(lines)


def make_plan(groups: list[dict], process_group: dist.ProcessGroup | None, ask: bool = True) -> Plan:
    """Plan a step over param groups.

    Every rank of the layouts' groups must call it, unless it does not `ask` whether they agree. Raises ValueError,
    naming the parameter, for a layout that cannot be done, and on every rank where the ranks disagree.
    """
    shared = replicated(process_group)
    rules = [rule_named(group["rule"]) for group in groups]
    entries = [
        _entry(group, position, rule, shared)
        for group, rule in zip(groups, rules, strict=True)
        for position in range(len(group["params"]))
    ]
    params = [param for group in groups for param in group["params"]]
    if ask and params:
        _refuse_disagreement(entries, params, shared)
    entries = _with_owners(entries)
    parts, start = [], 0
    for group, rule in zip(groups, rules, strict=True):
        mine = entries[start : start + len(group["params"])]
        parts.append(_parts(group["params"], mine) if rule.direct else [Part(list(range(len(mine))), None)])
        start += len(mine)
    return Plan(entries, parts, rules)


def _entry(group: dict, position: int, rule: UpdateRule, shared: Layout | None) -> Entry:
    param, name = group["params"][position], name_of(group, position)
    entry = Entry(name, tuple(param.shape), rule.name)
    if not rule.direct:
        return entry
    try:
        layout = layout_of(param, shared, group.get("as_matrices"))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    batch, m, n = shape_in(group, param if layout else local_of(param))
    return replace(
        entry,
        view=(batch, m, n),
        layout=layout,
        flops=batch * _flops(m, n, group, param),
        working=working_dtype(param, group),
        inward=_inward(param, group),
        outward=group.get("wire_dtype") or (None if rule.signs else torch.bfloat16),
    )


def state_dtype(param: Tensor, group: dict) -> torch.dtype:
    """Return the dtype of a parameter's state."""
    return group.get("state_dtype") or param.dtype


def working_dtype(param: Tensor, group: dict) -> torch.dtype:
    """Return the dtype in which `prepare` gets a gradient of the parameter's own dtype."""
    return torch.promote_types(param.dtype, state_dtype(param, group))


def _inward(param: Tensor, group: dict) -> torch.dtype:
    """Return the precision in which shards travel to the owners: bfloat16 where these compute in it anyway."""
    computes = group.get("ns_dtype") or polar.default_dtype(param)
    if "ns_dtype" in group and group.get("ns_form") != "svd" and computes == torch.bfloat16:
        return torch.bfloat16
    return working_dtype(param, group)


def _flops(m: int, n: int, group: dict, param: Tensor) -> float:
    """Operations of one direction; of a rule without Newton-Schulz options, what the default iteration takes."""
    form = group.get("ns_form", "auto")
    form = "plain" if form == "svd" else form  # about as much, and what matters is the order
    options = {name: group[name] for name in ("ns_steps", "ns_coefficients") if name in group}
    dtype = group.get("ns_dtype") or polar.default_dtype(param)
    return polar.flops(m, n, form=form, dtype=dtype, device=param.device, **options)


def _refuse_disagreement(entries: list[Entry], params: list[Tensor], shared: Layout | None) -> None:
    """Compare, among the ranks of each layout, all that decides what they send to one another."""
    outlines: dict[tuple[int, ...], tuple[Layout, list[str]]] = {}
    if shared:
        outlines[shared.ranks] = shared, []  # asked even where this rank has no matrix: others may
    for entry in entries:
        if entry.layout:
            _, outline = outlines.setdefault(entry.layout.ranks, (entry.layout, []))
            sent = f"{entry.inward} in, {entry.outward or 'signs'} out"
            outline.append(f"{entry.name} {entry.shape} as {entry.view}, {entry.rule}, {entry.route}, {sent}")
    for layout, outline in outlines.values():
        agree(layout.axes, outline, params[0].device)


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


def _parts(params: list[Tensor], entries: list[Entry]) -> list[Part]:
    """Divide a group's parameters by route; those of one route lie alike and travel in the same precision."""
    alike = defaultdict(list)
    for i, entry in enumerate(entries):
        alike[entry.layout, entry.working, entry.inward, entry.outward].append(i)
    parts = []
    for (layout, _, inward, outward), indices in alike.items():
        views = [entries[i].view for i in indices]
        if layout is None:
            route = Local(views)
        elif not layout.grid:
            route = Gathered([params[i] for i in indices], views, layout, inward)
        else:
            matrices = [Matrix(entries[i].shape, entries[i].view, entries[i].owner) for i in indices]
            route = Owned(matrices, layout, inward, outward)
        parts.append(Part(indices, route))
    return parts
