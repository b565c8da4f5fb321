"""Llama's weights against transformers' LlamaForCausalLM, there and back, and checkpoints against their model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from common import UserError
from Llama import weights
from Llama.model import FLAVORS, Llama, Shape
from Llama.prepare import Prepare, prepare
from Llama.templates import TEMPLATES
from tests.ranks import Ranks

# Grouped queries, and wavelengths both shorter and longer than those that Llama-3.1 stretches.
SMALL = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 300, "max_seq_len": 128}
SHAPES = {
    name: replace(FLAVORS[name][flavor], multiple_of=16, ffn_dim_multiplier=None, **SMALL)
    for name, flavor in (("llama2", "7B"), ("llama3.1", "8B"))
}
TOKENS = torch.randint(300, (2, 100), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    (folder / "text").mkdir()
    for i in range(4):
        (folder / f"text/{i}.txt").write_text(f"question {i} has an answer\n" * 20)
    return prepare(Prepare(str(folder / "text"), folder / "tokenizer", vocab_size=280))


def model_of(shape: Shape) -> Llama:
    torch.manual_seed(0)
    model = Llama(shape)
    model.init_weights()
    for param in model.parameters():  # larger than at the start of training, so that attention is not uniform
        param.data = torch.randn_like(param) * 0.2 if param.ndim > 1 else 1 + torch.randn_like(param) * 0.1
    return model


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_exported_logits_match_transformers(name, assets, tmp_path):
    model = model_of(SHAPES[name])
    weights.write_hf(tmp_path, model.state_dict(), SHAPES[name], assets)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, atol=2e-4, rtol=0)  # logits of about 10


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_imported_logits_match_transformers(name, tmp_path):
    torch.manual_seed(1)
    config = weights.hf_config(SHAPES[name], initializer_range=0.2)
    theirs = LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path)
    folder, is_hf = weights.find_weights(tmp_path)
    weights.check_weights(folder, is_hf, SHAPES[name], name)
    model = model_of(SHAPES[name])
    adapter = weights.Adapter(SHAPES[name], None)
    states = adapter.to_hf(model.state_dict())
    dcp.load(states, storage_reader=adapter.get_hf_storage_reader(str(folder)))  # as torchtitan loads them
    model.load_state_dict(adapter.from_hf(states))
    torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, atol=2e-4, rtol=0)


def test_weights_cut_within_a_head_translate_as_whole_ones():
    with Ranks(4) as ranks:
        assert all(ranks(_cut_within_a_head))


def _cut_within_a_head() -> bool:
    shape = SHAPES["llama2"]
    whole = torch.arange(32 * 64.0).view(32, 64)  # keys of 2 heads of 16, on 4 ranks
    adapter, name = weights.Adapter(shape, None), "layers.0.attention.wk.weight"
    cut = distribute_tensor(whole, init_device_mesh("cpu", (4,)), [Shard(0)])
    (there,) = adapter.to_hf({name: cut}).values()
    (expected,) = weights.Llama3StateDictAdapter(shape, None).to_hf({name: whole}).values()
    return torch.equal(there.full_tensor(), expected)


def run_with(folder: Path, shape: Shape, assets: Path, **settings) -> Llama:
    """A run's folder as Llama.train leaves it, with the weights of one model at step 3 and of another at step 12."""
    first, last = model_of(shape), model_of(shape)
    for param in last.parameters():
        param.data += 1
    for step, model in ((3, first), (12, last)):
        dcp.save(model.state_dict(), checkpoint_id=folder / f"checkpoint/step-{step}")
    (folder / "checkpoint/step-20").mkdir()  # one that is incomplete
    model = {"name": "llama2", "flavor": "tiny", "hf_assets_path": str(assets)}
    config = {"model": model, "training": {"dataset": "text"}, **settings}
    (folder / "config.json").write_text(json.dumps({"config": config}))
    return last


def test_export_of_a_run_matches_its_newest_checkpoint_tokenizer_and_template(assets, tmp_path, monkeypatch):
    monkeypatch.setitem(FLAVORS["llama2"], "tiny", SHAPES["llama2"])
    tuned = {"training": {"dataset": "instructions"}, "fine_tuning": {"template": "question"}}
    model = run_with(tmp_path / "run", SHAPES["llama2"], assets, **tuned)
    out = weights.export(weights.Options(tmp_path / "run", tmp_path / "out", dtype="float32"))
    theirs, tokenizer = LlamaForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    torch.testing.assert_close(theirs.lm_head.weight, model.output.weight)
    assert theirs.config.eos_token_id == tokenizer.eos_token_id == 1
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "who?"}], tokenize=False, add_generation_prompt=1
    )
    assert asked == "<s>Question: who?\nAnswer:"
    assert LlamaForCausalLM.from_pretrained(out).generation_config.eos_token_id == 1
    half = weights.export(weights.Options(tmp_path / "run", tmp_path / "half", step=3))
    first = LlamaForCausalLM.from_pretrained(half)
    assert first.dtype == torch.bfloat16
    torch.testing.assert_close(first.lm_head.weight.float(), model.output.weight - 1, atol=0.01, rtol=0.01)
    with pytest.raises(UserError, match="--out must be a new folder"):
        weights.export(weights.Options(tmp_path / "run", tmp_path / "half"))


def test_weights_of_another_model_are_refused_with_what_differs(assets, tmp_path):
    shape = SHAPES["llama2"]
    run_with(tmp_path / "run", shape, assets)
    checkpoint, is_hf = weights.find_weights(tmp_path / "run")
    assert (checkpoint.name, is_hf) == ("step-12", False)
    weights.check_weights(checkpoint, is_hf, shape, "llama2 tiny")
    larger = replace(shape, vocab_size=500)
    with pytest.raises(UserError, match=r"tok_embeddings.weight of shape \(500, 64\); in .* of shape \(300, 64\)"):
        weights.check_weights(checkpoint, is_hf, larger, "llama2 tiny")
    (tmp_path / "hf").mkdir()
    weights.write_hf(tmp_path / "hf", model_of(shape).state_dict(), shape, assets)
    with pytest.raises(UserError, match=r"layers.2.* of shape .*; in .* it is missing"):
        weights.check_weights(tmp_path / "hf", True, replace(shape, n_layers=3), "llama2 tiny")
    with pytest.raises(UserError, match=r"must have rope_parameters .*llama3.*; .*config.json says .*default"):
        weights.check_weights(tmp_path / "hf", True, SHAPES["llama3.1"], "llama3.1 tiny")
    with pytest.raises(UserError, match=r"weights are \*.safetensors files, .*nowhere does not exist"):
        weights.find_weights(tmp_path / "nowhere")


def test_llama_31_matches_the_published_config():
    """config.json of meta-llama/Llama-3.1-8B."""
    config = weights.hf_config(FLAVORS["llama3.1"]["8B"])
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (4096, 14_336, 32)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (32, 8, 128_256)
    assert config.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert set(TEMPLATES) == {"question", "alpaca", "llama3"}
