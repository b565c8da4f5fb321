"""Weights exported to transformers' Llama and Qwen2 and imported back, and checkpoints against their model."""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM, Qwen2ForCausalLM

from common import UserError
from Llama import hf, weights
from Llama.checkpoints import Checkpointer
from Llama.model import FLAVORS, Llama, Shape
from Llama.prepare import Prepare, prepare
from Llama.templates import TEMPLATES

# Grouped queries, and wavelengths both shorter and longer than those that Llama-3.1 stretches.
SMALL = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 300, "max_seq_len": 128}
SHAPES = {
    name: replace(FLAVORS[name][flavor], multiple_of=16, ffn_dim_multiplier=None, **SMALL)
    for name, flavor in (("llama2", "7B"), ("llama3.1", "8B"), ("qwen2.5", "0.5B"))
}
THEIRS = {"llama2": LlamaForCausalLM, "llama3.1": LlamaForCausalLM, "qwen2.5": Qwen2ForCausalLM}
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
    theirs = THEIRS[name].from_pretrained(tmp_path)
    torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, atol=2e-4, rtol=0)  # logits of about 10


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_imported_logits_match_transformers(name, tmp_path):
    torch.manual_seed(1)
    config = hf.hf_config(SHAPES[name], initializer_range=0.2)
    theirs = THEIRS[name](config)
    for key, param in theirs.named_parameters():
        if key.endswith(".bias"):  # which begin at zero
            torch.nn.init.normal_(param)
    theirs.save_pretrained(tmp_path)
    folder, is_hf = weights.find_weights(tmp_path)
    weights.check_weights(folder, is_hf, SHAPES[name], name)
    model = model_of(SHAPES[name])
    adapter = hf.Adapter(SHAPES[name], None)
    states = adapter.to_hf(model.state_dict())
    dcp.load(states, storage_reader=adapter.get_hf_storage_reader(str(folder)))  # as torchtitan loads them
    model.load_state_dict(adapter.from_hf(states))
    torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, atol=2e-4, rtol=0)


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


UNKNOWN = {"model": {"name": "x", "flavor": "y", "hf_assets_path": ""}, "training": {"dataset": ""}}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "{}", '{"config": 5}', '{"config": {"model": []}}', '{"config": {"model": {"name": "llama2"}}}']
    + [json.dumps({"config": UNKNOWN | {"training": {}}}), json.dumps({"config": UNKNOWN})],
)
def test_damaged_record_of_a_run_refuses_with_its_path(tmp_path, content):
    dcp.save({}, checkpoint_id=tmp_path / "checkpoint/step-3")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path / "config.json")) as error:
        weights.export(weights.Options(tmp_path, tmp_path / "out"))
    assert "\n" not in str(error.value)


def test_weights_of_another_model_are_refused_with_the_difference(assets, tmp_path):
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
    with pytest.raises(UserError, match=r"must have num_hidden_layers 3; .*config.json says 2: name their own model"):
        weights.check_weights(tmp_path / "hf", True, replace(shape, n_layers=3), "llama2 tiny")
    with pytest.raises(UserError, match=r"must have rope_parameters .*llama3.*; .*config.json says .*default"):
        weights.check_weights(tmp_path / "hf", True, SHAPES["llama3.1"], "llama3.1 tiny")
    with pytest.raises(UserError, match=r"weights are \*.safetensors files, .*nowhere does not exist"):
        weights.find_weights(tmp_path / "nowhere")


# ---- Foreign folders


@pytest.fixture
def foreign(tmp_path) -> Path:
    """Weights of the small Llama as transformers writes them, in one file."""
    torch.manual_seed(1)
    LlamaForCausalLM(hf.hf_config(SHAPES["llama2"])).save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refusal(folder: Path) -> str:
    """Return the one line by which a folder is refused."""
    with pytest.raises(UserError) as refused:
        weights.check_weights(*weights.find_weights(folder), SHAPES["llama2"], "llama2 tiny")
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "mistral"}, "says model_type 'mistral'"),
        ({"attention_bias": True}, "must have attention_bias False; .* says True: the model here does not support it"),
        ({"mlp_bias": True}, "must have mlp_bias False"),
        ({"hidden_act": "gelu"}, "must have hidden_act silu; .* says gelu"),
        ({"sliding_window": 4096}, "must have sliding_window None; .* says 4096: the model here does not support it"),
        ({"quantization_config": {"quant_method": "fp8"}}, "must have quantization_config None"),
        ({"tie_word_embeddings": True}, "says True: their head is tied to the embedding"),
        ({"head_dim": 32}, "must have head_dim 16; .* says 32"),
        ({"logit_scale": 0.5}, "must have logit_scale None"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "must have rope_parameters"),
        ({"hidden_size": "64"}, "must be the config.json of llama2 tiny"),
    ],
)
def test_config_of_another_model_refuses_with_the_entry(foreign, entries, message):
    edit(foreign / "config.json", **entries)
    assert re.search(message, refusal(foreign))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "5", "[" * 100_000])
def test_damaged_config_refuses_with_its_path(foreign, text):
    (foreign / "config.json").write_text(text)
    assert str(foreign / "config.json") in refusal(foreign)


# config.json of meta-llama/Llama-2-7b-hf and of meta-llama/Llama-3.1-8B, without entries that are defaults.
@pytest.mark.parametrize(
    ("name", "flavor", "published"),
    [
        (
            "llama2",
            "7B",
            {"_name_or_path": "meta-llama/Llama-2-7b-hf", "bos_token_id": 1, "eos_token_id": 2, "pretraining_tp": 1}
            | {"hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "rope_scaling": None}
            | {"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 32000}
            | {"torch_dtype": "float16", "transformers_version": "4.31.0.dev0"},
        ),
        (
            "llama3.1",
            "8B",
            {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001}
            | {"hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False}
            | {"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1}
            | {"rope_theta": 500000.0, "vocab_size": 128256, "torch_dtype": "bfloat16"}
            | {
                "rope_scaling": {
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                    "rope_type": "llama3",
                },
            },
        ),
        (
            "qwen2.5",
            "0.5B",
            {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643}
            | {"hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24}
            | {"model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2}
            | {"rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "use_sliding_window": False}
            | {"tie_word_embeddings": True, "use_mrope": False, "vocab_size": 151936, "torch_dtype": "bfloat16"},
        ),
    ],
)
def test_published_config_matches_its_flavor(tmp_path, name, flavor, published):
    common = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "initializer_range": 0.02}
    common |= {"model_type": "llama", "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "use_cache": True}
    (tmp_path / "config.json").write_text(json.dumps(common | published))
    hf.check_config(tmp_path / "config.json", FLAVORS[name][flavor], f"{name} {flavor}")


def test_weights_of_a_llama_and_of_a_qwen_are_not_each_others(tmp_path):
    for name, other in (("llama2", "qwen2.5"), ("qwen2.5", "llama2")):
        THEIRS[name](hf.hf_config(SHAPES[name])).save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=f"must be of model_type {THEIRS[other].config_class.model_type!r}"):
            weights.check_weights(tmp_path / name, True, SHAPES[other], other)
        (tmp_path / name / "config.json").unlink()
        with pytest.raises(UserError, match=r"lm_head.weight|q_proj.bias"):
            weights.check_weights(tmp_path / name, True, SHAPES[other], other)


def test_config_that_brings_code_along_runs_none_of_it(foreign):
    edit(foreign / "config.json", auto_map={"AutoConfig": "evil.Config"}, model_type="evil")
    (foreign / "evil.py").write_text(f"open({str(foreign / 'ran')!r}, 'w')")
    assert "model_type 'evil'" in refusal(foreign)
    edit(foreign / "config.json", model_type="llama")
    assert "auto_map" in refusal(foreign)
    assert not (foreign / "ran").exists()


def save(folder: Path, **files: dict[str, torch.Tensor]) -> None:
    """Put files NAME.safetensors in place of a folder's own."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")


def test_tensors_that_the_model_lacks_or_cannot_read_refuse_in_one_line(foreign):
    (foreign / "config.json").unlink()  # refused before its entries are read
    good = load_file(foreign / "model.safetensors")
    norm, query = "model.norm.weight", "model.layers.0.self_attn.q_proj"
    scale = {f"{query}.weight_scale": torch.ones(1)}
    eight_bits = {f"{query}.weight": good[f"{query}.weight"].to(torch.float8_e4m3fn)}
    whole_numbers = {f"{query}.weight": good[f"{query}.weight"].to(torch.int8)}
    save(foreign, model=good | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    weights.check_weights(foreign, True, SHAPES["llama2"], "llama2 tiny")  # a table of old exports
    for tensors, message in [
        (good | scale, f"also has {query}.weight_scale and 0 more"),
        (good | {f"{query}.bias": torch.ones(64)}, f"also has {query}.bias"),
        (good | eight_bits | scale, f"{query}.weight in .*model.safetensors is F8_E4M3: .* not quantized"),
        (good | whole_numbers, "is I8: download weights that are not quantized"),
        (
            {key: each for key, each in good.items() if key != "lm_head.weight"},
            "lm_head.* missing, so the head is tied",
        ),
        ({key: each for key, each in good.items() if key != norm}, f"must have {norm} of shape .* it is missing"),
    ]:
        save(foreign, model=tensors)
        assert re.search(message, refusal(foreign)), message
    save(foreign, a=good, b={norm: torch.zeros(64)})
    assert re.search(f"{norm} is in .*a.safetensors and in .*b.safetensors", refusal(foreign))


def test_cut_shard_refuses_with_its_name(foreign):
    good = load_file(foreign / "model.safetensors")
    names = sorted(good)
    save(foreign, a={name: good[name] for name in names[:5]}, b={name: good[name] for name in names[5:]})
    content = (foreign / "b.safetensors").read_bytes()
    for size in (0, 7, 100, len(content) // 2, len(content) - 1):
        (foreign / "b.safetensors").write_bytes(content[:size])
        assert re.search(r"whole safetensors files; .*b.safetensors cannot be read", refusal(foreign)), size


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Read a folder as torchtitan does."""
    adapter = hf.Adapter(SHAPES["llama2"], None)
    states = adapter.to_hf(model_of(SHAPES["llama2"]).state_dict())
    dcp.load(states, storage_reader=adapter.get_hf_storage_reader(str(folder)))
    return states


def test_tensors_match_the_file_that_the_index_names(foreign):
    good = load_file(foreign / "model.safetensors")
    norm = "model.norm.weight"
    save(foreign, a={norm: torch.zeros(64)}, b=good, c={norm: torch.ones(64) / 2}, d={"not.ours": torch.ones(1)})
    index, owner = foreign / "model.safetensors.index.json", dict.fromkeys(good, "b.safetensors")
    for file, value in (("a.safetensors", 0), ("b.safetensors", 1), ("c.safetensors", 0.5)):
        index.write_text(json.dumps({"weight_map": owner | {norm: file}}))
        weights.check_weights(foreign, True, SHAPES["llama2"], "llama2 tiny")
        assert loaded(foreign)[norm].unique().item() == value
    for content, message in [
        ({"weight_map": owner | {norm: "d.safetensors"}}, r"d.safetensors must hold model.norm.weight, as the index"),
        ({"weight_map": owner | {norm: "e.safetensors"}}, "e.safetensors cannot be read"),
        ({"weight_map": owner | {norm: "../b.safetensors"}}, "must map tensors to files of its folder"),
        ({"weight_map": []}, "must map tensors to files"),
        ([], "must hold an object"),
    ]:
        index.write_text(json.dumps(content))
        assert re.search(message, refusal(foreign)), message


class Payload:
    """Code in a pickle, which makes a file where it is executed."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_pickles_of_a_foreign_checkpoint_refuse_and_run_nothing(tmp_path):
    state, trace = model_of(SHAPES["llama2"]).state_dict(), tmp_path / "ran"
    dcp.save(state | {"train_state": Payload(trace)}, checkpoint_id=tmp_path / "step-1")
    trace.unlink(missing_ok=True)
    for wanted in ({"train_state": 0}, {"norm.weight": state["norm.weight"], "train_state": 0}):
        with pytest.raises(UserError, match="of plain values; it cannot be loaded"):
            Checkpointer.dcp_load(None, wanted, str(tmp_path / "step-1"), from_hf=False, from_quantized=False)
    (tmp_path / "step-1/.metadata").write_bytes(pickle.dumps(Payload(trace)))
    assert ".metadata must be of torch.distributed.checkpoint" in refusal(tmp_path / "step-1")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists()  # the payload works


def test_checkpoint_with_other_tensors_or_none_of_floats_refuses(tmp_path):
    state = model_of(SHAPES["llama2"]).state_dict()
    bias, norm = {"layers.0.attention.wq.bias": torch.ones(64)}, {"norm.weight": torch.ones(64, dtype=torch.int8)}
    for number, (more, message) in enumerate(
        [
            (bias, "also has layers.0.attention.wq.bias"),
            (norm, "norm.weight in .* is not"),
            ({"norm.weight": "x"}, "norm.weight in .* is not"),
        ]
    ):
        folder = tmp_path / f"step-{number}"
        dcp.save(state | more, checkpoint_id=folder)
        assert re.search(message, refusal(folder))


def test_llama_31_matches_the_published_config():
    """config.json of meta-llama/Llama-3.1-8B."""
    config = hf.hf_config(FLAVORS["llama3.1"]["8B"])
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
