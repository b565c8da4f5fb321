"""Codecs: pieces of directions or gradients written as bytes and read back, and the number of these bytes.

    SignCodec     entries -1, 1, 0 and NaN: one bit per entry; zeros and NaN, which are few, apart
    CastCodec     any entries, rounded to a dtype
    Int8Codec     any entries, at one byte each and a scale for every 256

Two bits distinguish the four kinds of sign; a tensor of -1 and 1 alone needs only the first:

                     1   -1    0   NaN
    negatives        0    1    0    1
    zero_or_nan      0    0    1    1

Entry 8 j + i of the flat tensor is bit i of byte j of a plane; bits past the last entry are 0. -0.0 counts as zero and
is read back as 0.0. All ops are vectorized by torch on CPUs, which comparisons are not, and take about
as long as a clone of the tensor (`python -m scripts.bench_signs`); torch.compile gained nothing over them.

Rounding causes a zero or two in a matrix of a million entries, a dead unit causes whole rows. So zeros and NaN are
written as positions if they are few, and as a plane if they are many.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from .quantized import decoded, encode, peaks_of

# Eight bools in one word: this product brings bool i to bit 56 + i (2^(8 i) x 2^(56 - 7 i)), and no two of its 64
# terms share a bit, so nothing carries into the top byte. On big-endian machines the bits of a byte come in reverse.
_GATHER = 0x0102040810204080

# Bytes of signs packed at once: on CPUs temporaries stay in each core's L2 cache; GPUs are faster with large kernels.
_CPU_CHUNK = 2**20
_GPU_CHUNK = 2**28

_BLOCK = 256  # entries that share a scale in int8


class Codec:
    """Writes pieces, shards of equal size, as rows of bytes, multiples of 16.

    A row holds the encoded entries, then the floats sent with them: one float64 per matrix, if the rule needs it.
    """

    def nbytes(self, entries: int, floats: int) -> int:
        """Return the bytes of the row of a piece of `entries` entries and `floats` floats."""
        return -(-(self._size(entries) + 8 * floats) // 16) * 16

    def write(self, pieces: Tensor, floats: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (rows, zeros) of pieces (W, k, entries), the shards of k tensors with `floats` (k, matrices).

        rows: uint8 (W, k, nbytes). zeros: uint8 (W, k, bytes), rows to send if `overflow` is true; None: never.
        """
        parts, count, entries = pieces.shape
        size, width = self._size(entries), floats.shape[1]
        rows = pieces.new_empty(parts, count, self.nbytes(entries, width), dtype=torch.uint8)
        rows[..., size : size + 8 * width].view(torch.float64).copy_(floats)
        return rows, self._encode(pieces, rows[..., :size])

    def read(
        self, rows: Tensor, entries: int, floats: int, dtype: torch.dtype, zeros: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (pieces, floats), (n, entries) in `dtype` and float64 (n, floats), of rows (n, nbytes)."""
        size = self._size(entries)
        found = rows[:, size : size + 8 * floats].contiguous().view(torch.float64)
        return self._decode(rows[:, :size], entries, dtype, zeros), found

    def overflow(self, rows: Tensor) -> Tensor:
        """Return whether zeros must follow, as a row lacks room: bool, 0-dimensional, equal on all ranks."""
        return rows.new_zeros((), dtype=torch.bool)

    def _size(self, entries: int) -> int:
        """Return the bytes of encoded entries, a multiple of 8."""
        raise NotImplementedError

    def _encode(self, pieces: Tensor, payload: Tensor) -> Tensor | None:
        """Write pieces (W, k, entries) into bytes (W, k, size); returns `zeros`."""
        raise NotImplementedError

    def _decode(self, payload: Tensor, entries: int, dtype: torch.dtype, zeros: Tensor | None) -> Tensor:
        """Return pieces (n, entries) of bytes (n, size)."""
        raise NotImplementedError


@dataclass(frozen=True)
class CastCodec(Codec):
    """Entries in a dtype."""

    dtype: torch.dtype

    def _size(self, entries):
        return -(-entries * self.dtype.itemsize // 8) * 8

    def _encode(self, pieces, payload):
        payload.view(self.dtype)[..., : pieces.shape[2]] = pieces

    def _decode(self, payload, entries, dtype, zeros):
        return payload.view(self.dtype)[:, :entries].to(dtype)

    def __str__(self) -> str:
        return str(self.dtype)


@dataclass(frozen=True)
class Int8Codec(Codec):
    """Entries as int8 codes, after the float32 scales of each 256 of them in order: the largest magnitude / 127.

    The error of an entry is at most half a scale, 0.4 % of the largest of its 256. One NaN or infinity makes NaN of all
    of them.
    """

    def _size(self, entries):
        return -(-(4 * _blocks(entries) + entries) // 8) * 8

    def _encode(self, pieces, payload):
        parts, count, entries = pieces.shape
        blocks = pad(pieces, [0, -entries % _BLOCK]).view(parts, count, _blocks(entries), _BLOCK)
        codes = torch.empty_like(blocks, dtype=torch.int8)
        scales = blocks.new_empty(blocks.shape[:3], dtype=torch.float32)
        encode(codes, scales[..., None], blocks, peaks_of(blocks, 3))
        after = 4 * scales.shape[2]
        payload[..., :after].view(torch.float32).copy_(scales)
        payload[..., after : after + entries].view(torch.int8).copy_(codes.flatten(2)[..., :entries])

    def _decode(self, payload, entries, dtype, zeros):
        after = 4 * _blocks(entries)
        scales = payload[:, :after].contiguous().view(torch.float32)
        codes = pad(payload[:, after : after + entries].view(torch.int8), [0, -entries % _BLOCK])
        blocks = codes.view(len(codes), _blocks(entries), _BLOCK)
        return decoded(blocks, scales[..., None], dtype).flatten(1)[:, :entries]

    def __str__(self) -> str:
        return "int8"


@dataclass(frozen=True)
class SignCodec(Codec):
    """Signs, as 64-bit words:

    overflow     one word: whether the table of any shard is too small
    negatives    one bit per entry
    table        up to 8 words of the plane of zeros and NaN that are not 0, then their positions
    """

    def _size(self, entries):
        return 8 * (1 + _words(entries) + 2 * _table(entries))

    def _encode(self, pieces, payload):
        parts, count, entries = pieces.shape
        words, table = _words(entries), _table(entries)
        signs = pad(pieces, [0, 64 * words - entries], value=1.0) if entries < 64 * words else pieces
        planes = negatives(signs).view(torch.int64).view(parts, count, words)
        zeros = zero_or_nan(signs).view(torch.int64).view(parts, count, words)
        filled = zeros != 0
        positions = filled.to(torch.uint8).topk(table, dim=2).indices  # a fixed number, so no sync
        overflow = (filled.sum(2) > table).any(0)[:, None].expand(parts, -1, -1)  # (W, k, 1)
        payload.view(torch.int64).copy_(torch.cat([overflow, planes, zeros.gather(2, positions), positions], dim=2))
        return zeros.view(torch.uint8)

    def _decode(self, payload, entries, dtype, zeros):
        words, table, count = _words(entries), _table(entries), len(payload)
        _, planes, filled, positions = payload.view(torch.int64).split([1, words, table, table], dim=1)
        signs = unpack(planes.contiguous().view(torch.uint8).view(-1), 64 * words * count, dtype)
        signs = signs.view(count, words, 64)
        if zeros is None:
            where = torch.arange(count, device=payload.device)[:, None], positions
            signs[where] = restore(signs[where], filled.contiguous().view(torch.uint8).view(-1))  # (n, table, 64)
        else:
            restore(signs, zeros.reshape(-1))
        return signs.view(count, 64 * words)[:, :entries]

    def overflow(self, rows: Tensor) -> Tensor:
        return (rows.view(torch.int64)[:, 0] != 0).any()

    def __str__(self) -> str:
        return "signs"


def codec_of(signs: bool, dtype: torch.dtype | None) -> Codec:
    """Return the codec of directions: one bit per entry for signs, bfloat16 for others, or the given dtype."""
    return SignCodec() if signs and dtype is None else CastCodec(dtype or torch.bfloat16)


def _blocks(entries: int) -> int:
    return -(-entries // _BLOCK)


def _words(entries: int) -> int:
    return 2 * max(1, -(-entries // 128))


def _table(entries: int) -> int:
    return min(8, max(1, _words(entries) // 256))


def padded_entries(entries: int, dtype: torch.dtype) -> int:
    """Return the entries of a row of whole 16 bytes."""
    return -(-entries * dtype.itemsize // 16) * 16 // dtype.itemsize


def negatives(signs: Tensor) -> Tensor:
    """Return the plane of entries that are negative or NaN: uint8 (ceil(n / 8),), for signs of any shape."""
    return _pack(signs, lambda chunk: chunk.clamp(max=0))  # NaN stays NaN, which sets the bit


def zero_or_nan(signs: Tensor) -> Tensor:
    """Return the plane of entries that are neither -1 nor 1: uint8 (ceil(n / 8),), for signs of any shape."""
    return _pack(signs, lambda chunk: chunk.abs().sub_(1))


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
    marked = unpack(zero_or_nan, signs.numel(), torch.int8).view(signs.shape) < 0
    return signs.copy_(torch.where(marked, torch.where(signs < 0, torch.nan, 0.0).to(signs.dtype), signs))


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
