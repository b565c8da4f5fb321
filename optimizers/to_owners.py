"""Gradients reduced to the owners of their matrices instead of to all ranks, as DistributedDataParallel's buckets fill.

    optimizer = build_optimizer(ddp_model, "olion", lr=6e-4, gradients="to_owners")

Of an all-reduce's 2 (W - 1) / W of a matrix's gradient a rank sends and receives half; the direction, a bit per entry
of OLion, follows in the step. Momentum is on the owner only. Per bucket, DDP's communication hook reduces the matrices
of each owner to it and all-reduces the rest; at the end of the backward pass the ranks learn the norm of each matrix's
gradient, and a non-owner's `.grad` becomes an `Elsewhere`, which knows that norm.

Means are DDP's: each rank's gradient is divided by W, then summed. The order of the sum is the backend's, and another
one than that of an all-reduce of the whole bucket: results agree bit for bit on two ranks, to rounding on more. Without
`no_sync` a backward pass needs `zero_grad()` before it, as a mean cannot be added to on its owner alone.
"""

from dataclasses import dataclass
from itertools import chain, groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from . import wire
from .checks import BadValue
from .elsewhere import Elsewhere
from .engine import RuleOptimizer
from .routes import Entry


@dataclass
class _Transit:
    """A bucket whose reductions are under way."""

    buffer: Tensor
    rest: Tensor  # of the elementwise parameters, together
    parts: list[Tensor]  # of `buffer`, where `rest` belongs
    works: list[dist.Work]
    done: Future


class ToOwners:
    """Reduces the gradients of one DistributedDataParallel model for an optimizer."""

    def __init__(self, optimizer: RuleOptimizer, group: dist.ProcessGroup):
        self._optimizer, self._group = optimizer, group
        self._owners: dict[Tensor, int] = {}
        self._transits: list[_Transit] = []

    def reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Start to reduce a bucket; its gradients are complete when the backward pass is."""
        if bucket.index() == 0:  # the last backward pass may have failed
            self._owners, self._transits = owners_of(self._optimizer), []
        buffer, params = bucket.buffer(), bucket.parameters()
        buffer.mul_(1 / dist.get_world_size(self._group))  # as DDP does without a hook
        parts = list(zip([self._owners.get(param) for param in params], _parts(buffer, params), strict=True))
        rest = [part for owner, part in parts if owner is None]
        together = rest[0] if len(rest) == 1 else torch.cat(rest) if rest else buffer[:0]
        works, end = [], 0
        for owner, run in groupby(parts, key=lambda each: each[0]):
            start, end = end, end + sum(len(part) for _, part in run)
            if owner is not None:
                works.append(wire.reduce(buffer[start:end], owner, self._group, "gradients"))
        if rest:
            works.append(wire.start_all_reduce(together, self._group, "gradients"))
        done: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else [])
        self._transits.append(_Transit(buffer, together, rest, works, done))
        if bucket.is_last():  # before DDP's own callback, which waits for `done` and writes the gradients
            Variable._execution_engine.queue_callback(self._arrive)
        return done

    def _arrive(self) -> None:
        """Wait for all buckets."""
        for transit in self._transits:
            for work in transit.works:
                work.wait()
            if len(transit.parts) > 1:
                torch._foreach_copy_(transit.parts, list(transit.rest.split([len(part) for part in transit.parts])))
            transit.done.set_result(transit.buffer)
        self._transits = []
        Variable._execution_engine.queue_callback(self._share_norms)  # after DDP's own callback

    @torch.no_grad()
    def _share_norms(self) -> None:
        """Tell all ranks the norm of each matrix's gradient, and put an Elsewhere where it is not."""
        rank = dist.get_rank()
        mine = [param.grad if owner == rank else None for param, owner in self._owners.items()]
        unknown = next(iter(self._owners)).new_zeros(2, dtype=torch.float64)
        found = torch.stack([unknown if grad is None else _norm_of(grad) for grad in mine])  # (n, 2)
        wire.all_reduce(found, [self._group], "norms")
        for (param, owner), (norm, is_finite) in zip(self._owners.items(), found, strict=True):
            if owner != rank and param.grad is not None:  # unused on all ranks otherwise
                param.grad = Elsewhere(param.grad, owner, norm.to(param.grad.dtype), is_finite > 0)


def _norm_of(grad: Tensor) -> Tensor:
    """Return a gradient's norm, as `clip_grad_norm_` computes it, and whether its entries are finite: float64 (2,)."""
    return torch.stack([torch.linalg.vector_norm(grad, 2.0).double(), grad.isfinite().all().double()])


def _parts(buffer: Tensor, params: list[Tensor]) -> list[Tensor]:
    """Return the flat part of each parameter in a bucket."""
    return list(buffer.split([param.numel() for param in params]))


def owners_of(optimizer: RuleOptimizer) -> dict[Tensor, int]:
    """Return the owner of each matrix whose gradient it alone gets."""
    params = chain(*(group["params"] for group in optimizer.param_groups))
    planned = zip(params, optimizer.plan.entries, strict=True)
    return {param: entry.owner for param, entry in planned if entry.owner_only and entry.owner is not None}


def _reduce(state: ToOwners, bucket: dist.GradBucket) -> Future[Tensor]:
    return state.reduce(bucket)


def send_to_owners(optimizer: RuleOptimizer, model: nn.Module) -> None:
    """Let a DistributedDataParallel model reduce each matrix's gradient to its owner alone; see the module.

    A collective of the model's ranks. Raises ValueError for another model, for a rule whose matrices have no owners, a
    line search, and a model that has a communication hook.
    """
    if not isinstance(model, DistributedDataParallel):
        raise BadValue(
            f"gradients='to_owners' needs a DistributedDataParallel model, got {type(model).__name__}; wrap it, or "
            "leave 'all_reduced' (FSDP2 reduces each gradient to its shards by itself)"
        )
    if not any(entry.blocks for entry in optimizer.plan.entries):
        raise BadValue(
            "gradients='to_owners' needs a rule with directions, as olion or muon, got none; leave 'all_reduced'"
        )
    group = model.process_group
    if group is None or dist.get_world_size(group) == 1:
        return
    try:
        model.register_comm_hook(ToOwners(optimizer, group), _reduce)
    except RuntimeError as error:
        raise BadValue(
            "gradients='to_owners' needs the model's communication hook, got one that has one already; wrap the model "
            "anew for each optimizer"
        ) from error
    optimizer.keep_at_owners()


def add_traffic(traffic: wire.Traffic, sizes: list[int], entries: list[Entry], ranks: int, rank: int) -> None:
    """Count the bytes per step of reducing gradients of these sizes: to owners where entries say so, else to all."""
    sized = list(zip(sizes, entries, strict=True))
    traffic.add_all_reduce("gradients", sum(size for size, entry in sized if not entry.owner_only), ranks)
    owned = [(size, entry) for size, entry in sized if entry.owner_only]
    if not owned:
        return
    place = {member: number for number, member in enumerate(owned[0][1].layout.ranks)}
    for size, entry in owned:
        traffic.add_reduce("gradients", size, place[rank], place[entry.owner], ranks)
    traffic.add_all_reduce("norms", 16 * len(owned), ranks)
