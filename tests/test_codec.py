"""Codecs: messages are read as what was written, in the planned number of bytes; zeros and NaN of signs included."""

import pytest
import torch
from torch import Tensor

from optimizers.codec import CastCodec, SignCodec, most_zeros, read_zeros, write_zeros, zeros_nbytes


def signs_with_zeros(shape: tuple[int, ...], share: float, nan: bool) -> Tensor:
    signs = torch.randn(shape).sign()
    signs[torch.rand(shape) < share] = 0
    if nan:
        signs[torch.rand(shape) < share / 2] = torch.nan
    return signs


@pytest.mark.parametrize("codec", [SignCodec(), CastCodec(torch.bfloat16), CastCodec(torch.float32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_messages_of_several_senders_match_what_was_written(codec, dtype):
    entries, counts = 21, [2, 0, 3, 1]
    senders = [torch.randn(4, count, entries).sign().to(dtype) for count in counts]  # (W, pieces, entries)
    senders[2][1, 2, 5] = 0.0
    messages = [codec.write(shards) for shards in senders]
    for message, count in zip(messages, counts, strict=True):
        assert message.dtype == torch.uint8 and message.shape == (4, codec.nbytes(count, entries))
    for shard in range(4):
        joined = torch.cat([message[shard] for message in messages])
        pieces, flags = codec.read(joined, counts, entries, dtype)
        wanted = torch.cat([shards[shard] for shards in senders])  # (6, entries)
        got = torch.stack([piece.view(-1) for piece in pieces])
        differ = got != wanted
        assert got.dtype == dtype and not differ[torch.arange(6) != 4].any()
        assert flags in ([], [0, 0, 0, 0, 1, 0])  # a zero in any shard: its place must follow
        assert flags or not differ.any()


@pytest.mark.parametrize("share", [0.0, 0.005, 0.04, 0.5, 1.0])
@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 2, 100), (4, 3, 1024)])
def test_zeros_written_and_read_match_the_signs(shape, nan, share):
    shards = signs_with_zeros(shape, share, nan)  # (W, k, entries)
    full = torch.where((shards < 0) | shards.isnan(), -1.0, 1.0)  # as they are unpacked
    for k, count in enumerate(most_zeros(shards).tolist()):
        assert count == max(int((shard[k].abs() != 1).sum()) for shard in shards)
        written = write_zeros(shards[:, k], count)  # (W, bytes)
        assert written.shape == (shape[0], zeros_nbytes(count, shape[2]))
        for part, shard in zip(written, range(shape[0]), strict=True):
            restored = read_zeros(full[shard, k].clone(), part.clone(), count)
            torch.testing.assert_close(restored, shards[shard, k], rtol=0, atol=0, equal_nan=True)


def test_size_of_few_zeros_matches_a_word_each_and_of_many_a_bit_an_entry():
    assert [zeros_nbytes(count, 1024) for count in (0, 1, 31, 32, 1024)] == [0, 4, 124, 128, 128]
