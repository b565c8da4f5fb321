"""Prepare text and a tokenizer for a small Llama, from local files.

    python -m Llama.prepare stdlib                              # this Python's standard library, into data/llama_stdlib
    python -m Llama.prepare notes/ --out data/notes --vocab-size 8192
    python -m Llama.prepare Llama/train_configs/stdlib.toml     # the data of that config, if embedded

The folder holds train.jsonl and val.jsonl, with {"text": ...} per line, and a byte-level BPE trained on the former:
tokenizer.json and tokenizer_config.json. Texts are cut into documents of some thousand characters, since lanes read
whole documents (see Llama/data.py) and long ones would correlate successive batches. The folder is written atomically;
an existing one that is up to date is kept.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from common import BadValue, progress
from common.corpus import (
    FileSpan,
    fingerprint,
    is_readable,
    library_files,
    local_files,
    pieces,
    split_files,
)
from common.guard import main_guard
from common.json_files import read_object
from common.options import parse_options
from common.whole import locked, written_aside
from Llama import arithmetic

BEGIN, END = "<s>", "</s>"  # Llama-2's names
META = "meta.json"
STDLIB = Path("data/llama_stdlib")
MOST = 10_000_000  # of tokens, and of a document's characters


@dataclass(frozen=True)
class Prepare:
    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
    """stdlib (this Python's standard library), or a file or folder of text, .jsonl and .parquet."""
    out: Path | None = None
    """Folder to write; by default data/llama_NAME, after the source."""
    vocab_size: int = 4096
    """Largest number of tokens of the BPE; the default is that of the flavor debug."""
    val_fraction: float = 0.05
    """Fraction held out for validation; the same files as nanoGPT's."""
    document_length: int = 4096
    """Characters per document; longer texts are cut at the next end of line."""


def prepare(config: Prepare) -> Path:
    """Prepare the requested folder unless it is up to date; returns it."""
    folder = config.out or Path("data", f"llama_{Path(config.source).resolve().stem}")
    if not 0 < config.val_fraction < 1:
        raise BadValue(f"--val-fraction must be between 0 and 1, got {config.val_fraction}")
    if not 258 <= config.vocab_size <= MOST:
        raise BadValue(f"--vocab-size must be 258 (bytes and two special tokens) to {MOST}, got {config.vocab_size}")
    if not 1 <= config.document_length <= MOST:
        raise BadValue(f"--document-length must be 1 to {MOST}, got {config.document_length}")
    root, files = library_files() if config.source == "stdlib" else local_files(Path(config.source).resolve())
    request = {**asdict(config), "out": None, "content": fingerprint(root, files)}
    with locked(folder):
        if is_up_to_date(folder, request):
            print(f"{folder} is up to date")
            return folder
        readable = [file for file in files if is_readable(file)]
        if not readable:
            raise BadValue(f"{config.source} must hold UTF-8 text or .parquet, has none: convert it (iconv -t utf-8)")
        spans = split_files(root, readable, config.val_fraction)
        with written_aside(folder) as partial:
            counts = {
                name: write_texts(partial / f"{name}.jsonl", spans[name], config.document_length) for name in spans
            }
            if not all(counts.values()):
                raise BadValue(
                    f"{config.source} must hold text for training and for validation, has {counts['train']} documents "
                    f"and {counts['val']}: add text, or change --val-fraction"
                )
            size = write_tokenizer(partial, texts(spans["train"]), config.vocab_size)
            (partial / META).write_text(json.dumps({**request, "documents": counts, "tokens": size}, indent=2) + "\n")
    print(f"{folder}: {counts['train']:,} documents for training, {counts['val']:,} for validation, {size:,} tokens")
    return folder


def is_up_to_date(folder: Path, request: dict) -> bool:
    """Return whether the folder is the requested one; raises ValueError if it holds something else."""
    if not folder.exists():
        return False
    if not (folder / META).is_file():
        raise BadValue(f"{folder} must be new, or made by Llama.prepare; it has no {META}: choose another --out")
    meta = read_object(folder / META)
    for key in ("source", "vocab_size", "val_fraction", "document_length"):
        if meta.get(key) != request[key]:
            raise BadValue(
                f"{folder} was made with {key} = {meta.get(key)}, requested is {request[key]}: remove it or choose "
                "another --out"
            )
    return meta.get("content") == request["content"]


def texts(spans: list[FileSpan]) -> Iterator[str]:
    """Yield the texts of spans of files."""
    for span in spans:
        for text, _ in pieces(span):
            yield text


def cut(text: str, length: int) -> Iterator[str]:
    """Cut a text at the first end of line after every `length` characters."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + length - 1) + 1 or len(text)
        yield text[start:stop]
        start = stop


def write_texts(path: Path, spans: list[FileSpan], length: int) -> int:
    """Write documents as JSON lines, with a progress bar; returns their number."""
    count = 0
    documents = (piece for text in texts(spans) for piece in cut(text, length))
    with path.open("w", encoding="utf-8") as file:
        for document in progress(documents, desc=path.name, unit=" documents"):
            file.write(json.dumps({"text": document}) + "\n")
            count += 1
    return count


def write_tokenizer(folder: Path, documents: Iterator[str], vocab_size: int) -> int:
    """Train a byte-level BPE and write it in Hugging Face's format; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # here: --help does not need them

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n")
    return tokenizer.get_vocab_size()


def main() -> None:
    if sys.argv[1:] and sys.argv[1].endswith(".toml"):
        from Llama.config import parse_config  # here: torchtitan takes seconds to import

        settings = parse_config()
        if Path(settings.model.hf_assets_path) == STDLIB:
            prepare(Prepare("stdlib", out=STDLIB))
        if settings.training.dataset_path == str(arithmetic.FOLDER):
            arithmetic.make(arithmetic.Options())
        return
    prepare(parse_options(Prepare, "python -m Llama.prepare", __doc__))


if __name__ == "__main__":
    main_guard(main)
