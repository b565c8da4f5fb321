"""Holes in signs, zeros and NaN, survive being written as positions or as a bit an entry."""

import pytest
import torch

from optimizers import holes


def signs_with_holes(shape: tuple[int, ...], share: float, nan: bool) -> torch.Tensor:
    signs = torch.randn(shape).sign()
    signs[torch.rand(shape) < share] = 0
    if nan:
        signs[torch.rand(shape) < share / 2] = torch.nan
    return signs


@pytest.mark.parametrize("share", [0.0, 0.005, 0.04, 0.5, 1.0])
@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 2, 100), (4, 3, 1024)])
def test_holes_written_and_put_back_match_the_signs(shape, nan, share):
    shards = signs_with_holes(shape, share, nan)  # (W, k, entries)
    full = torch.where((shards < 0) | shards.isnan(), -1.0, 1.0)  # as they are unpacked
    for k, count in enumerate(holes.most(shards).tolist()):
        assert count == max(int((shard[k].abs() != 1).sum()) for shard in shards)
        written = holes.write(shards[:, k], count)  # (W, bytes)
        assert written.shape == (shape[0], holes.size(count, shape[2]))
        for part, shard in zip(written, range(shape[0]), strict=True):
            restored = holes.put_back(full[shard, k].clone(), part.clone(), count)
            torch.testing.assert_close(restored, shards[shard, k], rtol=0, atol=0, equal_nan=True)


def test_size_of_few_holes_matches_a_word_each_and_of_many_a_bit_an_entry():
    assert [holes.size(count, 1024) for count in (0, 1, 31, 32, 1024)] == [0, 4, 124, 128, 128]
