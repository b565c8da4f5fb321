"""Codecs: rows are read as what was written, in the planned number of bytes; zeros and NaN of signs included."""

import pytest
import torch
from torch import Tensor

from optimizers.codec import CastCodec, Int8Codec, SignCodec, padded_entries

SHAPES = [(1, 1, 7), (3, 2, 100), (4, 3, 1024), (2, 2, 70000), (2, 0, 100)]  # shards, tensors, entries of a shard


def some_signs(shape: tuple[int, ...], zeros: int, nan: bool = False) -> Tensor:
    """Random signs with this many zeros (or NaN, every second) in each shard."""
    signs = torch.randn(shape).sign()
    for shard in signs.flatten(0, 1):
        positions = torch.randperm(shape[2])[:zeros]
        shard[positions] = 0.0
        shard[positions[::2]] = torch.nan if nan else 0.0
    return signs


def through_rows(codec, pieces: Tensor, batch: int = 2) -> tuple[Tensor, Tensor | None]:
    """Write pieces, and read each shard's rows as its rank would; zeros follow where the rows ask for them."""
    norms = torch.rand(pieces.shape[1], batch, dtype=torch.float64)
    rows, zeros = codec.write(pieces, norms)
    assert rows.shape == (*pieces.shape[:2], codec.nbytes(pieces.shape[2], batch)) and rows.shape[2] % 16 == 0
    assert zeros is None or zeros.shape[2] % 16 == 0
    read = []
    for shard, mine in enumerate(rows):
        follow = zeros[shard] if codec.overflow(mine) else None
        signs, found = codec.read(mine.clone(), pieces.shape[2], batch, pieces.dtype, follow)
        assert found is None or torch.equal(found, norms)
        read.append(signs)
    return torch.stack(read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cast_rows_match_a_cast(shape, dtype):
    pieces = torch.randn(shape).to(dtype)
    got = through_rows(CastCodec(torch.bfloat16), pieces)
    assert got.dtype == dtype and torch.equal(got, pieces.to(torch.bfloat16).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_rows_match_to_half_a_127th_of_the_largest_of_256(shape, dtype):
    pieces = (torch.randn(shape) * 10 ** torch.randn(*shape[:2], 1)).to(dtype)
    got = through_rows(Int8Codec(), pieces)
    assert got.dtype == dtype and got.shape == pieces.shape
    for some, read in zip(pieces.double().split(256, dim=2), got.double().split(256, dim=2), strict=True):
        if some.numel():
            largest = some.abs().amax(2, keepdim=True)
            slack = 2 * torch.finfo(dtype).eps + 1e-6  # of the value decoded, and of the scale in float32
            assert bool(((some - read).abs() <= largest * (0.5 / 127 + slack)).all())


def test_int8_rows_match_zeros_and_spread_what_is_not_finite_over_256():
    pieces = torch.zeros(1, 1, 600)
    pieces[0, 0, 300] = torch.inf
    pieces[0, 0, 590] = torch.nan
    got = through_rows(Int8Codec(), pieces)[0, 0]
    assert torch.equal(got[:256], torch.zeros(256)) and bool(got[256:].isnan().all())


@pytest.mark.parametrize("zeros", [0, 1, 4, 7, 50])
@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sign_rows_match_the_signs(shape, nan, zeros):
    signs = some_signs(shape, zeros, nan)
    torch.testing.assert_close(through_rows(SignCodec(), signs), signs, rtol=0, atol=0, equal_nan=True)


def test_few_zeros_match_those_in_the_rows_and_many_are_flagged_by_every_shard():
    codec, norms = SignCodec(), torch.ones(2, 1, dtype=torch.float64)
    for zeros, follow in ((0, False), (8, False), (1000, True)):
        signs = torch.ones(3, 2, 2**18)
        signs[1, 1, : zeros * 100 : 100] = 0.0  # of one shard of one matrix
        rows, _ = codec.write(signs, norms)
        assert [bool(codec.overflow(shard)) for shard in rows] == [follow] * 3


def test_rows_of_shards_match_whole_16_bytes():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for entries in (1, 7, 8, 1000, 1600 * 600):
            padded = padded_entries(entries, dtype)
            assert padded * dtype.itemsize % 16 == 0 and entries <= padded < entries + 16


def test_rows_of_signs_match_a_bit_per_entry():
    for entries in (2**14, 2**20, 2**24):
        assert entries / 8 < SignCodec().nbytes(entries, 1) <= 1.02 * entries / 8
