"""Batches of packed text whose order does not depend on the number of ranks, and whose position is saved.

The documents are dealt to `lanes`, document d to lane d mod lanes. Each lane puts its documents one after the other,
between begin and end tokens, and cuts them into windows of T + 1 tokens. Window n of the run comes from lane
n mod lanes; step s takes the windows from s x global batch on, and rank r of W those with n mod W = r. So W may be any
divisor of the lanes, may change when a run resumes, and the batches stay.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer

from common import UserError, one_line, warn
from common.corpus import TABLES, fingerprint, local_files
from common.launch import process_rank
from common.text_rows import text_of, texts
from Llama.checks import shape_of
from Llama.config import JobConfig
from Llama.tokenizer import Tokenizer

Batch = tuple[dict[str, Tensor], Tensor]  # {"input": (b, T)}, labels (b, T), int64, as torchtitan wants them
Source = datasets.Dataset | datasets.IterableDataset

# The split "validation" of a folder that Llama.prepare wrote is this file; the rest is for training.
SPLIT_FILES = {"train": "train.jsonl", "validation": "val.jsonl"}
NO_TEXT = "{} must hold text, has none: add text, or name another file"


class Documents(Protocol):
    """The texts of one lane, without end, and the position in them."""

    epoch: int

    def __next__(self) -> str: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class LocalDocuments:
    """Documents of a data set on disk, in an order that is drawn anew from (seed, epoch)."""

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
    """Documents of a data set that is read over the network, in its own order."""

    def __init__(self, source: datasets.IterableDataset, lane: int, lanes: int):
        self._source = split_dataset_by_node(source, lane, lanes)
        self._rows = iter(self._source)

    @property
    def epoch(self) -> int:
        return self._source.epoch

    def __next__(self) -> str:
        try:
            row = next(self._rows)
        except StopIteration:
            self._source.set_epoch(self.epoch + 1)
            self._rows = iter(self._source)
            row = next(self._rows)
        return text_of(row["text"], "a row of the stream")

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._source.load_state_dict(state)
        self._source.set_epoch(state["epoch"])
        self._rows = iter(self._source)


class Lane:
    """Windows (T + 1,) of one lane's documents; the last token of a window is the first of the next."""

    def __init__(self, documents: Documents, tokenizer: BaseTokenizer, length: int):
        self._documents, self._tokenizer, self._length = documents, tokenizer, length
        self._tokens = np.empty(0, np.int64)  # of documents that were read, and not given out
        self.tokens_read = self.bytes_read = 0

    @property
    def epoch(self) -> int:
        """How often the documents have all been read."""
        return self._documents.epoch

    def window(self) -> np.ndarray:
        """Return the next T + 1 tokens."""
        while len(self._tokens) <= self._length:
            text = next(self._documents)
            tokens = self._tokenizer.encode(text, add_bos=True, add_eos=True)
            self._tokens = np.append(self._tokens, tokens)
            self.tokens_read += len(tokens)
            self.bytes_read += len(text.encode())
        window, self._tokens = self._tokens[: self._length + 1], self._tokens[self._length :]
        return window

    def state_dict(self) -> dict[str, Any]:
        return {"documents": self._documents.state_dict(), "tokens": self._tokens.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._documents.load_state_dict(state["documents"])
        self._tokens = np.array(state["tokens"], np.int64)


class Loader(BaseDataLoader):
    """The batches of one rank; its state is that of its lanes, by their numbers, so that other ranks can take them."""

    def __init__(self, lanes: list[Lane | None], rank: int, ranks: int, batch_size: int):
        """lanes: all of them in order, None for those that this rank has no part in."""
        self._lanes, self._rank, self._ranks, self._batch_size = lanes, rank, ranks, batch_size
        self._position = 0  # windows that all ranks together have taken

    def __iter__(self) -> Iterator[Batch]:
        while True:
            rows = []
            for _ in range(self._batch_size):
                lane = self._lanes[(self._position + self._rank) % len(self._lanes)]
                rows.append(lane.window())
                self._position += self._ranks
            yield to_batch(np.stack(rows))

    def state_dict(self) -> dict[str, Any]:
        lanes = {f"lane_{i}": json.dumps(lane.state_dict()) for i, lane in enumerate(self._lanes) if lane}
        return {"position": self._position, **lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position = state["position"]
        for i, lane in enumerate(self._lanes):
            if lane:
                lane.load_state_dict(json.loads(state[f"lane_{i}"]))


def to_batch(rows: np.ndarray) -> Batch:
    """Cut windows (b, T + 1) into inputs (b, T) and the labels one token later (b, T)."""
    tokens = torch.from_numpy(rows)
    return {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()


# ---- What torchtitan calls


def build_loader(dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig) -> Loader:
    """Make the training batches of one data-parallel rank."""
    training = job_config.training
    source = open_source(training.dataset, training.dataset_path, "train")
    if isinstance(source, datasets.Dataset) and len(source) < training.lanes:
        raise UserError(
            f"training.lanes must be at most the {len(source)} documents of {training.dataset_path}; got "
            f"{training.lanes}: lower it, or cut long texts into documents (python -m Llama.prepare)"
        )

    def lane(number: int) -> Lane:
        return Lane(read(source, number, training.lanes, job_config.debug.seed), tokenizer, training.seq_len)

    mine = [lane(i) if i % dp_world_size == dp_rank else None for i in range(training.lanes)]
    return Loader(mine, dp_rank, dp_world_size, training.local_batch_size)


def validation_windows(
    tokenizer: BaseTokenizer, job_config: JobConfig, name: str, path: str | None, mine: slice
) -> tuple[list[Batch], float]:
    """Read one rank's batches of the windows that every validation is on, and the UTF-8 bytes of text per token in all.

    Raises UserError where the set `name` holds fewer than validation.windows.
    """
    validation = job_config.validation
    lane = Lane(read(open_source(name, path, "validation"), 0, 1, seed=0), tokenizer, validation.seq_len)
    windows = []  # the seed above is 0: the same set for every run
    for found in range(validation.windows):
        windows.append(lane.window())
        if lane.epoch:
            raise UserError(
                f"validation.windows must be at most the {found} windows of {validation.seq_len} tokens that "
                f"{path or name} holds; got {validation.windows}"
            )
    taken, size = np.stack(windows[mine]), validation.local_batch_size
    batches = [to_batch(taken[start : start + size]) for start in range(0, len(taken), size)]
    return batches, lane.bytes_read / lane.tokens_read


def build_tokenizer(job_config: JobConfig) -> Tokenizer:
    """Read the tokenizer of model.hf_assets_path; UserError where there is none, or one that the model cannot use."""
    folder, model = Path(job_config.model.hf_assets_path), job_config.model
    tokenizer = Tokenizer(folder)
    if tokenizer.eos_id is None:
        raise UserError(
            f"the tokenizer of model.hf_assets_path must name the eos_token that documents end with; {folder} has none "
            "in tokenizer_config.json: add it, or name another tokenizer"
        )
    size, most = tokenizer.get_vocab_size(), shape_of(model).vocab_size
    if size > most or (size < most and model.flavor != "debug"):  # a published model has its own
        raise UserError(
            f"the tokenizer of model.hf_assets_path must have the {most} tokens of {model.name} {model.flavor}; "
            f"{folder} has {size}: name the model's own tokenizer"
        )
    return tokenizer


# ---- Data sets


def read(source: Source, lane: int, lanes: int, seed: int) -> Documents:
    """Deal a data set to lanes, and return the documents of one."""
    if isinstance(source, datasets.Dataset):
        return LocalDocuments(source, lane, lanes, seed)
    return StreamedDocuments(source, lane, lanes)


def open_source(name: str, path: str | None, split: str) -> Source:
    """Open "c4" as a stream from the Hub (or its copy at `path`), or the "text" of local files.

    Raises UserError for another name, a hub that cannot be reached, files that are missing or have no text.
    """
    datasets.disable_progress_bars()
    if name in ("c4", "c4_validation"):
        return open_c4(path or "allenai/c4", split)
    if name != "text":
        raise UserError(f"the data set must be c4 or text, got {name!r}; for your own files, text")
    if path is None:
        raise UserError("the data set text needs its files; set training.dataset_path and validation.dataset_path")
    return open_text(Path(path), split)


def open_c4(path: str, split: str) -> datasets.IterableDataset:
    """Stream C4's English part, from a folder or from the Hub."""
    if Path(path).is_dir():  # by its files: the data set's README.md, which names them, is often not copied
        pattern = f"en/c4-{split}.*.json.gz"  # as that README has it
        files = [str(file) for file in sorted(Path(path).glob(pattern))]
        if not files:
            raise UserError(f"the copy of C4 in {path} must hold {pattern}, has none: copy them, or name its folder")
        return datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    try:
        return datasets.load_dataset(path, name="en", split=split, streaming=True)
    except Exception as error:  # the Hub's failures share no narrower class
        raise UserError(
            f"c4 ({path}) cannot be opened ({one_line(error)[:200]}): where there is no internet, set dataset_path to "
            "a copy of the data set, or train on local files (dataset text)"
        ) from error


def split_of(path: Path, split: str) -> Path:
    """Return a folder's file of one split, or a path without such files; UserError where only the other is there."""
    present = [name for name in SPLIT_FILES.values() if (path / name).is_file()]
    if present and SPLIT_FILES[split] not in present:
        raise UserError(
            f"{path} must have {SPLIT_FILES[split]} beside {present[0]}, has none: add it, or name a folder or file of "
            f"its own as {'training' if split == 'train' else 'validation'}.dataset_path"
        )
    return path / SPLIT_FILES[split] if present else path


def open_text(path: Path, split: str) -> datasets.Dataset:
    """Open a file, a folder of files, or one that Llama.prepare wrote."""
    root, files = local_files(split_of(path, split))
    tables = [file for file in files if file.suffix in TABLES]
    names = [str(file) for file in tables or files]
    if len(names) < len(files) and process_rank() == 0:
        warn(f"{path}: beside {' and '.join(TABLES)} the {len(files) - len(names)} other files are left out")
    try:
        if not tables:
            if not any(file.stat().st_size for file in files):
                raise UserError(NO_TEXT.format(path))
            return datasets.load_dataset("text", data_files=names, split="train", sample_by="document")
        # `content` makes the cache, which goes by the arguments, see that a file has changed.
        rows = {"names": names, "content": fingerprint(root, tables)}
        features = datasets.Features({"text": datasets.Value("string")})
        return datasets.Dataset.from_generator(rows_of, features=features, gen_kwargs=rows)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):  # of rows_of, with file and row
            raise cause from None
        raise UserError(f"{path} must hold text: {one_line(cause)[:200]}") from error


def rows_of(names: list[str], content: str) -> Iterator[dict[str, str]]:
    """Read the rows of .jsonl and .parquet files, one file after the other; UserError where none has any text."""
    empty = True
    for name in names:
        for text in texts(Path(name)):
            empty = empty and not text
            yield {"text": text}
    if empty:
        raise UserError(NO_TEXT.format(", ".join(names)))
