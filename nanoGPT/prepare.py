"""Tokenize text into a corpus for nanoGPT.train.

    python -m nanoGPT.prepare stdlib                      # this Python's standard library: seconds, no download
    python -m nanoGPT.prepare openwebtext --workers 16    # the corpus of the GPT-2 configs: 17 GB of tokens
    python -m nanoGPT.prepare novel.txt --out data/novel  # a file, or a folder of text, .jsonl and .parquet
    python -m nanoGPT.prepare nanoGPT/configs/stdlib.toml # the corpus of that config, if it is one of the first two

The corpus (see nanoGPT/data.py) is written atomically; an existing one that is up to date is kept.
"""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from common import BadValue, one_line
from common.corpus import FileSpan, fingerprint, is_readable, library_files, local_files, pieces, split_files
from common.guard import main_guard
from common.options import parse_options
from common.text_rows import require_key, text_of
from common.whole import locked
from nanoGPT.data import Encoded, load, read_meta, tokenizer, write_corpus

if TYPE_CHECKING:
    from nanoGPT.config import Config

NAMED = ("stdlib", "openwebtext")
OPENWEBTEXT = "Skylion007/openwebtext"  # on the Hugging Face Hub
OPENWEBTEXT_DOCUMENTS = 8_013_769  # of the full set, from nanoGPT's data/openwebtext/prepare.py
MOST_WORKERS = 1024  # each holds 16 pieces of text of up to 4 MiB


@dataclass(frozen=True)
class Prepare:
    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
    """stdlib (this Python's standard library), openwebtext (from the Hugging Face Hub), or a file or folder."""
    out: Path | None = None
    """Folder to write; by default data/NAME, after the source."""
    tokenizer: Literal["bytes", "gpt2"] | None = None
    """bytes: 256 and an end-of-text, no download. gpt2: tiktoken's, the default for openwebtext only."""
    val_fraction: float | None = None
    """Fraction held out for validation; by default 0.05, and 0.0005 for openwebtext, as in nanoGPT."""
    workers: int = os.cpu_count() or 1
    """Number of encoding threads (for openwebtext, processes)."""


def encode(spans: list[FileSpan], name: str, workers: int) -> Iterator[Encoded]:
    """Encode spans of files in order, on threads: tiktoken releases the GIL."""
    encoding = tokenizer(name)
    end_of_text = np.array([encoding.eot_token], dtype=np.uint32)

    def encode_piece(piece: tuple[str, bool]) -> Encoded:
        text, ends = piece
        tokens = encoding.encode_to_numpy(text, disallowed_special=())  # "<|endoftext|>" in a text is text
        return Encoded(np.append(tokens, end_of_text) if ends else tokens, len(text.encode()))

    stream = (piece for span in spans for piece in pieces(span))
    with ThreadPoolExecutor(workers) as pool:
        while group := list(islice(stream, 16 * workers)):  # in groups: `map` would read everything first
            yield from pool.map(encode_piece, group)


# ---- The Hugging Face Hub


def load_openwebtext() -> Any:
    """Return OpenWebText, from HF_HOME or the Hub: a datasets.Dataset with the column "text"."""
    import datasets  # slow to import, and only needed here

    try:
        try:
            return datasets.load_dataset(OPENWEBTEXT, split="train")
        except RuntimeError:  # it is a loading script, which datasets 4 refuses; the Hub keeps a converted copy
            return datasets.load_dataset(OPENWEBTEXT, revision="refs/convert/parquet", split="train")
    except Exception as error:  # Hub errors have no narrower common class
        raise ConnectionError(
            f"{OPENWEBTEXT} cannot be loaded from the cache or the Hub ({one_line(error)[:200]}): copy the "
            "cache of a machine that has it and set HF_HOME to it, or give as the source a folder of its .parquet, "
            ".jsonl or .txt files"
        ) from error


def encode_rows(rows: dict[str, list], numbers: list[int], name: str) -> dict[str, list]:
    """Encode documents, each with its end-of-text; Dataset.map calls this in its processes."""
    encoding = tokenizer(name)
    # numbers: rows of the split; after the shuffle their numbers in the data set are unknown.
    texts = [text_of(row, f"{OPENWEBTEXT}, shuffled row {n}") for n, row in zip(numbers, rows["text"], strict=True)]
    tokens = [encoding.encode_ordinary(text) + [encoding.eot_token] for text in texts]
    return {"tokens": tokens, "text_bytes": [len(text.encode()) for text in texts]}


def encode_dataset(dataset: Any, name: str, val_fraction: float, workers: int) -> dict[str, Iterator[Encoded]]:
    """Split a Dataset as nanoGPT splits OpenWebText (same seed), encode it, and read it back in blocks."""
    require_key(dataset.column_names, OPENWEBTEXT)
    print(f"{len(dataset):,} documents (all of {OPENWEBTEXT}: {OPENWEBTEXT_DOCUMENTS:,})")
    split = dataset.train_test_split(test_size=val_fraction, seed=2357, shuffle=True)

    def blocks(part: Any) -> Iterator[Encoded]:
        encoded = part.map(
            encode_rows,
            batched=True,
            with_indices=True,
            fn_kwargs={"name": name},
            remove_columns=part.column_names,
            num_proc=min(workers, len(part)),
            desc=f"encoding with {name}",
        )
        for block in encoded.with_format("arrow").iter(batch_size=1024):
            tokens = block["tokens"].combine_chunks().flatten().to_numpy()
            yield Encoded(tokens, sum(block["text_bytes"].to_pylist()))

    return {"train": blocks(split["train"]), "val": blocks(split["test"])}


# ---- The corpus


def is_up_to_date(folder: Path, request: dict) -> bool:
    """Return whether a corpus is the requested one; raises ValueError if another corpus would be overwritten."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "meta.json").is_file():
        raise BadValue(f"--out must be a new folder or a corpus, {folder} is neither: choose another --out")
    meta = read_meta(folder)
    for key in ("source", "tokenizer", "val_fraction"):
        if meta.get(key) != request[key]:
            found = f"{folder} holds a corpus with {key} = {meta.get(key)}"
            raise BadValue(f"{found}, requested is {request[key]}: remove it or choose another --out")
    try:
        for split in ("train", "val"):
            load(folder, split, verify=False)
    except (FileNotFoundError, ValueError):
        return False  # files are missing or truncated: prepared again
    return meta.get("content") == request["content"]


def prepare(config: Prepare, load_hub: Callable[[], Any] = load_openwebtext) -> Path:
    """Prepare the requested corpus unless it is up to date; returns its folder.

    load_hub: returns the datasets.Dataset of `openwebtext`.
    """
    hub, path = config.source == "openwebtext", Path(config.source).resolve()
    named = config.source in NAMED
    folder = config.out or Path("data") / (config.source if named else path.stem)
    name = config.tokenizer or ("gpt2" if hub else "bytes")
    val_fraction = (0.0005 if hub else 0.05) if config.val_fraction is None else config.val_fraction
    if not 0 < val_fraction < 1:
        raise BadValue(f"--val-fraction must be between 0 and 1, got {val_fraction}")
    if not 1 <= config.workers <= MOST_WORKERS:
        raise BadValue(f"--workers must be from 1 to {MOST_WORKERS}, got {config.workers}")

    root, files = (path, []) if hub else library_files() if named else local_files(path)
    request = {"source": config.source if named else str(path), "tokenizer": name, "val_fraction": val_fraction}
    request["content"] = fingerprint(root, files)
    with locked(folder):
        if is_up_to_date(folder, request):
            print(f"{folder} is up to date")
            return folder
        tokenizer(name)  # if unavailable it fails before any download
        readable = [file for file in files if is_readable(file)]
        if hub:
            splits = encode_dataset(load_hub(), name, val_fraction, config.workers)
        elif readable:
            spans = split_files(root, readable, val_fraction)
            splits = {split: encode(spans[split], name, config.workers) for split in spans}
        else:
            raise BadValue(f"{path} must hold UTF-8 text or .parquet, has none: convert it (iconv -t utf-8)")
        meta = write_corpus(folder, splits, request | {"skipped_files": len(files) - len(readable)})
    counts = ", ".join(f"{entry['tokens']:,} tokens in {file}" for file, entry in meta["files"].items())
    skipped = f"; {meta['skipped_files']} files that are not UTF-8 skipped" if meta["skipped_files"] else ""
    print(f"{folder}: {counts}, {name} vocabulary of {meta['vocab_size']}{skipped}")
    return folder


def prepare_for(settings: "Config") -> Path:
    """Prepare a training config's corpus if it is missing and named stdlib or openwebtext; returns its folder."""
    folder = Path(settings.data.folder)
    try:
        for split in ("train", "val"):
            load(folder, split, verify=False)
    except FileNotFoundError:
        if folder.name not in NAMED:
            raise
        return prepare(Prepare(folder.name, out=folder))
    return folder


def main() -> None:
    if sys.argv[1:] and sys.argv[1].endswith(".toml"):
        from common.config import parse_config
        from nanoGPT.config import Config

        prepare_for(parse_config(Config))
        return
    prepare(parse_options(Prepare, "python -m nanoGPT.prepare", __doc__))


if __name__ == "__main__":
    main_guard(main)
