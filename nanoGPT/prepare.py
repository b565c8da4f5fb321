"""Turn text into a corpus of tokens that nanoGPT.train reads.

    python -m nanoGPT.prepare stdlib                      # this Python's standard library: seconds, no download
    python -m nanoGPT.prepare openwebtext --workers 16    # the corpus of the GPT-2 configs: 17 GB of tokens
    python -m nanoGPT.prepare novel.txt --out data/novel  # a file, or a folder of text, .jsonl and .parquet
    python -m nanoGPT.prepare nanoGPT/configs/stdlib.toml # the corpus of that config, if it is one of the first two

The corpus (see nanoGPT/data.py) appears once it is whole; one that is already there is left alone.
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

from common import one_line
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
OPENWEBTEXT_DOCUMENTS = 8_013_769  # in the whole set, as nanoGPT's data/openwebtext/prepare.py counts them
MOST_WORKERS = 1024  # each holds 16 pieces of text of up to 4 MiB


@dataclass(frozen=True)
class Prepare:
    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
    """stdlib (this Python's standard library), openwebtext (of the Hugging Face Hub), or a file or folder."""
    out: Path | None = None
    """The folder to make; by default data/NAME, after the source."""
    tokenizer: Literal["bytes", "gpt2"] | None = None
    """bytes: 256 and an end-of-text, no download. gpt2: tiktoken's, the default for openwebtext only."""
    val_fraction: float | None = None
    """The part kept for validation; by default 0.05, and 0.0005 of openwebtext, as in nanoGPT."""
    workers: int = os.cpu_count() or 1
    """How many threads (for openwebtext, processes) encode."""


def encode(parts: list[FileSpan], name: str, workers: int) -> Iterator[Encoded]:
    """Encode parts of files in order, on threads: tiktoken works without Python's lock."""
    encoding = tokenizer(name)
    end_of_text = np.array([encoding.eot_token], dtype=np.uint32)

    def encode_piece(piece: tuple[str, bool]) -> Encoded:
        text, ends = piece
        tokens = encoding.encode_to_numpy(text, disallowed_special=())  # "<|endoftext|>" in a text is text
        return Encoded(np.append(tokens, end_of_text) if ends else tokens, len(text.encode()))

    stream = (piece for part in parts for piece in pieces(part))
    with ThreadPoolExecutor(workers) as pool:
        while group := list(islice(stream, 16 * workers)):  # by groups: `map` would first read everything
            yield from pool.map(encode_piece, group)


# ---- The Hugging Face Hub


def load_openwebtext() -> Any:
    """Fetch OpenWebText, or find it below HF_HOME: a datasets.Dataset with the column "text"."""
    import datasets  # slow to import, and only needed here

    try:
        try:
            return datasets.load_dataset(OPENWEBTEXT, split="train")
        except RuntimeError:  # it is a loading script, which datasets 4 refuses; the Hub keeps a converted copy
            return datasets.load_dataset(OPENWEBTEXT, revision="refs/convert/parquet", split="train")
    except Exception as error:  # the Hub's failures share no narrower class
        raise ConnectionError(
            f"{OPENWEBTEXT} cannot be opened, from the Hugging Face cache or the Hub ({one_line(error)[:200]}): copy "
            "the cache of a machine that has it here and set HF_HOME to it, or give as the source a folder of "
            "its .parquet, .jsonl or .txt files"
        ) from error


def encode_rows(rows: dict[str, list], numbers: list[int], name: str) -> dict[str, list]:
    """Encode documents, each with its end-of-text; Dataset.map calls this in its processes."""
    encoding = tokenizer(name)
    # numbers: of the rows in the part; the shuffle has lost their place in the whole.
    texts = [text_of(row, f"{OPENWEBTEXT}, shuffled row {n}") for n, row in zip(numbers, rows["text"], strict=True)]
    tokens = [encoding.encode_ordinary(text) + [encoding.eot_token] for text in texts]
    return {"tokens": tokens, "text_bytes": [len(text.encode()) for text in texts]}


def encode_dataset(dataset: Any, name: str, val_fraction: float, workers: int) -> dict[str, Iterator[Encoded]]:
    """Split a Dataset as nanoGPT splits OpenWebText (its seed too), encode it, and read it back by blocks."""
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
    """Tell whether a corpus is the requested one; raises ValueError where another corpus would be lost."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "meta.json").is_file():
        raise ValueError(f"--out must be a new folder or a corpus, {folder} is neither: choose another --out")
    meta = read_meta(folder)
    for key in ("source", "tokenizer", "val_fraction"):
        if meta.get(key) != request[key]:
            found = f"{folder} holds a corpus with {key} = {meta.get(key)}"
            raise ValueError(f"{found}, asked for is {request[key]}: remove it or choose another --out")
    try:
        for split in ("train", "val"):
            load(folder, split, verify=False)
    except (FileNotFoundError, ValueError):
        return False  # files are missing or cut short: to be made again
    return meta.get("content") == request["content"]


def prepare(config: Prepare, load_hub: Callable[[], Any] = load_openwebtext) -> Path:
    """Make the corpus that is asked for unless it is there, and return its folder.

    load_hub: gives the datasets.Dataset that `openwebtext` stands for.
    """
    hub, path = config.source == "openwebtext", Path(config.source).resolve()
    named = config.source in NAMED
    folder = config.out or Path("data") / (config.source if named else path.stem)
    name = config.tokenizer or ("gpt2" if hub else "bytes")
    val_fraction = (0.0005 if hub else 0.05) if config.val_fraction is None else config.val_fraction
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val-fraction must be between 0 and 1, got {val_fraction}")
    if not 1 <= config.workers <= MOST_WORKERS:
        raise ValueError(f"--workers must be from 1 to {MOST_WORKERS}, got {config.workers}")

    root, files = (path, []) if hub else library_files() if named else local_files(path)
    request = {"source": config.source if named else str(path), "tokenizer": name, "val_fraction": val_fraction}
    request["content"] = fingerprint(root, files)
    with locked(folder):
        if is_up_to_date(folder, request):
            print(f"{folder} is up to date")
            return folder
        tokenizer(name)  # fails, if it must, before anything is downloaded
        readable = [file for file in files if is_readable(file)]
        if hub:
            splits = encode_dataset(load_hub(), name, val_fraction, config.workers)
        elif readable:
            parts = split_files(root, readable, val_fraction)
            splits = {split: encode(parts[split], name, config.workers) for split in parts}
        else:
            raise ValueError(f"{path} must hold UTF-8 text or .parquet, has none: convert it (iconv -t utf-8)")
        meta = write_corpus(folder, splits, request | {"skipped_files": len(files) - len(readable)})
    counts = ", ".join(f"{entry['tokens']:,} tokens in {file}" for file, entry in meta["files"].items())
    skipped = f"; {meta['skipped_files']} files skipped, which are not UTF-8" if meta["skipped_files"] else ""
    print(f"{folder}: {counts}, {name} vocabulary of {meta['vocab_size']}{skipped}")
    return folder


def prepare_for(settings: "Config") -> Path:
    """Make the corpus that a training config names, if it is one of those that have a name and is not there."""
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
