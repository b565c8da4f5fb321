"""Tokenization of text and conversations, identical in training and, after export, in transformers."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from common import UserError, one_line
from common.json_files import read_object
from Llama.templates import Messages, Template

FILES = ("tokenizer.json", "tokenizer_config.json")
OPTIONAL = "special_tokens_map.json"

# Compared at each export: several turns, a system message, and text of several scripts.
SAMPLE = "One sample: 1 + 2 = 3, élan, 漢字.\n\n  The end"
CONVERSATION: Messages = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": SAMPLE},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": "And 2 + 3?"},
    {"role": "assistant", "content": "Five."},
]


class Example(NamedTuple):
    """A conversation's tokens (n,), int32, and whether each has a label (n,), bool."""

    tokens: np.ndarray
    trained: np.ndarray


class Tokenizer(HuggingFaceTokenizer):
    """torchtitan's tokenizer without truncation, padding, and parsing of special tokens in text.

    Raises UserError for a folder without a tokenizer, or with inconsistent files.
    """

    def __init__(self, folder: Path):
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            raise UserError(
                f"model.hf_assets_path must hold {FILES[0]} and {FILES[1]}; {folder} has no {missing[0]}: download "
                "them (hf download meta-llama/... --local-dir FOLDER), or prepare some (python -m Llama.prepare)"
            )
        for name in FILES:
            read_object(folder / name)  # torchtitan's error would not name the file
        try:
            super().__init__(str(folder))
        except Exception as error:  # errors of tokenizers have no narrower common class
            raise UserError(
                f"model.hf_assets_path must hold a tokenizer; that of {folder} cannot be read "
                f"({one_line(error)[:100]}): download it again"
            ) from error
        self.folder = folder
        self.tokenizer.no_truncation()  # the file may hold another model's length
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # "<s>" in a text is three characters
        self.bos_token, self.bos_id = self._named("bos_token")  # torchtitan does not support one token for both
        self.eos_token, self.eos_id = self._named("eos_token")
        added = self.config.get("added_tokens_decoder") or {}
        for number, entry in added.items() if isinstance(added, dict) else [("no object", added)]:
            token = entry.get("content") if isinstance(entry, dict) else None
            found = self.token_to_id(token) if isinstance(token, str) else None
            if str(found) != number:
                raise UserError(
                    f"{folder / FILES[1]} must name the tokens of {FILES[0]}; it has {token!r:.60} as {number:.20}, "
                    f"which is {found} there: use both files of one tokenizer"
                )

    def _named(self, key: str) -> tuple[str | None, int | None]:
        token = self._get_token_from_config(self.config, key)
        return token, None if token is None else self.token_to_id(token)

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Return the tokens of a text, with begin and end of text if requested and defined."""
        return self.encode_batch([text], add_bos, add_eos)[0]

    def encode_batch(self, texts: list[str], add_bos: bool = False, add_eos: bool = False) -> list[list[int]]:
        """Return the tokens of several texts, like `encode`, on all cores."""
        begin = [self.bos_id] if add_bos and self.bos_id is not None else []
        end = [self.eos_id] if add_eos and self.eos_id is not None else []
        return [begin + found.ids + end for found in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    @property
    def begins_with_space(self) -> bool:
        """Whether the tokenizer adds a space before every text, like SentencePiece."""
        return self.tokenizer.encode("x", add_special_tokens=False).tokens[0].startswith("▁")


def encode(conversations: list[Messages], tokenizer: Tokenizer, template: Template) -> list[Example]:
    """Tokenize conversations; prompt and response never share a token, as in generation."""
    segments = [list(template.segments(messages)) for messages in conversations]
    own_space = tokenizer.begins_with_space
    texts = []
    for each in segments:
        for parts, is_response in each:
            if is_response and own_space:
                parts[0] = parts[0].removeprefix(template.lead)  # added by the tokenizer
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
                found += tokens_of_part if part else []  # SentencePiece encodes empty text as a space
            found += [end] * is_response
            tokens += found
            trained += [is_response] * len(found)
        examples.append(Example(np.array(tokens, np.int32), np.array(trained)))
    return examples


# ---- Export


def export_tokenizer(folder: Path, assets: Path, template: Template | None = None) -> None:
    """Write the tokenizer of `assets` to `folder` for transformers, with a chat template if given.

    Raises UserError if transformers would produce other tokens than training.
    """
    tokenizer = Tokenizer(assets)
    found = {name: read_object(assets / name) for name in FILES}
    found[FILES[0]] |= {"truncation": None, "padding": None}
    # Other classes rebuild the tokenizer with their own rules, such as LlamaTokenizer's for spaces.
    found[FILES[1]] |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    found[FILES[1]].pop("auto_map", None)  # code of the tokenizer's original folder
    for name, content in found.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    if (assets / OPTIONAL).is_file():
        shutil.copy(assets / OPTIONAL, folder)
    different = ""
    # A tokenizer that adds its space only before the first text needs an explicit one after the begin of text.
    for space in ("", " ") if template else ("",):
        if template:
            (folder / "chat_template.jinja").write_text(template.jinja(space), encoding="utf-8")
        if not (different := difference(folder, tokenizer, template)):
            return
    raise UserError(
        f"transformers must produce the tokens of training; with the tokenizer of {assets} it gives {different}: name "
        "a tokenizer whose tokenizer.json defines the splitting of text, or another template"
    )


def difference(folder: Path, tokenizer: Tokenizer, template: Template | None) -> str:
    """Return the first difference between transformers' tokens of an exported folder and training's, or ""."""
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
