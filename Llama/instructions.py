"""Batches of instructions and responses, with labels on the responses only.

A row is one example or, with packing, several. Row n of an epoch, whose order is drawn from (seed, epoch), goes to rank
n mod W, so that batches do not depend on the number W of ranks.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.tools.logging import logger

from common import UserError, one_line, progress
from common.corpus import TABLES, local_files
from common.launch import process_rank
from common.text_rows import read_rows
from Llama.config import JobConfig
from Llama.data import Batch
from Llama.sources import split_of
from Llama.templates import ROLES, TEMPLATES, Messages, Template
from Llama.tokenizer import Example, Tokenizer, encode

MATH_INSTRUCT = "TIGER-Lab/MathInstruct"  # on the Hugging Face Hub; has a training split only
WIDTH = 64  # the length of padded rows is a multiple of it, so that kernels see few different shapes
CHUNK = 1024  # conversations per tokenizer call, which uses all cores


# ---- Examples


def fit(examples: list[Example], length: int) -> tuple[list[Example], int, int]:
    """Cut examples to `length` inputs, that is, `length` + 1 tokens.

    Returns those that still have a response, the number cut, and the number without a response.
    """
    cut = [Example(example.tokens[: length + 1], example.trained[: length + 1]) for example in examples]
    kept = [example for example in cut if example.trained.any()]
    return kept, sum(len(example.tokens) > length + 1 for example in examples), len(cut) - len(kept)


def read_examples(tokenizer: Tokenizer, settings: JobConfig, split: str) -> list[Example]:
    """Read and tokenize the examples of a split; logs how many were cut.

    Raises UserError for a template whose tokens the tokenizer lacks, malformed rows, and an unreachable hub.
    """
    template = TEMPLATES[settings.fine_tuning.template]
    check_tokens(tokenizer, template, settings)
    section = settings.training if split == "train" else settings.validation
    conversations = open_conversations(section.dataset, section.dataset_path, split, settings.fine_tuning.held_out)
    examples = []
    with progress(desc=f"tokenizing {section.dataset}, {split}", unit="", is_main=process_rank() == 0) as bar:
        while chunk := list(islice(conversations, CHUNK)):
            examples += encode(chunk, tokenizer, template)
            bar.update(len(chunk))
    length = settings.training.seq_len
    kept, cut, lost = fit(examples, length)
    if not kept:
        raise UserError(
            f"{section.dataset_path or section.dataset} must hold examples whose response begins within "
            f"training.seq_len {length} tokens; none of {len(examples)} does"
        )
    logger.info(
        f"{split}: {len(examples):,} examples; {cut:,} longer than {length} tokens were cut, {lost:,} of them before "
        "their response, and dropped"
    )
    return kept


def check_tokens(tokenizer: Tokenizer, template: Template, settings: JobConfig) -> None:
    """Raise UserError for a template whose tokens the tokenizer lacks."""
    folder, name = settings.model.hf_assets_path, settings.fine_tuning.template
    wanted = {token: token for token in sorted(template.tokens())} | {"its begin of text": tokenizer.bos_token}
    if template.end is None:
        wanted["its end of text"] = tokenizer.eos_token
    for description, token in wanted.items():
        if token is None or tokenizer.token_to_id(token) is None:
            raise UserError(
                f"the template {name} needs a tokenizer with {description}, which {folder} lacks; set "
                "fine_tuning.template, or name the model's own tokenizer"
            )
    if tokenizer.begins_with_space and template.lead != " ":
        raise UserError(
            f"the template {name} needs a tokenizer that adds no space before a text; that of {folder} does: set "
            "fine_tuning.template, or name the model's own tokenizer"
        )


# ---- Conversations


def open_conversations(name: str, path: str | None, split: str, held_out: int) -> Iterator[Messages]:
    """Return the conversations of "mathinstruct", or the "instructions" of local files."""
    if name == "instructions":
        return (conversation(row, where) for where, row in local_rows(path, split))
    path = path or MATH_INSTRUCT
    rows = load_math_instruct(path)
    order = np.random.default_rng(0).permutation(len(rows))
    chosen = order[held_out:] if split == "train" else order[:held_out]
    return (conversation(rows[int(i)], f"{path}, row {i}") for i in chosen)


def load_math_instruct(path: str) -> Any:
    """Return MathInstruct (a datasets.Dataset) from the Hub, or from a copy at `path`."""
    import datasets

    try:
        return datasets.load_dataset(path, split="train")
    except Exception as error:  # Hub errors have no narrower common class
        raise UserError(
            f"mathinstruct ({path}) is not reachable ({one_line(error)[:100]}): where there is no internet, set "
            "dataset_path to a copy of the data set, or train on local files (dataset instructions)"
        ) from error


def local_rows(path: str | None, split: str) -> Iterator[tuple[str, Any]]:
    """Yield (location, row) of .jsonl and .parquet files."""
    if path is None:
        raise UserError(
            "the data set instructions needs its files; set training.dataset_path and validation.dataset_path"
        )
    _, files = local_files(split_of(Path(path), split))
    tables = [file for file in files if file.suffix in TABLES]
    if not tables:
        raise UserError(f"{path} must hold .jsonl or .parquet files of instructions, holds none")
    for file in tables:
        yield from read_rows(file)


def conversation(row: Any, where: str) -> Messages:
    """Return a row's messages: its "messages", or its "instruction" (with its "input") and "output"."""
    if not isinstance(row, dict):
        raise UserError(f'{where} must be an object with "instruction" and "output", or "messages"; got {row!r:.60}')
    messages = row.get("messages")
    if messages is None:
        texts = {"instruction": row.get("instruction"), "output": row.get("output"), "input": row.get("input") or ""}
        missing = [key for key, text in texts.items() if not isinstance(text, str)]
        if missing:
            raise UserError(
                f'{where} must have "instruction" and "output" texts, or "messages"; {missing[0]!r} is missing or not '
                f"text, of {sorted(row)}"
            )
        question = "\n".join(filter(None, [row["instruction"], row.get("input")]))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    well_formed = isinstance(messages, list) and all(
        isinstance(each, dict) and each.get("role") in ROLES and isinstance(each.get("content"), str)
        for each in messages
    )
    if not well_formed or not any(each["role"] == "assistant" for each in messages):
        raise UserError(
            f'{where}: each of "messages" must have a "role", one of {", ".join(ROLES)}, and text as "content", and '
            "one must be the assistant's"
        )
    for each in messages:
        try:
            each["content"].encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer accepts
            raise UserError(f"{where}: a text must be valid Unicode, has half a surrogate pair: correct it") from error
    return messages


# ---- Rows and batches


def rows_of_epoch(lengths: np.ndarray, order: np.ndarray, packing: bool, room: int) -> list[list[int]]:
    """Distribute examples of `lengths` inputs to rows, in order: one per row, or as many as fit in `room` inputs."""
    if not packing:
        return [[int(i)] for i in order]
    rows, used = [], room
    for i in order:
        if used + lengths[i] > room:
            rows.append([])
            used = 0
        rows[-1].append(int(i))
        used += lengths[i]
    return rows


def to_batch(rows: list[list[Example]], packing: bool, room: int) -> Batch:
    """Return inputs (b, T) and labels (b, T), one token later and ignored outside responses.

    T is the longest row's, rounded up; of packed rows it is `room`. These also have "positions" (b, T), which restart
    with each example: by them Llama.model restricts attention to an example.
    """
    longest = max(sum(len(example.tokens) - 1 for example in row) for row in rows)
    length = room if packing else min(-(-longest // WIDTH) * WIDTH, room)
    inputs, labels = torch.zeros(len(rows), length, dtype=torch.int64), torch.full((len(rows), length), IGNORE_INDEX)
    positions = torch.arange(length).repeat(len(rows), 1)
    for row, examples in enumerate(rows):
        start = 0
        for tokens, trained in examples:
            here = slice(start, start := start + len(tokens) - 1)
            inputs[row, here] = torch.from_numpy(tokens[:-1])
            labels[row, here] = torch.from_numpy(np.where(trained[1:], tokens[1:], IGNORE_INDEX))
            positions[row, here] = torch.arange(len(tokens) - 1)
        positions[row, start:] = torch.arange(length - start)
    return {"input": inputs, **({"positions": positions} if packing else {})}, labels


class Loader(BaseDataLoader):
    """The endless batches of one rank; the state is the position that all ranks share."""

    def __init__(self, examples: list[Example], settings: JobConfig, rank: int, ranks: int):
        self._examples, self._settings, self._rank, self._ranks = examples, settings, rank, ranks
        self._lengths = np.array([len(example.tokens) - 1 for example in examples])
        self.load_state_dict({"epoch": 0, "row": 0})

    def __iter__(self) -> Iterator[Batch]:
        training, packing = self._settings.training, self._settings.fine_tuning.packing
        while True:
            rows = [self._next() for _ in range(self._ranks * training.local_batch_size)]
            mine = [[self._examples[i] for i in row] for row in rows[self._rank :: self._ranks]]
            yield to_batch(mine, packing, training.seq_len)

    def _next(self) -> list[int]:
        if self._row == len(self._rows):
            self.load_state_dict({"epoch": self._epoch + 1, "row": 0})
        self._row += 1
        return self._rows[self._row - 1]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "row": self._row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._row = state["epoch"], state["row"]
        order = np.random.default_rng([self._settings.debug.seed, self._epoch]).permutation(len(self._examples))
        packing, room = self._settings.fine_tuning.packing, self._settings.training.seq_len
        self._rows = rows_of_epoch(self._lengths, order, packing, room)


def build_loader(dp_world_size: int, dp_rank: int, tokenizer: Tokenizer, job_config: JobConfig) -> Loader:
    """Return the training batches of one data-parallel rank."""
    return Loader(read_examples(tokenizer, job_config, "train"), job_config, dp_rank, dp_world_size)


def validation_rows(tokenizer: Tokenizer, job_config: JobConfig, mine: slice) -> list[Batch]:
    """Return one rank's batches of the validation set's first `windows` examples, one per row.

    Raises UserError if the set holds fewer.
    """
    validation, training = job_config.validation, job_config.training
    examples = read_examples(tokenizer, job_config, "validation")
    if len(examples) < validation.windows:
        raise UserError(
            f"validation.windows must be at most the {len(examples)} examples that "
            f"{validation.dataset_path or validation.dataset} holds for validation; got {validation.windows}"
        )
    rows = [[example] for example in examples[: validation.windows][mine]]
    size = validation.local_batch_size
    packing = job_config.fine_tuning.packing  # the model then needs positions
    return [to_batch(rows[start : start + size], packing, training.seq_len) for start in range(0, len(rows), size)]
