"""A tensor as pieces of one shape, its shards padded to the longest, and whole again.

Shards are numbered row by row over the axes of the mesh that cut the tensor. Along a dimension that is cut once, the
shards follow one another. FSDP over tensor parallelism interleaves: neighbouring rows may be on ranks that are not
neighbours, and the shards are put in order by an index.
"""

from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

Shape = tuple[int, ...]


class Cut(NamedTuple):
    """One axis of a mesh that cuts a tensor: dimension `dim` into `parts`, after `strides` of it (_StridedShard)."""

    dim: int
    parts: int
    strides: int = 1

    @classmethod
    def of(cls, placement: Any, parts: int) -> "Cut":
        """Return the cut of an axis of `parts` ranks with this placement, Shard or _StridedShard."""
        return cls(placement.dim, parts, getattr(placement, "split_factor", 1))


class Pieces:
    """The pieces of tensors of one shape: their shards, padded to the longest.

    shape: of a piece.
    """

    def __init__(self, whole: Shape, cuts: tuple[Cut, ...]):
        self._whole, self.cuts = whole, cuts
        self._axes = [[axis for axis, cut in enumerate(cuts) if cut.dim == dim] for dim in range(len(whole))]
        self._parts = [
            _parts(size, tuple(cuts[axis] for axis in axes)) for size, axes in zip(whole, self._axes, strict=True)
        ]
        self.shape = tuple(max(map(len, parts)) for parts in self._parts)
        self._places = [_places(*each) for each in zip(self._parts, self.shape, whole, strict=True)]
        self._tensors: dict[tuple, Tensor] = {}

    def indices(self, shard: int, dim: int) -> tuple[int, ...]:
        """Return the indices of the whole tensor, along a dimension, that a shard holds."""
        return self._parts[dim][self._part_of(shard, dim)]

    def unpadded(self, shard: int, pieces: Tensor) -> Tensor:
        """Return a shard's own part of pieces (..., *shape): a view."""
        for dim in range(-len(self.shape), 0):
            pieces = pieces.narrow(dim, 0, len(self.indices(shard, dim)))
        return pieces

    def join(self, pieces: Tensor) -> Tensor:
        """Return wholes (k, *whole) of the pieces of all shards (W, k, *shape)."""
        axes = [cut.parts for cut in self.cuts]
        pieces = pieces.reshape(*axes, *pieces.shape[1:])
        order, k = [len(axes)], pieces.shape[len(axes)]
        for dim, mine in enumerate(self._axes):
            order += [*mine, len(axes) + 1 + dim]
        whole = pieces.permute(order).reshape(k, *(len(p) * n for p, n in zip(self._parts, self.shape, strict=True)))
        for dim, size in enumerate(self._whole):
            places = self._places[dim]
            if places is None:
                whole = whole.narrow(dim + 1, 0, size)
            else:
                whole = whole.index_select(dim + 1, self._tensor(("join", dim), places, whole.device))
        return whole

    def cut(self, wholes: Tensor) -> Tensor:
        """Return the pieces of all shards (W, k, entries) of wholes (k, *whole), padded with 1, a sign."""
        axes, k = [cut.parts for cut in self.cuts], len(wholes)
        order, sizes = [], [k]
        for dim, (parts, longest) in enumerate(zip(self._parts, self.shape, strict=True)):
            missing = len(parts) * longest - self._whole[dim]
            if missing:
                wholes = pad(wholes, [0, 0] * (wholes.ndim - 2 - dim) + [0, missing], value=1.0)
            if self._places[dim] is not None:
                padded = [(*part, *[self._whole[dim]] * (longest - len(part))) for part in parts]
                wholes = wholes.index_select(dim + 1, self._tensor(("cut", dim), sum(padded, ()), wholes.device))
            order += [*self._axes[dim], len(axes) + 1 + dim]
            sizes += [*(axes[axis] for axis in self._axes[dim]), longest]
        back = sorted(range(len(order) + 1), key=lambda place: [len(axes), *order][place])
        return wholes.reshape(sizes).permute(back).reshape(prod(axes), k, prod(self.shape))

    def _part_of(self, shard: int, dim: int) -> int:
        """Return the number of a shard's part among those of a dimension."""
        number, part, weight = shard, 0, 1
        for axis in reversed(range(len(self.cuts))):
            number, place = divmod(number, self.cuts[axis].parts)
            if axis in self._axes[dim]:
                part, weight = part + place * weight, weight * self.cuts[axis].parts
        return part

    def _tensor(self, key: tuple, values: tuple[int, ...], device: torch.device) -> Tensor:
        """Return an index as a tensor, copied to a device once: a copy waits for it."""
        if (key, device) not in self._tensors:
            self._tensors[key, device] = torch.tensor(values, dtype=torch.int64, device=device)
        return self._tensors[key, device]


@cache
def _parts(size: int, cuts: tuple[Cut, ...]) -> list[tuple[int, ...]]:
    """Divide the indices of a dimension as its cuts do, one after another; parts may be empty."""
    parts = [tuple(range(size))]
    for cut in cuts:
        strided = [[_chunks(chunk, cut.parts) for chunk in _chunks(part, cut.strides)] for part in parts]
        parts = [sum((chunk[i] for chunk in chunks), ()) for chunks in strided for i in range(cut.parts)]
    return parts


def _chunks(indices: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
    """Divide as torch.chunk does: the last may be shorter, or empty."""
    longest = -(-len(indices) // count)
    return [indices[i * longest : (i + 1) * longest] for i in range(count)]


def _places(parts: list[tuple[int, ...]], longest: int, size: int) -> tuple[int, ...] | None:
    """Return where each index of the whole lies among padded parts; None where they lie in order."""
    places = {index: number * longest + i for number, part in enumerate(parts) for i, index in enumerate(part)}
    ordered = tuple(places[index] for index in range(size))
    return None if ordered == tuple(range(size)) else ordered
