"""Llama's shapes against the published ones, rotary frequencies against their formula, and weights in shards."""

from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from Llama import hf
from Llama.model import FLAVORS, Llama
from optimizers import roles_of
from tests.ranks import Ranks


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


def test_qwen_matches_the_published_shape_with_one_table():
    with torch.device("meta"):
        model = Llama(FLAVORS["qwen2.5"]["0.5B"])
    assert sum(param.numel() for param in model.parameters()) == 494_032_768  # of Qwen/Qwen2.5-0.5B
    assert model.layers["0"].feed_forward.w1.weight.shape == (4864, 896)
    assert {name for name, _ in model.named_parameters() if "layers" not in name} == {"shared.weight", "norm.weight"}
    roles = roles_of(Llama(FLAVORS["qwen2.5"]["debug"]))
    assert roles["shared.weight"] == "embedding"
    assert sum(role == "matrix" for role in roles.values()) == 4 * 7
    assert all(role == "vector" for name, role in roles.items() if name.endswith(".bias"))


def test_qwen_starts_with_small_tables_and_no_biases():
    torch.manual_seed(0)
    model = Llama(FLAVORS["qwen2.5"]["debug"])
    model.init_weights()
    assert model.shared.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(param.any() for name, param in model.named_parameters() if name.endswith(".bias"))
    # The loss of the first step is that of equal odds.
    loss = torch.nn.functional.cross_entropy(model(torch.arange(64)[None])[0], torch.arange(1, 65))
    assert loss.item() == pytest.approx(torch.tensor(4096.0).log().item(), abs=0.2)


def test_rotary_frequencies_match_the_formula_without_llama3s_stretching():
    model = Llama(FLAVORS["llama2"]["debug"])
    pairs = torch.arange(0, 32, 2) / 32  # of a head of 128 / 4
    angles = torch.outer(torch.arange(100), 10_000.0**-pairs)
    torch.testing.assert_close(model.freqs_cis[:100], torch.polar(torch.ones_like(angles), angles))


def test_roles_match_the_use_of_each_weight():
    roles = roles_of(Llama(FLAVORS["llama2"]["debug"]))
    assert roles["tok_embeddings.weight"] == "embedding" and roles["output.weight"] == "head"
    assert sum(role == "matrix" for role in roles.values()) == 4 * 7  # q, k, v, o and three of the feed-forward
    assert all(role == "vector" for name, role in roles.items() if "norm" in name)


def test_weights_cut_within_a_head_translate_as_whole_ones():
    with Ranks(4) as ranks:
        assert all(ranks(_cut_within_a_head))


def _cut_within_a_head() -> bool:
    shape = replace(FLAVORS["llama2"]["debug"], dim=64, n_kv_heads=2)
    whole = torch.arange(32 * 64.0).view(32, 64)  # keys of 2 heads of 16, on 4 ranks
    adapter, name = hf.Adapter(shape, None), "layers.0.attention.wk.weight"
    cut = distribute_tensor(whole, init_device_mesh("cpu", (4,)), [Shard(0)])
    (there,) = adapter.to_hf({name: cut}).values()
    (expected,) = hf.Llama3StateDictAdapter(shape, None).to_hf({name: whole}).values()
    return torch.equal(there.full_tensor(), expected)
