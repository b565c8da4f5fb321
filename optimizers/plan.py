"""The plan of a step, made when an optimizer is built: the route, owner, operations and bytes of each matrix.

print(optimizer.plan)
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import chain

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from .checks import BadValue, name_of
from .codec import Int8Codec, codec_of
from .exchange import OwnerExchange
from .layout import Layout, layout_of, plain_layout, whole_of
from .matrices import blocks_in, row_dims
from .owners import assign_owners, refuse_disagreement
from .quantized import bytes_of_scales, is_quantized
from .routes import Entry, Local, Route
from .rule import rule_of
from .update import grad_dtype
from .wire import Traffic


@dataclass
class Plan:
    """Routes, owners and bytes of `optimizer.step()`.

    entries: one per parameter. routes: those of each param group.
    """

    entries: list[Entry]
    routes: list[list[Route]]

    def traffic(self, rank: int | None = None) -> Traffic:
        """Return the bytes that a global rank (None: this one) sends and receives per step without zeros."""
        total = Traffic()
        if rank is None:
            rank = dist.get_rank() if dist.is_initialized() else 0
        for route in chain(*self.routes):
            route.add_traffic(total, rank)
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


def make_plan(
    groups: list[dict], process_group: dist.ProcessGroup | None, ask: bool = True, to_owners: bool = False
) -> Plan:
    """Plan a step over param groups. to_owners: whether gradients of plain matrices reach their owners only.

    Every rank of the layouts' groups must call it, unless it does not `ask` whether they agree. Raises ValueError,
    naming the parameter, for a layout that is not supported, and on every rank where the ranks disagree.
    """
    plain = plain_layout(process_group)
    by_group = [
        [_entry(group, position, plain, to_owners) for position in range(len(group["params"]))] for group in groups
    ]
    entries = list(chain(*by_group))
    if ask and entries:
        first = next(param for group in groups for param in group["params"])
        refuse_disagreement(entries, plain, first.device)
    assign_owners(entries)
    return Plan(entries, [_routes(group, mine) for group, mine in zip(groups, by_group, strict=True)])


def _entry(group: dict, position: int, plain: Layout | None, to_owners: bool) -> Entry:
    param, name, rule = group["params"][position], name_of(group, position), rule_of(group)
    entry = Entry(name, tuple(param.shape), rule.name)
    entry.coded = sum(is_quantized(each, param, group, rule) for each in rule.state)
    entry.scales = bytes_of_scales(param, group, entry.coded)
    if rule.direct:
        try:
            entry.layout = layout_of(param, plain, group.get("as_matrices"))
        except ValueError as error:
            raise BadValue(f"{name}: {error}") from None
        entry.whole = whole_of(param, entry.layout, group.get("as_matrices"))
        entry.blocks = blocks_in(group, entry.whole)
        counts = entry.blocks.shape_counts.items()
        entry.flops = sum(count * rule.flops(m, n, group, param) for (m, n), count in counts)
        entry.grad_dtype = grad_dtype(param, group)
        entry.to_owner_dtype = rule.rounds_to(group, param) or entry.grad_dtype
        entry.to_owner_codec = Int8Codec() if group.get("to_owner_dtype") == "int8" else None
        entry.codec = codec_of(rule.signs, group.get("wire_dtype"))
        entry.floats, entry.row_dims = entry.blocks.count if rule.sends_floats else 0, row_dims(entry.whole, group)
        entry.owner_only = to_owners and entry.layout is not None
        if entry.owner_only and (isinstance(param, DTensor) or group.get("line_search")):
            got = "a line search, which needs it on all" if group.get("line_search") else "a DTensor"
            raise BadValue(
                f"{name}: a gradient that its owner alone gets must be of a plain tensor and without a line search; "
                f"got {got}; leave gradients='all_reduced'"
            )
    return entry


def _routes(group: dict, entries: list[Entry]) -> list[Route]:
    """Divide a group's parameters by route; those of one route have equal layouts and precisions of messages."""
    alike, rule = defaultdict(list), rule_of(group)
    for i, entry in enumerate(entries):
        alike[entry.layout, entry.grad_dtype, entry.to_owner_dtype, entry.to_owner_codec, entry.codec].append(i)
    routes: list[Route] = []
    for (layout, *_), indices in alike.items():
        mine = [entries[i] for i in indices]
        route = OwnerExchange if layout else Local
        routes.append(route(rule, indices, mine))
    return routes
