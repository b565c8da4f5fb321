"""The plan of a step, made when an optimizer is built: the route, owner, operations and bytes of each matrix.

print(optimizer.plan)
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from math import prod
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from . import polar
from .buckets import MatrixSpec
from .checks import name_of
from .codec import Codec
from .exchange import OwnerExchange
from .layout import Layout, layout_of, local_of, plain_layout
from .matrices import Blocks, blocks_in
from .owners import assign_owners, refuse_disagreement
from .precision import codec_of, grad_dtype, to_owner_dtype
from .routes import Elementwise, Gathered, Local, Route
from .rule import UpdateRule, rule_named
from .wire import Traffic


@dataclass(frozen=True)
class Entry:
    """One parameter of the plan; the fields after `rule` are of matrices, layout and owner of shared ones.

    blocks: the matrices that it is treated as. owner: a global rank. flops: of its direction.
    to_owner_dtype, codec: in which it travels to its owner, and its direction back.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    blocks: Blocks | None = None
    layout: Layout | None = None
    owner: int | None = None
    flops: float = 0.0
    grad_dtype: torch.dtype | None = None
    to_owner_dtype: torch.dtype | None = None
    codec: Codec | None = None

    @property
    def route(self) -> str:
        """local, replicated, sharded, hsdp or gathered."""
        return self.layout.kind if self.layout else "local"

    @property
    def direction_bytes(self) -> int:
        """Bytes of the whole direction on the wire, when it has no zero; 0 where nothing is sent."""
        if not (self.codec and self.blocks and self.layout and self.layout.grid):
            return 0
        return self.codec.nbytes(prod(self.shape), self.blocks.count)


@dataclass(frozen=True)
class RoutedParams:
    """Parameters of one param group, by index, that take one route."""

    indices: list[int]
    route: Route


@dataclass(frozen=True)
class Plan:
    """Routes, owners and bytes of `optimizer.step()`.

    entries: one per parameter. routed: for each param group, its parameters by route. rules: one per param group.
    """

    entries: list[Entry]
    routed: list[list[RoutedParams]]
    rules: list[UpdateRule]

    def traffic(self, rank: int | None = None) -> Traffic:
        """Return the bytes that a global rank (None: this one) sends and receives per step without zeros."""
        total = Traffic()
        if rank is None:
            rank = dist.get_rank() if dist.is_initialized() else 0
        for routed, rule in zip(self.routed, self.rules, strict=True):
            for params in routed:
                params.route.add_traffic(total, rank, rule.rms is not None, rule.refine is not None)
        return total

    def loads(self) -> dict[tuple[int, ...], list[float]]:
        """Return, for each set of ranks that share matrices, the operations per step of each of them."""
        loads: dict[tuple[int, ...], list[float]] = {}
        for entry in self.entries:
            if entry.owner is not None and entry.layout is not None:
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
            lines.append(f"{kind}: this rank sends {sent:,} and receives {received:,} bytes per step")
        if self.loads():
            lines.append(f"the busiest owner computes {self.balance():.2f} times the mean")
        return "\n".join(lines)


def make_plan(groups: list[dict], process_group: dist.ProcessGroup | None, ask: bool = True) -> Plan:
    """Plan a step over param groups.

    Every rank of the layouts' groups must call it, unless it does not `ask` whether they agree. Raises ValueError,
    naming the parameter, for a layout that is not supported, and on every rank where the ranks disagree.
    """
    plain = plain_layout(process_group)
    rules = [rule_named(group["rule"]) for group in groups]
    entries = [
        _entry(group, position, rule, plain)
        for group, rule in zip(groups, rules, strict=True)
        for position in range(len(group["params"]))
    ]
    params = [param for group in groups for param in group["params"]]
    if ask and params:
        _refuse_disagreement(entries, plain, params[0].device)
    entries = _with_owners(entries)
    routed, start = [], 0
    for group in groups:
        end = start + len(group["params"])
        routed.append(_routed(group["params"], entries[start:end]))
        start = end
    return Plan(entries, routed, rules)


def _entry(group: dict, position: int, rule: UpdateRule, plain: Layout | None) -> Entry:
    param, name = group["params"][position], name_of(group, position)
    entry = Entry(name, tuple(param.shape), rule.name)
    if not rule.direct:
        return entry
    try:
        layout = layout_of(param, plain, group.get("as_matrices"))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    blocks = blocks_in(group, param if layout else local_of(param))
    return replace(
        entry,
        blocks=blocks,
        layout=layout,
        flops=sum(count * polar.group_flops(*shape, group, param) for shape, count in blocks.shape_counts.items()),
        grad_dtype=grad_dtype(param, group),
        to_owner_dtype=to_owner_dtype(param, group),
        codec=codec_of(rule, group),
    )


def _refuse_disagreement(entries: list[Entry], plain: Layout | None, device: torch.device) -> None:
    """Compare, among the ranks of each layout, all that decides their messages to one another."""
    outlines: dict[tuple[int, ...], tuple[Layout, list[str]]] = {}
    if plain:
        outlines[plain.ranks] = plain, []  # asked even where this rank has no matrix: others may
    for entry in entries:
        if entry.layout:
            _, outline = outlines.setdefault(entry.layout.ranks, (entry.layout, []))
            sent = f"{entry.to_owner_dtype} to owners, directions in {entry.codec}"
            outline.append(f"{entry.name} {entry.shape} as {entry.blocks}, {entry.rule}, {entry.route}, {sent}")
    for layout, outline in outlines.values():
        refuse_disagreement(layout.groups, outline, device)


def _with_owners(entries: list[Entry]) -> list[Entry]:
    """Give every matrix that is not gathered an owner among the ranks that hold it."""
    by_ranks = defaultdict(list)
    for i, entry in enumerate(entries):
        if entry.layout and entry.layout.grid:
            by_ranks[entry.layout.ranks].append(i)
    owned = list(entries)
    for indices in by_ranks.values():
        owners = assign_owners(entries[indices[0]].layout, [entries[i].flops for i in indices])
        for i, owner in zip(indices, owners, strict=True):
            owned[i] = replace(entries[i], owner=owner)
    return owned


def _routed(params: list[Tensor], entries: list[Entry]) -> list[RoutedParams]:
    """Divide a group's parameters by route; those of one route have one layout and travel in the same precision."""
    alike = defaultdict(list)
    for i, entry in enumerate(entries):
        alike[entry.layout, entry.grad_dtype, entry.to_owner_dtype, entry.codec].append(i)
    return [
        RoutedParams(indices, _route([params[i] for i in indices], [entries[i] for i in indices]))
        for indices in alike.values()
    ]


def _route(params: list[Tensor], entries: list[Entry]) -> Route:
    first: Any = entries[0]
    if first.blocks is None:
        return Elementwise()
    blocks: list[Any] = [entry.blocks for entry in entries]
    if first.layout is None:
        return Local(blocks)
    if not first.layout.grid:
        return Gathered(cast(Any, params), blocks, first.layout, first.to_owner_dtype)
    owners: list[Any] = [entry.owner for entry in entries]
    matrices = [MatrixSpec(*each) for each in zip((entry.shape for entry in entries), blocks, owners, strict=True)]
    return OwnerExchange(matrices, first.layout, first.to_owner_dtype, first.codec)
