"""Llama's tokens against transformers', for tokenizers of several kinds, and against the encoded text."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from common import UserError
from Llama.config import JobConfig
from Llama.instructions import check_tokens
from Llama.templates import TEMPLATES, Template
from Llama.tokenizer import Tokenizer, encode, export_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
WORDS = ["one and two are three, and three are six. Question: Answer: be brief", "### Instruction: 1 + 2 = 3"] * 9
CHAT = [
    {"role": "user", "content": "one and\n\n two?"},
    {"role": "assistant", "content": "three é"},
    {"role": "user", "content": " and 漢?"},
    {"role": "assistant", "content": "six"},
]
# Pre-tokenizers and decoders: GPT-2's and Llama-3's bytes, Llama-2's tokenizer.json, and the form into which
# transformers converts SentencePiece's now.
KINDS = {
    "bytes": (None, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
    "llama2": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, None),
    "first": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), decoders.Metaspace()),
    "always": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False), decoders.Metaspace()),
}


def make(folder: Path, kind: str = "bytes", **config) -> Path:
    """Write a tokenizer as on the Hugging Face Hub."""
    normalizer, pre_tokenizer, decoder = KINDS[kind]
    fast = Fast(models.BPE(unk_token="<unk>", byte_fallback=kind != "bytes"))
    # SentencePiece learns no piece that goes on after a space.
    fast.pre_tokenizer = pre_tokenizer if kind == "bytes" else pre_tokenizers.Metaspace(split=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
    extra = [] if kind == "bytes" else [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL + extra, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(WORDS, trainer)
    fast.normalizer, fast.pre_tokenizer, fast.decoder = normalizer, pre_tokenizer, decoder
    folder.mkdir()
    content = json.loads(fast.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer",
    } | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_exported_tokens_match_those_of_training(name, kind, tmp_path):
    assets, out = make(tmp_path / "assets", kind), tmp_path / "out"
    out.mkdir()
    if name == "llama3" and kind != "bytes":  # a response would begin with a space in training only
        with pytest.raises(UserError, match="must produce the tokens of training"):
            export_tokenizer(out, assets, TEMPLATES[name])
        return
    export_tokenizer(out, assets, TEMPLATES[name])
    theirs = AutoTokenizer.from_pretrained(out)
    (example,) = encode([CHAT], Tokenizer(assets), TEMPLATES[name])
    first = int(example.trained.argmax())
    assert theirs.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False) == list(
        example.tokens[:first]
    )
    second = first + int((~example.trained[first:]).argmax())
    third = second + int(example.trained[second:].argmax())
    assert theirs.apply_chat_template(CHAT[:3], add_generation_prompt=True, return_dict=False) == list(
        example.tokens[:third]
    )
    text = "one and é\n <s>"
    assert theirs(text[:-3], add_special_tokens=False)["input_ids"] == Tokenizer(assets).encode(text[:-3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_that_looks_like_a_token_stays_text(name, kind, tmp_path):
    tokenizer, special = Tokenizer(make(tmp_path / "assets", kind)), "<s> </s> <|eot_id|><|start_header_id|>"
    tokens = tokenizer.encode(f"one {special}", add_bos=True, add_eos=True)
    ids = {tokenizer.token_to_id(token) for token in SPECIAL[1:]}
    assert [i for i, token in enumerate(tokens) if token in ids] == [0, len(tokens) - 1]
    plain, spelled = ([{"role": "user", "content": text}, CHAT[1]] for text in ("one", f"one {special}"))
    (expected,), (found,) = (encode([each], tokenizer, TEMPLATES[name]) for each in (plain, spelled))
    kept = [[token for token in each.tokens if token in ids] for each in (expected, found)]
    assert kept[0] == kept[1] and len(found.tokens) > len(expected.tokens) + 4


def test_truncation_and_padding_of_the_file_do_not_reach_texts_or_exports(tmp_path):
    assets = make(tmp_path / "assets")
    text = "one and two are three. " * 200
    expected = Tokenizer(assets).encode(text)
    fast = Fast.from_file(str(assets / "tokenizer.json"))
    fast.enable_truncation(72)
    fast.enable_padding(length=5000)
    fast.save(str(assets / "tokenizer.json"))
    tokenizer = Tokenizer(assets)
    assert tokenizer.encode(text) == tokenizer.encode_batch([text])[0] == expected
    assert tokenizer.decode(expected) == text
    (tmp_path / "out").mkdir()
    export_tokenizer(tmp_path / "out", assets)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == expected


@pytest.mark.parametrize("spelling", ["</s>", {"content": "</s>", "special": True}])
def test_token_that_begins_and_ends_a_text_is_put_at_both(tmp_path, spelling):
    tokenizer = Tokenizer(make(tmp_path / "assets", bos_token=spelling, eos_token=spelling))
    assert tokenizer.bos_id == tokenizer.eos_id == 2
    tokens = tokenizer.encode("one", add_bos=True, add_eos=True)
    assert (tokens[0], tokens[-1]) == (2, 2) and 2 not in tokens[1:-1]


def test_export_whose_tokens_differ_refuses_before_weights_are_written(tmp_path):
    class Other(Template):
        def jinja(self, space: str = "") -> str:
            return super().jinja(space).replace("Question: ", "Question:  ")

    (tmp_path / "out").mkdir()
    template = Other(**vars(TEMPLATES["question"]))
    with pytest.raises(UserError, match=r"must produce the tokens of training; .* it gives .* instead of"):
        export_tokenizer(tmp_path / "out", make(tmp_path / "assets"), template)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "[]", "{", "null", "\ufeff{}"])
def test_damaged_tokenizer_refuses_with_its_path(tmp_path, file, text):
    assets = make(tmp_path / "assets")
    (assets / file).write_text(text)
    with pytest.raises(UserError, match=file) as refused:
        Tokenizer(assets)
    assert "\n" not in str(refused.value)


def test_tokenizer_of_two_sources_refuses(tmp_path):
    (assets := make(tmp_path / "assets")).joinpath("tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer(assets)
    tokens = {"7": {"content": "</s>", "special": True}}
    with pytest.raises(UserError, match=r"it has '</s>' as 7, which is 2 there: use both files of one tokenizer"):
        Tokenizer(make(tmp_path / "other", added_tokens_decoder=tokens))


def test_template_that_the_tokenizer_cannot_export_refuses_before_training(tmp_path):
    settings = JobConfig()
    settings.fine_tuning.template, settings.model.hf_assets_path = "llama3", str(tmp_path / "assets")
    tokenizer = Tokenizer(make(tmp_path / "assets", "llama2"))
    with pytest.raises(UserError, match="llama3 needs a tokenizer that adds no space before a text"):
        check_tokens(tokenizer, TEMPLATES["llama3"], settings)
    check_tokens(tokenizer, TEMPLATES["question"], settings)
