"""Exact packing of signs, one bit an entry; entries are -1, 1, 0 or NaN, in any floating-point dtype.

Two bits tell the four kinds of entry apart, and a tensor of -1 and 1 alone needs only the first:

                  1   -1    0   NaN
    negatives     0    1    0    1
    others        0    0    1    1

Entry 8 j + i of the flat tensor lies in byte j of a plane; bits past the last entry are 0. -0.0 counts as zero and
comes back as 0.0. The ops are those that torch vectorizes on CPUs, comparisons not being among them, and take about
as long as a clone of the tensor (`python -m scripts.bench_signs`); torch.compile gained nothing over them.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# Eight bools in one word: this product brings bool i to bit 56 + i (2^(8 i) x 2^(56 - 7 i)), and no two of its 64
# terms share a bit, so nothing carries into the top byte. On big-endian machines the bits of a byte come in reverse.
_GATHER = 0x0102040810204080

# Bytes of signs packed at once: temporaries stay in the L2 cache of each core; a GPU is better off with big kernels.
_CPU_CHUNK = 2**20
_GPU_CHUNK = 2**28


def negatives(signs: Tensor) -> Tensor:
    """Return the plane of entries that are negative or NaN: uint8, (ceil(n / 8),), for signs of any shape."""
    return _pack(signs, lambda chunk: chunk.clamp(max=0))  # NaN stays NaN, which is marked


def others(signs: Tensor) -> Tensor:
    """Return the plane of entries that are neither -1 nor 1: uint8, (ceil(n / 8),), for signs of any shape."""
    return _pack(signs, lambda chunk: chunk.abs().sub_(1))


def has_others(stack: Tensor) -> Tensor:
    """Return which slices hold a zero or NaN: bool, (k,), for a stack (k, ...); False for slices without entries."""
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
    return (
        _eight_signs(negatives.device, dtype).index_select(0, negatives.int()).view(-1)[:count]
    )  # (bytes, 8), then (count,)


def restore(signs: Tensor, others: Tensor) -> Tensor:
    """Put the zeros and NaN of the plane `others` back into unpacked signs of any shape, in place; return them."""
    holes = unpack(others, signs.numel(), torch.int8).view(signs.shape) < 0
    not_numbers = (signs < 0) & holes
    return signs.masked_fill_(holes, 0.0).masked_fill_(not_numbers, torch.nan)


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
