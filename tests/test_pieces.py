"""Tensors as pieces of equal shape, and whole again."""

from math import prod

import pytest
import torch

from optimizers.pieces import Cut, Pieces

# Even, uneven and empty shards, of one dimension and of several, and interleaved ones.
CASES = [
    ((5, 7), ()),
    ((8, 7), (Cut(0, 4),)),
    ((5, 7), (Cut(1, 4),)),
    ((18, 10), (Cut(0, 2), Cut(1, 2))),
    ((33, 8), (Cut(0, 2, 2), Cut(0, 2))),
    ((3, 12), (Cut(0, 2, 2), Cut(0, 2))),
    ((1, 9), (Cut(0, 4, 4), Cut(0, 4))),
    ((9, 5), (Cut(1, 2, 2), Cut(0, 3), Cut(1, 2))),
    ((6, 3, 2, 2), (Cut(1, 2), Cut(0, 2))),
]


@pytest.mark.parametrize(("whole", "cuts"), CASES)
def test_pieces_match_the_wholes_at_their_indices_and_join_to_them(whole, cuts):
    pieces, wholes = Pieces(whole, cuts), torch.randn(3, *whole)
    shards = prod(cut.parts for cut in cuts)
    found = pieces.cut(wholes)
    assert found.shape == (shards, 3, prod(pieces.shape))
    assert torch.equal(pieces.join(found.view(shards, 3, *pieces.shape)), wholes)
    entries = 0
    for shard in range(shards):
        mine = pieces.unpadded(shard, found[shard].view(3, *pieces.shape))
        want = wholes
        for dim in range(len(whole)):
            want = want.index_select(dim + 1, torch.tensor(pieces.indices(shard, dim), dtype=torch.int64))
        assert torch.equal(mine, want)
        entries += mine.numel()
    assert entries == wholes.numel()
    padding = found.numel() - entries
    assert (found == 1).sum() >= padding  # of signs, one of them


def test_interleaved_shards_match_fsdp_over_tensor_parallelism_worked_out_by_hand():
    """Tensor parallelism cuts 8 rows into halves, FSDP each half; ranks are numbered (FSDP, tensor)."""
    pieces = Pieces((8, 2), (Cut(0, 2, 2), Cut(0, 2)))
    assert [pieces.indices(shard, 0) for shard in range(4)] == [(0, 1), (4, 5), (2, 3), (6, 7)]
