"""Corpora on disk: writing them, and reading batches and validation windows.

A corpus is a folder of token files, train.bin and val.bin (raw little-endian uint16 or uint32, each text followed by an
end-of-text token), and meta.json:

    {"tokenizer": "bytes", "vocab_size": 257, "dtype": "uint16", "source": "stdlib",
     "files": {"train.bin": {"tokens": 9, "text_bytes": 8, "sha256": "..."}, "val.bin": {...}}}
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common import BadValue, UserError, one_line, progress
from common.json_files import read_object
from common.whole import written_aside

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FILE = {"tokens": int, "text_bytes": int, "sha256": str}
META = {"tokenizer": str, "vocab_size": int, "dtype": str, "files": {"train.bin?": FILE, "val.bin?": FILE}}
END_OF_TEXT = "<|endoftext|>"  # GPT-2's name for it


@dataclass(frozen=True)
class TokenFile:
    """One split: tokens (n,) memory-mapped, and UTF-8 bytes of text per token, for bits per byte."""

    path: Path
    tokens: np.ndarray
    bytes_per_token: float

    def __len__(self) -> int:
        return len(self.tokens)


class Encoded(NamedTuple):
    """Tokens (n,) to write, and the number of UTF-8 bytes of their text."""

    tokens: np.ndarray
    text_bytes: int


# ---- Reading


def tokenizer(name: str) -> Any:
    """Return the tiktoken Encoding of a corpus: "bytes" (256 bytes and end-of-text) or "gpt2".

    Raises FileNotFoundError if gpt2's merges are not in tiktoken's cache and cannot be downloaded.
    """
    import tiktoken  # training does not need it

    if name == "bytes":
        ranks = {bytes([value]): value for value in range(256)}
        lines = r"[^\n]*\n|[^\n]+"  # without merges any pattern gives the same tokens; lines are fast
        return tiktoken.Encoding(
            name, pat_str=lines, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256}, explicit_n_vocab=257
        )
    if name != "gpt2":
        raise BadValue(f"the tokenizer must be 'bytes' or 'gpt2', got {name!r}")
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:  # the errors of `requests` are OSErrors
        raise FileNotFoundError(
            f"tiktoken's gpt2 is not in its cache and cannot be downloaded ({one_line(error)[:200]}): where there is "
            "internet, run "
            "`TIKTOKEN_CACHE_DIR=FOLDER python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\"`, then copy "
            "FOLDER here and set TIKTOKEN_CACHE_DIR to it; or use --tokenizer bytes"
        ) from error


def read_meta(folder: str | Path) -> dict:
    """Read a corpus' meta.json; raises FileNotFoundError if it is missing, UserError if it is damaged."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        source = path.parent.name if path.parent.name in ("stdlib", "openwebtext") else "FILE_OR_FOLDER"
        command = f"python -m nanoGPT.prepare {source} --out {path.parent}"
        raise FileNotFoundError(f"{path.parent} holds no corpus (no meta.json): run `{command}`")
    remedy = f"remove {path.parent} and run `python -m nanoGPT.prepare` again"
    meta = read_object(path, META, remedy)
    if meta["vocab_size"] < 1 or meta["dtype"] not in ("uint16", "uint32"):
        got = f"{meta['vocab_size']} and {meta['dtype']}"
        raise UserError(f"{path} must hold a positive vocab_size and dtype uint16 or uint32, got {got}: {remedy}")
    return meta


def load(folder: str | Path, split: str, *, verify: bool = True) -> TokenFile:
    """Memory-map the "train" or the "val" tokens of a corpus.

    verify: also compare the file's SHA-256 with meta.json's (about a second per GB).
    Raises FileNotFoundError if the file is missing, ValueError if it is empty or differs from meta.json.
    """
    meta, path = read_meta(folder), Path(folder) / f"{split}.bin"
    remedy = f"remove {path.parent} and run `python -m nanoGPT.prepare` again"
    if path.name not in meta["files"] or not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {remedy}")
    entry, dtype = meta["files"][path.name], np.dtype(meta["dtype"]).newbyteorder("<")
    if entry["tokens"] < 1:
        raise BadValue(f"{path} must hold tokens, is empty: prepare more text, or another --val-fraction")
    if path.stat().st_size != entry["tokens"] * dtype.itemsize:
        expected = f"{entry['tokens']} tokens of {dtype.itemsize} bytes"
        raise BadValue(f"{path} must hold {expected}, is {path.stat().st_size} bytes long: {remedy}")
    if verify and sha256(path) != entry["sha256"]:
        raise BadValue(f"{path} must have the SHA-256 that meta.json records, has another: {remedy}")
    return TokenFile(path, np.memmap(path, dtype, mode="r"), entry["text_bytes"] / entry["tokens"])


def sha256(path: Path) -> str:
    """Hash a file, block by block."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def padded_vocabulary(meta: dict, multiple: int = 64) -> int:
    """Round a corpus' vocabulary up to a multiple that is fast on GPUs: GPT-2's 50,257 becomes 50,304."""
    return -(-meta["vocab_size"] // multiple) * multiple


def fit_vocabulary(shape: Any, meta: dict) -> Any:
    """Replace a model config's vocabulary of 0 by the corpus', padded."""
    return shape if shape.vocab_size else replace(shape, vocab_size=padded_vocabulary(meta))


def check_vocabulary(meta: dict, vocab_size: int) -> None:
    """Raise ValueError if the model's vocabulary is smaller than the corpus'."""
    if vocab_size < meta["vocab_size"]:
        raise BadValue(
            f"the corpus' {meta['tokenizer']} tokens need a vocabulary of {meta['vocab_size']}, the model has "
            f"{vocab_size}: raise the model's vocab_size (0 fits it to the corpus), or use another corpus"
        )


def batch(
    tokens: TokenFile,
    *,
    seed: int,
    step: int,
    sequences: slice,
    global_batch: int,
    context: int,
    device: "torch.device | str" = "cpu",
) -> "tuple[Tensor, Tensor]":
    """Draw the rows `sequences` of a step's global batch: inputs (b, T) and targets (b, T), int64.

    (seed, step) determines the windows of the global batch, so that it depends neither on the number of ranks and
    micro-batches nor on a resume.
    """
    offsets = batch_offsets(tokens, seed, step, global_batch, context)
    return windows(tokens, offsets[sequences], context, device)


def batch_offsets(tokens: TokenFile, seed: int, step: int, global_batch: int, context: int) -> np.ndarray:
    """Draw the offsets of the windows of a step's global batch: (global_batch,)."""
    check_length(tokens, context)
    return np.random.default_rng([seed, step]).integers(len(tokens) - context, size=global_batch)


def read_batches(
    tokens: TokenFile,
    steps: Iterable[int],
    pieces: Sequence[slice],
    *,
    seed: int,
    global_batch: int,
    context: int,
    device: "torch.device | str" = "cpu",
) -> "Iterator[tuple[Tensor, Tensor]]":
    """Yield the `batch` of each of these pieces of each step, while a thread reads the next one."""
    import torch

    from common.read_ahead import read_ahead  # imports torch, as above

    def read(step_and_piece: tuple[int, slice]) -> "Tensor":
        step, sequences = step_and_piece
        offsets = batch_offsets(tokens, seed, step, global_batch, context)[sequences]
        return torch.from_numpy(window_rows(tokens, offsets, context))

    for rows in read_ahead(read, itertools.product(steps, pieces), device=device):
        yield inputs_and_targets(rows, device)


def validation_windows(tokens: TokenFile, *, count: int, context: int) -> np.ndarray:
    """Spread `count` windows evenly over a file, without overlap (fewer in a short one): offsets (count,)."""
    check_length(tokens, context)
    available = (len(tokens) - 1) // context
    count = min(count, available)
    return np.arange(count) * available // count * context


def windows(
    tokens: TokenFile, offsets: Sequence[int] | np.ndarray, context: int, device: "torch.device | str" = "cpu"
) -> "tuple[Tensor, Tensor]":
    """Return inputs (b, T) from each offset, and targets (b, T), one token later; int64."""
    import torch  # takes seconds, and preparing a corpus does not need it

    rows = torch.from_numpy(window_rows(tokens, offsets, context))
    return inputs_and_targets(rows.pin_memory() if torch.device(device).type == "cuda" else rows, device)


def window_rows(tokens: TokenFile, offsets: Sequence[int] | np.ndarray, context: int) -> np.ndarray:
    """Return T + 1 tokens from each offset: (b, T + 1) int64."""
    rows = np.stack([tokens.tokens[offset : offset + context + 1] for offset in offsets])
    return rows.astype(np.int64)


def inputs_and_targets(rows: "Tensor", device: "torch.device | str") -> "tuple[Tensor, Tensor]":
    """Move windows (b, T + 1) to a device and split them; the copy of pinned rows is asynchronous."""
    rows = rows.to(device, non_blocking=True)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def check_length(tokens: TokenFile, context: int) -> None:
    """Raise ValueError if a file is shorter than one window."""
    if len(tokens) <= context:
        raise BadValue(
            f"{tokens.path} must hold a window of context + 1 = {context + 1} tokens, holds {len(tokens)}: "
            "prepare more text or lower the model's context"
        )


# ---- Writing


def write_corpus(folder: Path, splits: dict[str, Iterable[Encoded]], described: dict) -> dict:
    """Write a corpus atomically; returns its meta.json, with the fields of `described` (tokenizer, source, ...).

    An older folder of that name is replaced. Raises ValueError if a split is empty.
    """
    vocab_size = tokenizer(described["tokenizer"]).n_vocab
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    with written_aside(folder) as partial:
        files = {f"{name}.bin": write_split(partial / f"{name}.bin", splits[name], dtype) for name in splits}
        meta = described | {"vocab_size": vocab_size, "dtype": dtype, "files": files}
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return meta


def write_split(path: Path, encoded: Iterable[Encoded], dtype: str) -> dict:
    """Write one token file, with a progress bar; returns its entry in meta.json."""
    digest, tokens, text_bytes = hashlib.sha256(), 0, 0
    with path.open("wb") as file, progress(desc=path.name, unit=" tokens", unit_scale=True) as bar:
        for block in encoded:
            data = block.tokens.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
            file.write(data)
            digest.update(data)
            tokens, text_bytes = tokens + len(block.tokens), text_bytes + block.text_bytes
            bar.update(len(block.tokens))
    if not text_bytes:  # documents without text still have an end-of-text
        raise BadValue(f"{path.name} needs text, got none of the source: add text or change --val-fraction")
    return {"tokens": tokens, "text_bytes": text_bytes, "sha256": digest.hexdigest()}
