"""Packed signs: every kind of entry, dtype, length and memory layout, against a packer in plain Python."""

import math
import sys

import pytest
import torch
from torch import Tensor

from optimizers import codec as module
from optimizers.codec import negatives, restore, unpack, zero_or_nan
from scripts import bench_signs

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = torch.tensor([-1.0, 1.0, 0.0, -0.0, math.nan])
LENGTHS = [*range(34), 1000, 2**18 + 5]


def random_signs(length: int, dtype: torch.dtype, kinds: Tensor = KINDS) -> Tensor:
    return kinds[torch.randint(len(kinds), (length,))].to(dtype)


def plane_of(marks: list[bool]) -> list[int]:
    """The reference packer: mark 8 j + i is bit i of byte j."""
    return [sum(mark << i for i, mark in enumerate(marks[j : j + 8])) for j in range(0, len(marks), 8)]


def through_the_wire(signs: Tensor) -> Tensor:
    return restore(unpack(negatives(signs), signs.numel(), signs.dtype).view(signs.shape), zero_or_nan(signs))


def assert_same_signs(got: Tensor, signs: Tensor) -> None:
    assert got.dtype == signs.dtype and got.shape == signs.shape
    torch.testing.assert_close(got, signs, rtol=0, atol=0, equal_nan=True)
    assert not torch.signbit(got[got == 0]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planes_match_a_packer_in_plain_python(dtype):
    for length in LENGTHS:
        signs = random_signs(length, dtype)
        entries = signs.tolist()
        assert negatives(signs).tolist() == plane_of([entry < 0 or math.isnan(entry) for entry in entries])
        assert zero_or_nan(signs).tolist() == plane_of([entry not in (-1, 1) for entry in entries])


@pytest.mark.parametrize("chunk_bytes", [64, 192])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planes_packed_in_chunks_match_those_packed_at_once(dtype, chunk_bytes, monkeypatch):
    cases = [random_signs(length, dtype) for length in range(200)]
    whole = [(negatives(signs), zero_or_nan(signs)) for signs in cases]
    monkeypatch.setattr(module, "_CPU_CHUNK", chunk_bytes)
    for signs, (negative, zeros) in zip(cases, whole, strict=True):
        assert torch.equal(negatives(signs), negative) and torch.equal(zero_or_nan(signs), zeros)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_round_trip_matches_the_signs(dtype):
    for length in LENGTHS:
        signs = random_signs(length, dtype)
        assert_same_signs(through_the_wire(signs), signs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_of_one_plane_matches_signs_without_zeros(dtype):
    for length in LENGTHS:
        signs = random_signs(length, dtype, KINDS[:2])
        assert_same_signs(unpack(negatives(signs), length, dtype), signs)
        assert not zero_or_nan(signs).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS.tolist(), ids=str)
def test_rows_of_one_kind_match_the_signs(dtype, kind):
    signs = random_signs(7 * 13, dtype).view(7, 13)
    signs[2] = signs[6] = kind
    assert_same_signs(through_the_wire(signs), signs)
    assert_same_signs(through_the_wire(torch.full_like(signs, kind)), torch.full_like(signs, kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_of_either_sign_matches_nan(dtype):
    signs = torch.tensor([1.0, math.nan, -1.0, math.nan, 0.0]).to(dtype)
    signs[3] = -signs[3]
    assert negatives(signs).item() == 0b01110 and zero_or_nan(signs).item() == 0b11010
    assert_same_signs(through_the_wire(signs), signs)


@pytest.mark.parametrize(
    "layout",
    [
        lambda signs: signs.view(6, 5, 4).transpose(0, 2),
        lambda signs: signs[::3],
        lambda signs: signs[1:],
        lambda signs: signs.view(12, 10)[:, 3:8],
        lambda signs: signs[:3, None].expand(3, 7),
        lambda signs: signs[5],
    ],
    ids=["transposed", "strided", "odd offset", "columns", "expanded", "no dimensions"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planes_of_a_view_match_those_of_its_copy(layout, dtype):
    signs = layout(random_signs(120, dtype))
    copy = signs.clone(memory_format=torch.contiguous_format)
    assert torch.equal(negatives(signs), negatives(copy)) and torch.equal(zero_or_nan(signs), zero_or_nan(copy))
    assert_same_signs(through_the_wire(signs), copy)
    torch.testing.assert_close(signs, copy, rtol=0, atol=0, equal_nan=True)  # packing wrote nothing


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_unpack_of_joined_messages_matches_each(offset, dtype):
    messages = [random_signs(length, dtype, KINDS[:2]) for length in (5, 0, 16, 1, 33)]
    planes = [negatives(message) for message in messages]
    buffer = torch.cat([torch.full((offset,), 0xFF, dtype=torch.uint8), *planes])[offset:]
    unpacked, start = unpack(buffer, 8 * len(buffer), dtype), 0
    for message, plane in zip(messages, planes, strict=True):
        assert torch.equal(unpacked[8 * start : 8 * start + len(message)], message)
        start += len(plane)


def test_restore_matches_the_signs_inside_a_larger_tensor():
    signs, outside = random_signs(15, torch.float32).view(3, 5), torch.ones(5, 5)
    outside[1:4] = unpack(negatives(signs), 15, torch.float32).view(3, 5)
    assert restore(outside[1:4], zero_or_nan(signs)).data_ptr() == outside[1].data_ptr()
    assert_same_signs(outside[1:4], signs)
    assert (outside[0] == 1).all() and (outside[4] == 1).all()


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (3, 0, 5)], ids=str)
def test_empty_tensors_match_empty_planes(shape):
    signs = torch.empty(shape)
    assert negatives(signs).shape == zero_or_nan(signs).shape == (0,)
    assert_same_signs(through_the_wire(signs), signs)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 4096, 4097])
def test_plane_size_matches_one_bit_per_entry(length):
    for plane in (negatives(torch.ones(length)), zero_or_nan(torch.ones(length))):
        assert plane.dtype == torch.uint8 and plane.shape == (math.ceil(length / 8),)


def test_unpack_refuses_a_plane_that_is_too_short():
    with pytest.raises(ValueError, match="17 signs takes 3 bytes; got 2"):
        unpack(torch.zeros(2, dtype=torch.uint8), 17, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planes_on_a_gpu_match_those_on_the_cpu(dtype):
    for length in LENGTHS:
        signs = random_signs(length, dtype)
        there = signs.cuda()
        assert torch.equal(negatives(there).cpu(), negatives(signs)) and torch.equal(
            zero_or_nan(there).cpu(), zero_or_nan(signs)
        )
        assert_same_signs(through_the_wire(there).cpu(), signs)


def test_benchmark_matches_one_row_for_each_size_and_dtype(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "bench_signs --entries 100 803 --repeats 1 --device cpu".split())
    bench_signs.main()
    rows = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [[cell.strip() for cell in row] for row in rows] == [
        [entries, dtype] for entries in ("100", "803") for dtype in ("float32", "bfloat16")
    ]
