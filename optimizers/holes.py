"""Where signs are zero or NaN, as bytes: the positions where these are few, a bit an entry where they are many.

Rounding alone makes a zero or two in a matrix of a million entries; a dead unit makes whole rows.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .signs import others, restore
from .wire import as_bytes


def most(shards: Tensor) -> Tensor:
    """Return the most holes that a shard of each matrix has: int32 (k,), for signs (W, k, entries)."""
    return (shards.abs() != 1).sum(2).amax(0).int()


def size(count: int, entries: int) -> int:
    """Return the bytes of a shard of a matrix with up to `count` holes a shard: whole words of four."""
    return 4 * min(count, -(-entries // 32))


def write(shards: Tensor, count: int) -> Tensor:
    """Return the holes of one matrix's shards, signs (W, entries), with up to `count` each: uint8 (W, size)."""
    parts, entries = shards.shape
    if 4 * count > size(count, entries):
        planes = others(pad(shards, [0, -entries % 32], value=1.0))
        return planes.view(parts, -1)
    positions = shards.new_full((parts, count), entries, dtype=torch.int32)  # past the end: no hole
    part, where = (shards.abs() != 1).nonzero(as_tuple=True)  # (holes,) each, shard by shard
    first = torch.searchsorted(part, torch.arange(parts, device=part.device))  # (W,), where a shard's holes begin
    positions[part, torch.arange(len(part), device=part.device) - first[part]] = where.int()
    return as_bytes(positions).view(parts, -1)


def put_back(signs: Tensor, written: Tensor, count: int) -> Tensor:
    """Put a shard's zeros and NaN, as `write` wrote them, into its unpacked signs, in place; return them."""
    flat = signs.view(-1)
    if count == 0:
        return signs
    if 4 * count > len(written):
        restore(flat, written)
        return signs
    positions = written.view(torch.int32)
    positions = positions[positions < len(flat)].long()
    flat[positions] = torch.where(flat[positions] < 0, torch.nan, 0.0).to(flat.dtype)  # a negative hole is a NaN
    return signs
