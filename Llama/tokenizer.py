"""Text and conversations as tokens: the same in training and, once exported, in transformers."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from common import UserError, one_line
from Llama.hf import read_json
from Llama.templates import Messages, Template

FILES = ("tokenizer.json", "tokenizer_config.json")
OPTIONAL = "special_tokens_map.json"

# Compared before an export is written: several turns, a system message, and text of several scripts.
SAMPLE = "One sample: 1 + 2 = 3, élan, 漢字.\n\n  The end"
CONVERSATION: Messages = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": SAMPLE},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": "And 2 + 3?"},
    {"role": "assistant", "content": "Five."},
]


class Example(NamedTuple):
    """A conversation's tokens (n,), int32, and which of them are trained on (n,), bool."""

    tokens: np.ndarray
    trained: np.ndarray


class Tokenizer(HuggingFaceTokenizer):
    """torchtitan's tokenizer, for which text is only text: uncut, unpadded, and without tokens that it spells.

    Raises UserError for a folder without a tokenizer, or with one that names tokens it does not have.
    """

    def __init__(self, folder: Path):
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            raise UserError(
                f"model.hf_assets_path must hold {FILES[0]} and {FILES[1]}; {folder} has no {missing[0]}: download "
                "them (hf download meta-llama/... --local-dir FOLDER), or make some (python -m Llama.prepare)"
            )
        for name in FILES:
            read_json(folder / name)  # torchtitan's own reading would not name the file
        try:
            super().__init__(str(folder))
        except Exception as error:  # tokenizers' errors share no narrower class
            raise UserError(
                f"model.hf_assets_path must hold a tokenizer; {folder} has none that can be read "
                f"({one_line(error)[:100]}): download it again"
            ) from error
        self.folder = folder
        self.tokenizer.no_truncation()  # of another model's length: the rest of a document would be lost
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # "<s>" in a text is three characters, no end of anything
        self.bos_token, self.bos_id = self._named("bos_token")  # torchtitan knows no token that is both
        self.eos_token, self.eos_id = self._named("eos_token")
        added = self.config.get("added_tokens_decoder") or {}
        for number, entry in added.items() if isinstance(added, dict) else [("no object", added)]:
            token = entry.get("content") if isinstance(entry, dict) else None
            found = self.token_to_id(token) if isinstance(token, str) else None
            if str(found) != number:
                raise UserError(
                    f"{folder / FILES[1]} must name the tokens of {FILES[0]}; it has {token!r:.60} as {number:.20}, "
                    f"which is {found} there: put both files of one tokenizer there"
                )

    def _named(self, key: str) -> tuple[str | None, int | None]:
        token = self._get_token_from_config(self.config, key)
        return token, None if token is None else self.token_to_id(token)

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Return the tokens of a text, between begin and end of text where these are asked for and exist."""
        return self.encode_batch([text], add_bos, add_eos)[0]

    def encode_batch(self, texts: list[str], add_bos: bool = False, add_eos: bool = False) -> list[list[int]]:
        """Return the tokens of several texts, as `encode` does, on all cores."""
        begin = [self.bos_id] if add_bos and self.bos_id is not None else []
        end = [self.eos_id] if add_eos and self.eos_id is not None else []
        return [begin + found.ids + end for found in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    @property
    def begins_with_space(self) -> bool:
        """Whether every text is encoded after a space of the tokenizer's own, as SentencePiece's are."""
        return self.tokenizer.encode("x", add_special_tokens=False).tokens[0].startswith("▁")


def encode(conversations: list[Messages], tokenizer: Tokenizer, template: Template) -> list[Example]:
    """Tokenize conversations; a prompt and a response never share a token, as in decoding they cannot."""
    segments = [list(template.segments(messages)) for messages in conversations]
    own_space = tokenizer.begins_with_space
    texts = []
    for each in segments:
        for parts, is_response in each:
            if is_response and own_space:
                parts[0] = parts[0].removeprefix(template.lead)  # which the tokenizer puts there itself
            texts += parts[::2]
    encoded = iter(tokenizer.encode_batch(texts))
    end = tokenizer.eos_id if template.end is None else tokenizer.token_to_id(template.end)
    examples = []
    for each in segments:
        tokens, trained = [tokenizer.bos_id], [False]
        for parts, is_response in each:
            found: list[int] = []
            for i, part in enumerate(parts):
                tokens_of_part = [tokenizer.token_to_id(part)] if i % 2 else next(encoded)
                found += tokens_of_part if part else []  # SentencePiece encodes no text as a space
            found += [end] * is_response
            tokens += found
            trained += [is_response] * len(found)
        examples.append(Example(np.array(tokens, np.int32), np.array(trained)))
    return examples


# ---- Export


def export_tokenizer(folder: Path, assets: Path, template: Template | None = None) -> None:
    """Write the tokenizer of `assets` into `folder` for transformers, with a chat template where one is given.

    Raises UserError where transformers would read other tokens than those of training.
    """
    tokenizer = Tokenizer(assets)
    found = {name: read_json(assets / name) for name in FILES}
    found[FILES[0]] |= {"truncation": None, "padding": None}
    # Another class would rebuild the tokenizer by its own rules: LlamaTokenizer's of spaces, for one.
    found[FILES[1]] |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    found[FILES[1]].pop("auto_map", None)  # code of the folder that the tokenizer came from
    for name, content in found.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    if (assets / OPTIONAL).is_file():
        shutil.copy(assets / OPTIONAL, folder)
    different = ""
    # A tokenizer whose space is put before the first text only needs it spelled out after the begin of text.
    for space in ("", " ") if template else ("",):
        if template:
            (folder / "chat_template.jinja").write_text(template.jinja(space), encoding="utf-8")
        if not (different := difference(folder, tokenizer, template)):
            return
    raise UserError(
        f"transformers must read the tokens that were trained on; with the tokenizer of {assets} it reads {different}: "
        "name a tokenizer whose tokenizer.json says how text is cut, or another template"
    )


def difference(folder: Path, tokenizer: Tokenizer, template: Template | None) -> str:
    """Compare the tokens of an exported folder in transformers with training's; return the first difference, or ""."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    pairs: list[tuple[str, Any, list[int]]] = [
        (SAMPLE, theirs(SAMPLE, add_special_tokens=False)["input_ids"], tokenizer.encode(SAMPLE))
    ]
    for messages in (CONVERSATION, CONVERSATION[1:]) if template else ():
        (example,) = encode([messages], tokenizer, template)
        starts = np.flatnonzero(np.diff(example.trained.astype(int)) > 0) + 1  # of responses
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for turn, start in zip(turns, starts, strict=True):
            asked = theirs.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=False)
            pairs.append((messages[turn - 1]["content"], asked, example.tokens[:start].tolist()))
    for text, found, expected in pairs:
        if found != expected:
            return f"{found!r:.80} instead of {expected!r:.80} for {text[:20]!r}"
    return ""
