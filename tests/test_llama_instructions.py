"""Fine-tuning data: trained tokens against the responses, packed rows against padded ones, batches of ranks."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from common import UserError
from Llama import arithmetic, instructions
from Llama.config import JobConfig
from Llama.instructions import (
    IGNORE_INDEX,
    Loader,
    conversation,
    fit,
    local_rows,
    rows_of_epoch,
    to_batch,
)
from Llama.model import FLAVORS, Llama
from Llama.prepare import Prepare, prepare
from Llama.templates import TEMPLATES
from Llama.tokenizer import Example, Tokenizer, encode

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one and two?"},
    {"role": "assistant", "content": "three"},
    {"role": "user", "content": "and\nthree?"},
    {"role": "assistant", "content": "six é"},
    {"role": "user", "content": "left out"},
]
ASKED = [{"role": "user", "content": "one and two?"}, {"role": "assistant", "content": "three"}]
EXPECTED = {  # the trained tokens of each response, with its end token
    "question": [" three</s>", " six é</s>"],
    "alpaca": [" three</s>", " six é</s>"],
    "llama3": ["three<|eot_id|>", "six é<|eot_id|>"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer with Llama 3's special tokens, trained on a few words."""
    folder = tmp_path_factory.mktemp("instructions")
    (folder / "text").mkdir()
    for i in range(4):
        (folder / f"text/{i}.txt").write_text(
            "one and two are three, and three are six. Question: Answer: be brief\n" * 9
        )
    out = prepare(Prepare(str(folder / "text"), folder / "tokenizer", vocab_size=290))
    config = json.loads((out / "tokenizer_config.json").read_text())
    names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    config["added_tokens_decoder"] = {str(290 + i): {"content": name, "special": True} for i, name in enumerate(names)}
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer(folder)


def trained_texts(example: Example, tokenizer: Tokenizer) -> list[str]:
    """Decode each run of labels of a batch that is trained on."""
    _, labels = to_batch([[example]], packing=False, room=512)
    stretches, previous = [], IGNORE_INDEX
    for label in labels[0].tolist():
        if label != IGNORE_INDEX and previous == IGNORE_INDEX:
            stretches.append([])
        if label != IGNORE_INDEX:
            stretches[-1].append(label)
        previous = label
    return [tokenizer.decode(tokens, skip_special_tokens=False) for tokens in stretches]


@pytest.mark.parametrize("name", TEMPLATES)
def test_trained_tokens_match_the_responses_and_their_ends_exactly(name, tokenizer):
    (example,) = encode([CHAT], tokenizer, TEMPLATES[name])
    assert trained_texts(example, tokenizer) == EXPECTED[name]
    inputs, labels = to_batch([[example]], packing=False, room=512)
    kept = labels[0] != IGNORE_INDEX
    whole = torch.from_numpy(example.tokens).long()
    assert torch.equal(labels[0][kept], whole[1:][kept[: len(whole) - 1]])  # each label is the token after its input
    assert torch.equal(inputs["input"][0, : len(whole) - 1], whole[:-1])
    assert "left out" not in tokenizer.decode(example.tokens.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [CHAT[:5], ASKED], ids=["chat", "asked"])
def test_tokens_match_transformers_chat_template(name, messages, folder, tokenizer):
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = TEMPLATES[name].jinja()
    (example,) = encode([messages], tokenizer, TEMPLATES[name])
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example.tokens.tolist(), skip_special_tokens=False) == text
    first = int(example.trained.argmax())
    until = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    asked = theirs.apply_chat_template(messages[:until], add_generation_prompt=True, return_dict=False)
    assert asked == example.tokens[:first].tolist()  # decoding continues the prompt that training had


def test_cut_examples_match_their_beginnings_and_are_counted(tokenizer):
    examples = encode([ASKED, ASKED[:1] + CHAT[4:5]], tokenizer, TEMPLATES["question"])
    before = int(examples[0].trained.argmax())
    kept, cut, lost = fit(examples, before)  # the first response token is the last label
    assert (len(kept), cut, lost) == (2, 2, 0)
    assert kept[0].trained.sum() == 1
    assert fit(examples, before - 1) == ([], 2, 2)
    assert fit(examples, 512)[1:] == (0, 0)


def examples_of(lengths) -> list[Example]:
    """Examples of n inputs, whose second half is trained on; the tokens identify the example."""
    return [Example(np.full(n + 1, 3 + i, np.int32), np.arange(n + 1) > n // 2) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("packing", [False, True])
def test_rows_of_an_epoch_match_every_example_once_within_the_room(packing):
    lengths = np.random.default_rng(0).integers(1, 33, 200)
    order = np.random.default_rng(1).permutation(200)
    rows = rows_of_epoch(lengths, order, packing, 32)
    assert [i for row in rows for i in row] == order.tolist()
    assert max(sum(lengths[i] for i in row) for row in rows) <= 32
    assert (len(rows) == 200) != packing
    if packing:  # no row could have taken the first of the next
        assert all(sum(lengths[i] for i in a) + lengths[b[0]] > 32 for a, b in pairwise(rows))


@torch.no_grad()
def test_packed_losses_match_those_of_padded_rows():
    torch.manual_seed(0)
    settings = JobConfig()
    settings.training.seq_len = 128
    examples = [
        Example(np.random.default_rng(i).integers(3, 4096, n).astype(np.int32), np.arange(n) > n // 3)
        for i, n in enumerate((40, 50, 30, 100))
    ]
    sums = {}
    for packing in (True, False):
        settings.fine_tuning.packing = packing
        shape = FLAVORS["llama2"]["debug"]
        shape.update_from_config(settings)
        torch.manual_seed(1)
        model = Llama(shape)
        model.init_weights()
        for param in model.parameters():
            param.mul_(4 if param.ndim > 1 else 1)  # attention that looks at something
        rows = [examples[:3], examples[3:]] if packing else [[example] for example in examples]
        inputs, labels = to_batch(rows, packing, 128)
        tokens = inputs["input"]
        if packing:
            mask = model.get_attention_masks(tokens, None, inputs)
            logits = model(tokens, attention_masks=mask, positions=inputs["positions"])
        else:
            logits = model(tokens)
        sums[packing] = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
    FLAVORS["llama2"]["debug"].attn_type = "sdpa"
    assert sums[True] == pytest.approx(sums[False], rel=1e-5)


def settings_for(packing: bool, local_batch_size: int = 1) -> JobConfig:
    settings = JobConfig()
    settings.training.seq_len, settings.training.local_batch_size = 16, local_batch_size
    settings.fine_tuning.packing = packing
    return settings


@pytest.mark.parametrize("packing", [False, True])
def test_batches_of_several_ranks_match_those_of_one_across_epochs_and_a_resume(packing):
    examples = examples_of(np.random.default_rng(0).integers(2, 16, 21))

    def take(loaders: list[Loader], count: int) -> list[tuple]:
        streams = [iter(loader) for loader in loaders]
        batches = [next(stream) for _ in range(count) for stream in streams]  # rank by rank
        return [tuple(row[row != IGNORE_INDEX].tolist()) for _, labels in batches for row in labels]

    alone = take([Loader(examples, settings_for(packing, 4), 0, 1)], 12)
    ranks = [Loader(examples, settings_for(packing, 1), rank, 2) for rank in range(2)]
    several = take(ranks, 12)
    assert several == alone[:24]
    resumed = [Loader(examples, settings_for(packing, 2), rank, 2) for rank in range(2)]
    for loader in resumed:
        loader.load_state_dict(ranks[0].state_dict())
    continued = take(resumed, 6)  # two rows per rank: (0, 2), (1, 3)
    assert sorted(continued) == sorted(alone[24:48])
    assert len(set(alone)) > 12 and alone[:21] != alone[21:42]


def test_rows_that_are_no_conversation_refuse_with_their_line(tmp_path):
    good = {"instruction": "a", "output": "b"}
    assert conversation({**good, "input": "c"}, "x") == [
        {"role": "user", "content": "a\nc"},
        {"role": "assistant", "content": "b"},
    ]
    for bad, message in [
        ({"instruction": "a", "answer": "b"}, "row 2 must have .*'output' is missing or not text, of"),
        ({"instruction": "a", "output": None}, "row 2 must have .*'output' is missing"),
        ({"messages": [{"role": "user", "content": "a"}]}, "row 2: .*one must be the assistant's"),
        ({"messages": [{"from": "human", "value": "a"}]}, 'row 2: each of "messages" must have a "role"'),
        ([1], "row 2 must be an object"),
    ]:
        (tmp_path / "train.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(UserError, match=message) as refused:
            [conversation(row, where) for where, row in local_rows(str(tmp_path), "train")]
        assert "\n" not in str(refused.value)
    (tmp_path / "train.jsonl").write_text('{"instruction": \n')
    with pytest.raises(UserError, match=r"row 1 must be JSON"):
        list(local_rows(str(tmp_path), "train"))
    line = json.dumps(good).encode()
    for content, message in [
        (line + b"\n" + b"[" * 100_000, "row 2 must be JSON"),
        (b"\xff" + line, "train.jsonl must be UTF-8"),
    ]:
        (tmp_path / "train.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=message) as refused:
            list(local_rows(str(tmp_path), "train"))
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="a text must be valid Unicode, has half a surrogate pair"):
        conversation({"instruction": "x", "output": "\ud83d"}, "here")
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(UserError, match=r"rows.parquet must be a whole .parquet file"):
        list(local_rows(str(tmp_path), "train"))


def test_template_without_its_tokens_and_hub_out_of_reach_refuse_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("some text\n" * 9)
    plain = prepare(Prepare(str(tmp_path / "text"), tmp_path / "tokenizer", vocab_size=260))
    settings = JobConfig()
    settings.model.hf_assets_path, settings.fine_tuning.template = str(plain), "llama3"
    with pytest.raises(UserError, match=r"the template llama3 needs a tokenizer with <\|end_header_id\|>, which"):
        instructions.check_tokens(Tokenizer(plain), TEMPLATES["llama3"], settings)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"mathinstruct \(nowhere/there\) is not reachable"):
        instructions.load_math_instruct("nowhere/there")


def test_math_instruct_matches_its_rows_without_those_held_out(tmp_path, monkeypatch):
    rows = [{"source": "x", "instruction": f"question {i}", "output": f"answer {i}"} for i in range(20)]
    (tmp_path / "MathInstruct.json").write_text(json.dumps(rows))
    found = {
        split: [
            messages[0]["content"]
            for messages in instructions.open_conversations("mathinstruct", str(tmp_path), split, 5)
        ]
        for split in ("train", "validation")
    }
    assert len(found["validation"]) == 5
    assert sorted(found["train"] + found["validation"]) == sorted(row["instruction"] for row in rows)


def test_word_problems_match_their_equations_and_no_two_are_alike(tmp_path, monkeypatch):
    folder = arithmetic.make(arithmetic.Options(tmp_path / "a", train=400, val=100))
    questions = []
    for split in ("train", "val"):
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        assert len(rows) == {"train": 400, "val": 100}[split]
        questions += [row["instruction"] for row in rows]
        for row in rows:
            sides = row["output"].split(" = ")
            assert eval(sides[0]) == int(sides[1])
            assert re.findall(r"\d+", row["instruction"]) == sides[0].split()[::2]
    assert len(set(questions)) == 500
    monkeypatch.setattr(arithmetic, "NAMES", arithmetic.NAMES[:2])
    monkeypatch.setattr(arithmetic, "THINGS", arithmetic.THINGS[:1])
    with pytest.raises(ValueError, match="lower --train or --val"):
        arithmetic.problems(100_000, 0)
