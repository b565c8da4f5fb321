"""Batches of packed text whose order does not depend on the number of ranks, and whose position is saved.

Documents are dealt to `lanes`, document d to lane d mod lanes. Each lane concatenates its documents, with begin and end
tokens, and cuts them into windows of T + 1 tokens. Window n of the run comes from lane n mod lanes; step s takes the
windows from s x global batch on, and rank r of W those with n mod W = r. W may be any divisor of the lanes and may
change when a run resumes, without changing the batches.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader

from common import UserError
from Llama.checks import shape_of
from Llama.config import JobConfig
from Llama.sources import Documents, open_source, read
from Llama.tokenizer import Tokenizer

Batch = tuple[dict[str, Tensor], Tensor]  # {"input": (b, T)}, labels (b, T), int64, for torchtitan

TOGETHER = 16  # documents of a lane per tokenizer call: enough for the cores of one GPU's process


class Position(NamedTuple):
    """The position of a lane; immutable."""

    documents: dict[str, Any]
    tokens: np.ndarray  # (n,) int64, read but not yet returned


class Lane:
    """Windows (T + 1,) of one lane's documents; each starts with the last token of the one before."""

    def __init__(self, documents: Documents, tokenizer: Tokenizer, length: int, together: int = 1):
        """together: number of documents per tokenizer call, which uses all cores."""
        self._documents, self._tokenizer, self._length, self._together = documents, tokenizer, length, together
        self._tokens = np.empty(0, np.int64)
        self.tokens_read = self.bytes_read = 0

    @property
    def epoch(self) -> int:
        """Number of completed passes over the documents."""
        return self._documents.epoch

    def window(self) -> np.ndarray:
        """Return the next T + 1 tokens."""
        while len(self._tokens) <= self._length:
            texts = [next(self._documents) for _ in range(self._together)]
            found = self._tokenizer.encode_batch(texts, add_bos=True, add_eos=True)
            self._tokens = np.concatenate([self._tokens, *(np.array(tokens, np.int64) for tokens in found)])
            self.tokens_read += sum(map(len, found))
            self.bytes_read += sum(len(text.encode()) for text in texts)
        window, self._tokens = self._tokens[: self._length + 1], self._tokens[self._length :]
        return window

    def position(self) -> Position:
        """Return the position of the next window."""
        return Position(self._documents.state_dict(), self._tokens)

    def move_to(self, position: Position) -> None:
        """Continue from a position."""
        self._documents.load_state_dict(position.documents)
        self._tokens = position.tokens


class Loader(BaseDataLoader):
    """The batches of one rank; a thread reads and tokenizes the next one during training.

    The state is that of the returned batches: the positions of the lanes by number, so that other ranks can load them.
    """

    def __init__(self, lanes: list[Lane | None], rank: int, ranks: int, batch_size: int):
        """lanes: all lanes in order, None for those of other ranks."""
        self._lanes, self._rank, self._ranks, self._batch_size = lanes, rank, ranks, batch_size
        self._given = 0  # windows returned so far, over all ranks
        self._positions = {i: lane.position() for i, lane in enumerate(lanes) if lane}

    def __iter__(self) -> Iterator[Batch]:
        with ThreadPoolExecutor(1, "reader") as pool:
            following = pool.submit(self._read, self._given)
            while True:
                rows, given, positions = following.result()
                following = pool.submit(self._read, given)
                self._given, self._positions = given, self._positions | positions
                yield to_batch(rows)

    def _read(self, given: int) -> tuple[np.ndarray, int, dict[int, Position]]:
        """Read the windows (b, T + 1) after the first `given`; returns them, the new `given` and the new positions."""
        rows, positions = [], {}
        for _ in range(self._batch_size):
            number = (given + self._rank) % len(self._lanes)
            rows.append(self._lanes[number].window())
            positions[number] = self._lanes[number].position()
            given += self._ranks
        return np.stack(rows), given, positions

    def state_dict(self) -> dict[str, Any]:
        """Return the positions of this rank's lanes, as JSON, and the number of windows returned over all ranks."""
        lanes = {
            f"lane_{i}": json.dumps({"documents": documents, "tokens": tokens.tolist()})
            for i, (documents, tokens) in self._positions.items()
        }
        return {"position": self._given, **lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; call it before the first batch."""
        self._given = state["position"]
        for i in self._positions:
            lane = json.loads(state[f"lane_{i}"])
            self._positions[i] = Position(lane["documents"], np.array(lane["tokens"], np.int64))
            self._lanes[i].move_to(self._positions[i])


def to_batch(rows: np.ndarray) -> Batch:
    """Split windows (b, T + 1) into inputs (b, T) and labels (b, T), one token later."""
    tokens = torch.from_numpy(rows)
    return {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()


# ---- Called by torchtitan


def build_loader(dp_world_size: int, dp_rank: int, tokenizer: Tokenizer, job_config: JobConfig) -> Loader:
    """Return the training batches of one data-parallel rank."""
    training = job_config.training
    source = open_source(training.dataset, training.dataset_path, "train")
    if isinstance(source, datasets.Dataset) and len(source) < training.lanes:
        raise UserError(
            f"training.lanes must be at most the {len(source)} documents of {training.dataset_path}; got "
            f"{training.lanes}: lower it, or cut long texts into documents (python -m Llama.prepare)"
        )

    def lane(number: int) -> Lane:
        documents = read(source, number, training.lanes, job_config.debug.seed)
        return Lane(documents, tokenizer, training.seq_len, TOGETHER)

    mine = [lane(i) if i % dp_world_size == dp_rank else None for i in range(training.lanes)]
    return Loader(mine, dp_rank, dp_world_size, training.local_batch_size)


def validation_windows(
    tokenizer: Tokenizer, job_config: JobConfig, name: str, path: str | None, mine: slice
) -> tuple[list[Batch], float]:
    """Return one rank's batches of the fixed validation windows, and the UTF-8 bytes per token of all windows' text.

    Raises UserError if the set `name` holds fewer than validation.windows.
    """
    validation = job_config.validation
    lane = Lane(read(open_source(name, path, "validation"), 0, 1, seed=0), tokenizer, validation.seq_len)
    windows = []  # seed 0 above: the same set for every run
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
    """Return the tokenizer of model.hf_assets_path; raises UserError if it is missing or does not fit the model."""
    folder, model = Path(job_config.model.hf_assets_path), job_config.model
    tokenizer = Tokenizer(folder)
    if tokenizer.eos_id is None:
        raise UserError(
            f"the tokenizer of model.hf_assets_path must have an eos_token, which ends documents; {folder} has none in "
            "tokenizer_config.json: add it, or name another tokenizer"
        )
    size, most = tokenizer.get_vocab_size(), shape_of(model).vocab_size
    exact = model.flavor != "debug" and model.name != "qwen2.5"  # of published models; Qwen's table is padded
    if size > most or (exact and size < most):
        raise UserError(
            f"the tokenizer of model.hf_assets_path must have the {most} tokens of {model.name} {model.flavor}; "
            f"{folder} has {size}: name the model's own tokenizer"
        )
    return tokenizer
