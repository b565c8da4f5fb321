"""Llama's shapes against the published ones, and its rotary frequencies against their formula."""

import pytest
import torch

from Llama.model import FLAVORS, Llama
from optimizers import roles_of


# Parameters, feed-forward width: config.json and weights of meta-llama/Llama-2-{7b,13b,70b}-hf.
@pytest.mark.parametrize(
    ("flavor", "count", "width"),
    [("7B", 6_738_415_616, 11_008), ("13B", 13_015_864_320, 13_824), ("70B", 68_976_648_192, 28_672)],
)
def test_flavor_matches_the_published_shape(flavor, count, width):
    with torch.device("meta"):
        model = Llama(FLAVORS["llama2"][flavor])
    assert sum(param.numel() for param in model.parameters()) == count
    assert model.layers["0"].feed_forward.w1.weight.shape[0] == width


def test_rotary_frequencies_match_the_formula_without_llama3s_stretching():
    model = Llama(FLAVORS["llama2"]["debug"])
    pairs = torch.arange(0, 32, 2) / 32  # of a head of 128 / 4
    angles = torch.outer(torch.arange(100), 10_000.0**-pairs)
    torch.testing.assert_close(model.freqs_cis[:100], torch.polar(torch.ones_like(angles), angles))


def test_roles_match_what_each_weight_does():
    roles = roles_of(Llama(FLAVORS["llama2"]["debug"]))
    assert roles["tok_embeddings.weight"] == "embedding" and roles["output.weight"] == "head"
    assert sum(role == "matrix" for role in roles.values()) == 4 * 7  # q, k, v, o and three of the feed-forward
    assert all(role == "vector" for name, role in roles.items() if "norm" in name)
