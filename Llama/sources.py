"""Training documents: local files, or a stream of C4, each with a position to resume from."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node

from common import UserError, one_line, warn
from common.corpus import TABLES, fingerprint, local_files
from common.launch import process_rank
from common.text_rows import text_of, texts

Source = datasets.Dataset | datasets.IterableDataset

# The split "validation" of a folder that Llama.prepare wrote is this file; the rest is for training.
SPLIT_FILES = {"train": "train.jsonl", "validation": "val.jsonl"}
NO_TEXT = "{} must hold text, has none: add text, or name another file"


class Documents(Protocol):
    """The endless texts of one lane, and the position in them."""

    epoch: int

    def __next__(self) -> str: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class LocalDocuments:
    """Documents of a local data set; the order of each epoch is drawn from (seed, epoch)."""

    def __init__(self, source: datasets.Dataset, lane: int, lanes: int, seed: int):
        self._source, self._first, self._stride, self._seed = source, lane, lanes, seed
        self.load_state_dict({"epoch": 0, "taken": 0})

    def __next__(self) -> str:
        if self._taken == len(self._order):
            self.load_state_dict({"epoch": self.epoch + 1, "taken": 0})
        self._taken += 1
        return self._source[int(self._order[self._taken - 1])]["text"]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self._taken = state["epoch"], state["taken"]
        order = np.random.default_rng([self._seed, self.epoch]).permutation(len(self._source))
        self._order = order[self._first :: self._stride]


class StreamedDocuments:
    """Documents of a data set read over the network, in its own order."""

    def __init__(self, source: datasets.IterableDataset, lane: int, lanes: int):
        self._source = split_dataset_by_node(source, lane, lanes)
        self._rows = iter(self._source)
        self._loaded: dict[str, Any] | None = None  # until the first row, for which datasets reports the start

    @property
    def epoch(self) -> int:
        """Number of completed passes over the documents."""
        return self._source.epoch

    def __next__(self) -> str:
        row = next(self._rows, None)
        if row is None:
            self._source.set_epoch(self.epoch + 1)
            self._rows = iter(self._source)
            row = next(self._rows, None)
        if row is None:
            raise UserError("the stream must hold a document for each lane, holds fewer: lower training.lanes")
        self._loaded = None
        return text_of(row["text"], "a row of the stream")

    def state_dict(self) -> dict[str, Any]:
        """Return the position, JSON-serializable."""
        return deepcopy(self._loaded) or self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        self._loaded = deepcopy(state)
        self._source.load_state_dict(state)
        self._source.set_epoch(state["epoch"])
        self._rows = iter(self._source)


# ---- Data sets


def read(source: Source, lane: int, lanes: int, seed: int) -> Documents:
    """Return the documents of one lane of a data set."""
    if isinstance(source, datasets.Dataset):
        return LocalDocuments(source, lane, lanes, seed)
    return StreamedDocuments(source, lane, lanes)


def open_source(name: str, path: str | None, split: str) -> Source:
    """Open "c4" as a stream from the Hub (or its copy at `path`), or the "text" of local files.

    Raises UserError for another name, an unreachable hub, and files that are missing or without text.
    """
    datasets.disable_progress_bars()
    if name in ("c4", "c4_validation"):
        return open_c4(path or "allenai/c4", split)
    if name != "text":
        raise UserError(f"the data set must be c4 or text, got {name!r}; your own files are text")
    if path is None:
        raise UserError("the data set text needs its files; set training.dataset_path and validation.dataset_path")
    return open_text(Path(path), split)


def open_c4(path: str, split: str) -> datasets.IterableDataset:
    """Stream C4's English part, from a folder or from the Hub."""
    if Path(path).is_dir():  # by file names: the data set's README.md, which lists them, is often not copied
        pattern = f"en/c4-{split}.*.json.gz"  # from that README
        files = [str(file) for file in sorted(Path(path).glob(pattern))]
        if not files:
            raise UserError(f"the copy of C4 in {path} must hold {pattern}, has none: copy them, or name its folder")
        try:
            return datasets.load_dataset("json", data_files=files, split="train", streaming=True)
        except Exception as error:  # of gzip, JSON or pyarrow: no narrower common class
            raise UserError(
                f"the copy of C4 in {path} must hold whole files; they cannot be read ({one_line(error)[:200]}): copy "
                "them again"
            ) from error
    try:
        return datasets.load_dataset(path, name="en", split=split, streaming=True)
    except Exception as error:  # Hub errors have no narrower common class
        raise UserError(
            f"c4 ({path}) cannot be opened ({one_line(error)[:200]}): where there is no internet, set dataset_path to "
            "a copy of the data set, or train on local files (dataset text)"
        ) from error


def split_of(path: Path, split: str) -> Path:
    """Return a folder's file of one split, or `path` without split files; raises UserError if only the other exists."""
    present = [name for name in SPLIT_FILES.values() if (path / name).is_file()]
    if present and SPLIT_FILES[split] not in present:
        raise UserError(
            f"{path} must have {SPLIT_FILES[split]} beside {present[0]}, has none: add it, or name another folder or "
            f"file as {'training' if split == 'train' else 'validation'}.dataset_path"
        )
    return path / SPLIT_FILES[split] if present else path


def open_text(path: Path, split: str) -> datasets.Dataset:
    """Open a file, a folder of files, or one that Llama.prepare wrote."""
    root, files = local_files(split_of(path, split))
    tables = [file for file in files if file.suffix in TABLES]
    names = [str(file) for file in tables or files]
    if len(names) < len(files) and process_rank() == 0:
        warn(f"{path}: {len(files) - len(names)} files other than {' and '.join(TABLES)} skipped")
    try:
        if not tables:
            if not any(file.stat().st_size for file in files):
                raise UserError(NO_TEXT.format(path))
            return datasets.load_dataset("text", data_files=names, split="train", sample_by="document")
        # The cache's key is the arguments: `content` makes it depend on changes of the files.
        rows = {"names": names, "content": fingerprint(root, tables)}
        features = datasets.Features({"text": datasets.Value("string")})
        return datasets.Dataset.from_generator(rows_of, features=features, gen_kwargs=rows)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):  # from rows_of, with file and row
            raise cause from None
        raise UserError(f"{path} must hold text: {one_line(cause)[:200]}") from error


def rows_of(names: list[str], content: str) -> Iterator[dict[str, str]]:
    """Yield the rows of .jsonl and .parquet files in order; raises UserError if none has text."""
    empty = True
    for name in names:
        for text in texts(Path(name)):
            empty = empty and not text
            yield {"text": text}
    if empty:
        raise UserError(NO_TEXT.format(", ".join(names)))
