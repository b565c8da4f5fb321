"""Codecs: how directions are written as bytes, read back, and how many bytes they take.

    SignCodec     entries -1, 1, 0 and NaN: one bit per entry, and zeros and NaN, of which there are few, apart
    CastCodec     any entries, rounded to a dtype

Two bits tell the four kinds of sign apart, and a tensor of -1 and 1 alone needs only the first:

                     1   -1    0   NaN
    negatives        0    1    0    1
    zero_or_nan      0    0    1    1

Entry 8 j + i of the flat tensor is bit i of byte j of a plane; bits past the last entry are 0. -0.0 counts as zero and
comes back as 0.0. The ops are those that torch vectorizes on CPUs, comparisons not being among them, and take about
as long as a clone of the tensor (`python -m scripts.bench_signs`); torch.compile gained nothing over them.

Rounding alone makes a zero or two in a matrix of a million entries; a dead unit makes whole rows. So zeros and NaN are
written as positions where they are few, and as a plane where they are many.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

# Eight bools in one word: this product brings bool i to bit 56 + i (2^(8 i) x 2^(56 - 7 i)), and no two of its 64
# terms share a bit, so nothing carries into the top byte. On big-endian machines the bits of a byte come in reverse.
_GATHER = 0x0102040810204080

# Bytes of signs packed at once: temporaries stay in the L2 cache of each core; a GPU is better off with big kernels.
_CPU_CHUNK = 2**20
_GPU_CHUNK = 2**28


class Codec(Protocol):
    """Writes directions as bytes; a message holds the pieces (shards of equal size) of several matrices."""

    def nbytes(self, pieces: int, entries: int) -> int:
        """Return the bytes of a message of `pieces` pieces of `entries` entries each."""
        ...

    def write(self, shards: Tensor) -> Tensor:
        """Return one message per shard, uint8 (W, nbytes), for the shards (W, pieces, entries) of whole matrices."""
        ...

    def read(
        self, received: Tensor, counts: Sequence[int], entries: int, dtype: torch.dtype
    ) -> tuple[list[Tensor], list[int]]:
        """Return (pieces, flags) of joined messages, uint8 (n,), of counts[q] pieces from each sender q.

        pieces: (entries,) each, in `dtype`. flags: one per piece, not 0 where its matrix has zeros or NaN that were
        not written; empty where all is written.
        """
        ...


@dataclass(frozen=True)
class CastCodec:
    """Entries in a dtype."""

    dtype: torch.dtype

    def nbytes(self, pieces: int, entries: int) -> int:
        return pieces * entries * self.dtype.itemsize

    def write(self, shards: Tensor) -> Tensor:
        return as_bytes(shards.to(self.dtype)).view(len(shards), self.nbytes(*shards.shape[1:]))

    def read(self, received, counts, entries, dtype):
        return list(received.view(self.dtype).to(dtype).view(sum(counts), entries)), []

    def __str__(self) -> str:
        return str(self.dtype)


@dataclass(frozen=True)
class SignCodec:
    """Signs, one bit per entry, then one flag byte per piece: whether its matrix has a zero or NaN."""

    def nbytes(self, pieces: int, entries: int) -> int:
        return -(-pieces * entries // 8) + pieces

    def write(self, shards: Tensor) -> Tensor:
        parts, pieces, entries = shards.shape
        flat = shards.reshape(parts, pieces * entries)
        planes = negatives(pad(flat, [0, -flat.shape[1] % 8])).view(parts, -(-flat.shape[1] // 8))
        flags = has_zero_or_nan(shards.flatten(0, 1)).view(parts, pieces).any(0).to(torch.uint8)
        return torch.cat([planes, flags.expand(parts, -1)], dim=1)

    def read(self, received, counts, entries, dtype):
        unpacked = unpack(received, 8 * len(received), dtype)  # eight per byte; those of flags mean nothing
        pieces, flags, start = [], [], 0
        for count in counts:
            end = start + self.nbytes(count, entries)
            pieces += unpacked[8 * start :][: count * entries].view(count, entries)
            flags.append(received[end - count : end])
            start = end
        return pieces, torch.cat(flags).tolist()

    def __str__(self) -> str:
        return "signs"


def negatives(signs: Tensor) -> Tensor:
    """Return the plane of entries that are negative or NaN: uint8 (ceil(n / 8),), for signs of any shape."""
    return _pack(signs, lambda chunk: chunk.clamp(max=0))  # NaN stays NaN, which is marked


def zero_or_nan(signs: Tensor) -> Tensor:
    """Return the plane of entries that are neither -1 nor 1: uint8 (ceil(n / 8),), for signs of any shape."""
    return _pack(signs, lambda chunk: chunk.abs().sub_(1))


def has_zero_or_nan(stack: Tensor) -> Tensor:
    """Return bool (k,): whether each slice of a stack (k, ...) holds a zero or NaN; False for empty slices."""
    return stack.flatten(1).prod(1).abs() != 1  # one read; a zero makes it 0, a NaN makes it NaN, none makes it 1


def unpack(negatives: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return the first `count` signs of a plane, -1 where its bit is set and 1 elsewhere: (count,), contiguous.

    Planes may follow one another in the buffer: the first sign of byte j is entry 8 j of the result.
    Raises ValueError for a plane of fewer than `count` bits.

    Example:
        >>> unpack(negatives(torch.tensor([1.0, -1.0, 1.0])), 3, torch.float32)
        tensor([ 1., -1.,  1.])
    """
    if count > 8 * len(negatives):
        raise ValueError(f"a plane of {count} signs takes {-(-count // 8)} bytes; got {len(negatives)}; pass all of it")
    table = _eight_signs(negatives.device, dtype)
    return table.index_select(0, negatives.int()).view(-1)[:count]  # (bytes, 8), then (count,)


def restore(signs: Tensor, zero_or_nan: Tensor) -> Tensor:
    """Put the zeros and NaN of the plane `zero_or_nan` back into unpacked signs of any shape, in place."""
    zeros = unpack(zero_or_nan, signs.numel(), torch.int8).view(signs.shape) < 0
    nan = (signs < 0) & zeros
    return signs.masked_fill_(zeros, 0.0).masked_fill_(nan, torch.nan)


def most_zeros(shards: Tensor) -> Tensor:
    """Return the most zeros and NaN in one shard of each matrix: int32 (k,), for signs (W, k, entries)."""
    return (shards.abs() != 1).sum(2).amax(0).int()


def zeros_nbytes(count: int, entries: int) -> int:
    """Return the bytes of `write_zeros` per shard with up to `count` zeros: whole words of four."""
    return 4 * min(count, -(-entries // 32))


def write_zeros(shards: Tensor, count: int) -> Tensor:
    """Return the zeros and NaN of one matrix's shards, signs (W, entries), up to `count` each: uint8 (W, nbytes)."""
    parts, entries = shards.shape
    if 4 * count > zeros_nbytes(count, entries):
        return zero_or_nan(pad(shards, [0, -entries % 32], value=1.0)).view(parts, -1)
    positions = shards.new_full((parts, count), entries, dtype=torch.int32)  # past the end: no zero
    part, position = (shards.abs() != 1).nonzero(as_tuple=True)  # (zeros,) each, shard by shard
    first = torch.searchsorted(part, torch.arange(parts, device=part.device))  # (W,), index of a shard's first zero
    positions[part, torch.arange(len(part), device=part.device) - first[part]] = position.int()
    return as_bytes(positions).view(parts, -1)


def read_zeros(signs: Tensor, written: Tensor, count: int) -> Tensor:
    """Put a shard's zeros and NaN, as `write_zeros` wrote them, into its unpacked signs (entries,), in place."""
    if 4 * count > len(written):
        return restore(signs, written)
    positions = written.view(torch.int32)
    positions = positions[positions < len(signs)].long()
    signs[positions] = torch.where(signs[positions] < 0, torch.nan, 0.0).to(signs.dtype)  # negative there means NaN
    return signs


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the tensor's memory, flat, as uint8."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _pack(signs: Tensor, mark: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the plane of the entries at which `mark`, applied to flat chunks, is not zero."""
    flat = signs.flatten()
    plane = torch.empty(-(-len(flat) // 8), dtype=torch.uint8, device=signs.device)
    chunk_bytes = _GPU_CHUNK if signs.is_cuda else _CPU_CHUNK * torch.get_num_threads()
    length = chunk_bytes // signs.element_size()
    for chunk, packed in zip(flat.split(length), plane.split(length // 8), strict=True):
        marks = torch.empty(8 * len(packed), dtype=torch.bool, device=signs.device)
        marks[: len(chunk)] = mark(chunk)
        marks[len(chunk) :] = False
        words = marks.view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56)
        packed.copy_(words)  # modulo 256, which drops the sign that the shift extends
    return plane


@cache
def _eight_signs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the eight signs of every byte, (256, 8); made by packing, it inverts it in either byte order."""
    bits = torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu") & 1
    signs = (1 - 2 * bits).to(torch.int8)
    table = torch.empty_like(signs)
    table[negatives(signs).long()] = signs
    return table.to(device, dtype)
