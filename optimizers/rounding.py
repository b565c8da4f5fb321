"""Rounding of bfloat16 weights, and random numbers to round by.

To the nearest, a bfloat16 weight does not move by less than 2^-9 of its size, and decay by 3e-4 per step never happens.
Stochastic rounding moves it with a probability, which is right on average: Gupta et al., arXiv 1502.02551. Compensated
rounding keeps the other 16 bits of a float32 weight beside it, which then steps as in float32.

Random numbers are of an entry's place in the whole tensor, the tensor's name and the step alone. So every layout and
every replica rounds alike, and a resumed run as an uninterrupted one: no generator's state is kept.
"""

from functools import cache
from typing import Literal
from zlib import crc32

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .checks import BadValue
from .pieces import Cut, Pieces

Rounding = Literal["nearest", "stochastic", "compensated"]
REMAINDER = "weight_remainder"  # the buffer of a compensated weight
LEAST_CHANGE = 2.0**-9  # half the distance of neighbours in bfloat16, relative to the largest of an octave

_LOW = 0xFFFF  # the bits of float32 that bfloat16 does not have


def is_rounded(param: Tensor, group: dict) -> bool:
    """Return whether a weight steps in float32 and is then rounded, other than to the nearest."""
    return param.dtype == torch.bfloat16 and group.get("weight_rounding", "nearest") != "nearest"


def is_compensated(param: Tensor, group: dict) -> bool:
    """Return whether a weight has a remainder."""
    return is_rounded(param, group) and group["weight_rounding"] == "compensated"


def joined(weight: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 numbers of bfloat16 weights and int16 remainders."""
    return ((weight.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


def parted(wide: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Write float32 numbers as bfloat16, to the nearest, and the int16 difference of their bits."""
    bits = wide.masked_fill(wide.isnan(), torch.nan).view(torch.int32)  # other NaN may carry over into the sign
    high = (bits + 0x8000) >> 16  # halves are rounded away from zero, so that int16 holds the difference
    remainder.copy_(bits - (high << 16))
    weight.view(torch.int16).copy_(high)


def stochastic(wide: Tensor, weight: Tensor, bits: Tensor) -> None:
    """Write float32 numbers as bfloat16: up, in magnitude, with the probability of the bits that are cut off."""
    up = (wide.view(torch.int32) + (bits & _LOW)) & ~_LOW
    weight.copy_(torch.where(wide.isfinite(), up.view(torch.float32), wide))


def random_bits(param: Tensor, key: str) -> Tensor:
    """Return 32 random bits, int32, for each entry of this process's shard of a parameter.

    key: names the tensor, the step and the purpose. Raises ValueError in a CUDA graph, which would repeat them.
    """
    device = param.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise BadValue("stochastic rounding needs new numbers at every step, got a CUDA graph; round to the nearest")
    bits = torch.tensor(_signed(crc32(key.encode())), dtype=torch.int32, device=device)
    for indices in _indices(param.shape, *_cuts(param), device):
        bits = _mixed(bits.unsqueeze(-1) + indices)
    return bits


def uniform(param: Tensor, key: str) -> Tensor:
    """Return a number in [0, 1), float32, for each entry of this process's shard of a parameter."""
    return (random_bits(param, key) & 0xFFFFFF).float().mul_(2.0**-24)  # what float32 holds without rounding


def _cuts(param: Tensor) -> tuple[tuple[Cut, ...], int]:
    """Return the cuts of a parameter and the number of this process's shard, row by row over them."""
    if not isinstance(param, DTensor):
        return (), 0
    mesh, coordinate = param.device_mesh, param.device_mesh.get_coordinate()
    assert coordinate is not None
    cuts, shard = [], 0
    for axis, placement in enumerate(param.placements):
        if hasattr(placement, "dim"):
            cuts.append(Cut.of(placement, mesh.size(axis)))
            shard = shard * mesh.size(axis) + coordinate[axis]
    return tuple(cuts), shard


@cache  # a copy to a device waits for it
def _indices(shape: torch.Size, cuts: tuple[Cut, ...], shard: int, device: torch.device) -> list[Tensor]:
    """Return the whole tensor's indices that a shard has along each dimension, each times an odd constant."""
    pieces = Pieces(shape, cuts)
    lists = [pieces.indices(shard, dim) for dim in range(len(shape))]
    return [torch.tensor(each, dtype=torch.int32, device=device) * _signed(0x9E3779B9) for each in lists]


def _mixed(bits: Tensor) -> Tensor:
    """Hash 32-bit integers in place; Wellons' "lowbias32", whose every output bit depends on every input bit."""
    bits ^= (bits >> 16) & 0xFFFF
    bits *= 0x7FEB352D
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= _signed(0x846CA68B)
    bits ^= (bits >> 16) & 0xFFFF
    return bits


def _signed(word: int) -> int:
    """Return a word of 32 bits as int32 holds it."""
    return word - 2**32 if word >= 2**31 else word
