"""Llama's batches against a slow reference reader, on any number of ranks, and across a resume."""

import gzip
import itertools

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from common import UserError
from Llama.config import parse_config
from Llama.data import Lane, Loader, build_tokenizer, validation_windows
from Llama.model import FLAVORS
from Llama.prepare import Prepare, prepare
from Llama.sources import LocalDocuments, StreamedDocuments, open_source, read

LENGTH, LANES = 7, 4
TEXTS = [chr(97 + i % 26) * (i % 11 + 1) for i in range(40)]


class Bytes:
    """A tokenizer of bytes, with 256 to begin and 257 to end."""

    def encode_batch(self, texts: list[str], add_bos: bool, add_eos: bool) -> list[list[int]]:
        return [[256] * add_bos + list(text.encode()) + [257] * add_eos for text in texts]

    def get_vocab_size(self) -> int:
        return 258


def local() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": TEXTS})


def streamed() -> datasets.IterableDataset:
    return local().to_iterable_dataset(num_shards=3)


def loader(source, rank: int, ranks: int, together: int = 1) -> Loader:
    def lane(number: int) -> Lane:
        return Lane(read(source, number, LANES, seed=5), Bytes(), LENGTH, together)

    return Loader([lane(i) if i % ranks == rank else None for i in range(LANES)], rank, ranks, batch_size=1)


def windows(loaders: list[Loader], count: int) -> list[list[int]]:
    """The windows that ranks in lockstep take, in the run's order: inputs and the last label."""
    iterators = list(map(iter, loaders))
    batches = [next(iterator) for _ in range(count // len(loaders)) for iterator in iterators]
    return [[*inputs["input"][0].tolist(), labels[0, -1].item()] for inputs, labels in batches]


@pytest.mark.parametrize("source", [local, streamed])
@pytest.mark.parametrize("ranks", [2, 4])
def test_windows_of_several_ranks_match_those_of_one(source, ranks):
    alone = windows([loader(source(), 0, 1)], 64)  # more than an epoch: 40 documents are 39 windows
    assert windows([loader(source(), rank, ranks) for rank in range(ranks)], 64) == alone


@pytest.mark.parametrize("source", [local, streamed])
@pytest.mark.parametrize("taken", [12, 52])
def test_resume_on_another_number_of_ranks_matches_an_uninterrupted_run(source, taken):
    whole = windows([loader(source(), 0, 1)], taken + 24)
    two = [loader(source(), rank, 2) for rank in range(2)]
    assert windows(two, taken) == whole[:taken]
    saved = two[0].state_dict() | two[1].state_dict()  # as a checkpoint joins them
    four = [loader(source(), rank, 4) for rank in range(4)]
    for each in four:
        each.load_state_dict({key: saved[key] for key in each.state_dict()})
    assert windows(four, 24) == whole[taken:]


@pytest.mark.parametrize("source", [local, streamed])
@pytest.mark.parametrize("together", [1, 3])
def test_resumes_after_each_of_a_few_windows_match_an_uninterrupted_run(source, together):
    """A lane that gives windows of tokens it was loaded with has drawn no document since: its position still counts."""
    whole = windows([loader(source(), 0, 1)], 60)
    found, state = [], loader(source(), 0, 1, together).state_dict()
    for taken in (13, 0, 1, 2, 3, 5, 4, 0, 7, 20):
        resumed = loader(source(), 0, 1, together)
        resumed.load_state_dict(state)
        found += windows([resumed], taken)
        state = resumed.state_dict()
    assert found == whole[: len(found)]


def test_stream_with_fewer_documents_than_lanes_refuses():
    few = datasets.Dataset.from_dict({"text": ["a", "b"]}).to_iterable_dataset()
    with pytest.raises(UserError, match=r"a document for each lane, holds fewer: lower training.lanes"):
        windows([loader(few, 0, 1)], 4)


def test_copy_of_c4_cut_short_refuses_in_one_line(tmp_path):
    (tmp_path / "en").mkdir()
    whole = gzip.compress(b'{"text": "x"}\n' * 9)
    (tmp_path / "en/c4-train.00000-of-00001.json.gz").write_bytes(whole[:-9])
    with pytest.raises(UserError, match=r"must hold whole files; they cannot be read \(Compressed file ended"):
        open_source("c4", str(tmp_path), "train")


def test_lane_matches_its_documents_put_end_to_end():
    documents = LocalDocuments(local(), 1, LANES, seed=5)
    lane = Lane(LocalDocuments(local(), 1, LANES, seed=5), Bytes(), LENGTH)
    expected = list(itertools.chain(*(Bytes().encode_batch([next(documents) for _ in range(9)], True, True))))
    for i in range(6):
        np.testing.assert_array_equal(lane.window(), expected[i * LENGTH : (i + 1) * LENGTH + 1])


@pytest.mark.parametrize("kind", [LocalDocuments, StreamedDocuments])
def test_each_epoch_reads_every_document_once(kind):
    source, extra = (local(), (5,)) if kind is LocalDocuments else (streamed(), ())
    lanes = [kind(source, lane, LANES, *extra) for lane in range(LANES)]
    first, second = ([next(lane) for lane in lanes for _ in range(10)] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(TEXTS)
    assert (first != second) == (kind is LocalDocuments)  # shuffled again; a stream has its own order


def test_validation_windows_match_the_same_set_for_every_run_and_count_its_bytes(tmp_path):
    (tmp_path / "val.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    flags = ["--validation.dataset", "text", "--validation.dataset_path", str(tmp_path), "--validation.seq_len", "7"]
    flags += ["--training.lanes", "8", "--optimizer.lr", "1", "--model.flavor", "debug"]

    def windows(rank: slice, *more: str) -> tuple[np.ndarray, float]:
        settings = parse_config([*flags, *more])
        batches, bytes_per_token = validation_windows(Bytes(), settings, "text", str(tmp_path), rank)
        return np.concatenate(
            [np.append(inputs["input"], labels[:, -1:], 1) for inputs, labels in batches]
        ), bytes_per_token

    few = ("--validation.windows", "30", "--validation.local_batch_size", "4")
    all_windows, bytes_per_token = windows(slice(0, None, 1), *few)
    again, _ = windows(slice(0, None, 1), *few, "--debug.seed", "2")
    np.testing.assert_array_equal(all_windows, again)
    np.testing.assert_array_equal(all_windows[1::3], windows(slice(1, None, 3), *few)[0])
    assert all_windows.shape == (30, 8)
    assert bytes_per_token == pytest.approx(sum(map(len, TEXTS)) / (sum(map(len, TEXTS)) + 80), rel=0.05)
    with pytest.raises(UserError, match=r"validation.windows must be at most the 4\d windows of 7 tokens"):
        windows(slice(0, None, 1), "--validation.windows", "400")


def test_texts_of_a_folder_match_its_files(tmp_path):
    for name in ("b.txt", "a.py"):
        (tmp_path / name).write_text(f"first {name}\nsecond\n")
    assert sorted(open_source("text", str(tmp_path), "train")["text"]) == [
        "first a.py\nsecond\n",
        "first b.txt\nsecond\n",
    ]


def test_rows_of_a_mixed_folder_match_its_tables_in_order(tmp_path, capsys):
    (tmp_path / "b.jsonl").write_text('{"text": "b 1", "id": 1}\n\n{"text": "b 2"}\n')
    parquet.write_table(pyarrow.table({"n": [1], "text": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "LICENSE").write_text("free")
    assert list(open_source("text", str(tmp_path), "train")["text"]) == ["a", "b 1", "b 2"]
    assert "1 files other than .jsonl and .parquet skipped" in capsys.readouterr().err
    (tmp_path / "b.jsonl").write_text('{"text": "b 3"}\n')  # cached no longer
    assert list(open_source("text", str(tmp_path), "train")["text"]) == ["a", "b 3"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"content": "x"}', r"b\.jsonl, row 2 must have its text under the key 'text', has the keys content"),
        ('{"text": ', r"b\.jsonl, row 2 must be JSON, is not"),
        ('{"text": null}', r"b\.jsonl, row 2: the key 'text' must hold text, got null"),
        ('{"text": 5}', r"b\.jsonl, row 2: the key 'text' must hold text, got int 5"),
        (r'{"text": "\ud800"}', r"b\.jsonl, row 2: the text must be valid Unicode, has half a surrogate pair"),
    ],
)
def test_rows_that_are_not_text_refuse_with_file_and_row(tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 3)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n' + row + "\n")
    with pytest.raises(UserError, match=message) as caught:
        open_source("text", str(tmp_path), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("train.jsonl", ""), ("train.jsonl", "\n"), ("train.jsonl", '{"text": ""}\n' * 3), ("empty.txt", "")],
)
def test_a_split_without_text_refuses(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} must hold text, has none"):
        open_source("text", str(tmp_path / name), "train")


def test_a_copy_of_c4_matches_its_files_with_its_readme_or_without(tmp_path):
    (tmp_path / "en").mkdir()
    for name, text in (("train.00001-of-00002", "second"), ("train.00000-of-00002", "first"), ("validation.0", "val")):
        with gzip.open(tmp_path / f"en/c4-{name}.json.gz", "wt") as file:
            file.write(f'{{"text": "{text}", "url": "u"}}\n')
    for split, expected in (("train", ["first", "second"]), ("validation", ["val"])):
        assert [row["text"] for row in open_source("c4", str(tmp_path), split)] == expected
    (tmp_path / "en/c4-validation.0.json.gz").unlink()
    with pytest.raises(UserError, match=r"must hold en/c4-validation\.\*\.json\.gz, has none"):
        open_source("c4", str(tmp_path), "validation")


def test_data_that_cannot_be_read_refuses_in_one_line(monkeypatch):
    with pytest.raises(UserError, match="must be c4 or text, got 'pile'"):
        open_source("pile", None, "train")

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'allenai/c4' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"c4 \(allenai/c4\) cannot be opened .* set dataset_path"):
        open_source("c4", None, "train")


def test_tokenizer_that_is_missing_or_has_more_tokens_than_the_model_refuses(tmp_path, monkeypatch):
    settings = parse_config(["--model.flavor", "debug", "--model.hf_assets_path", str(tmp_path), "--optimizer.lr", "1"])
    with pytest.raises(UserError, match=r"must hold tokenizer.json .*; .* has no tokenizer.json: download them"):
        build_tokenizer(settings)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("some text\n" * 9)
    settings.model.hf_assets_path = str(prepare(Prepare(str(tmp_path / "text"), tmp_path / "made", vocab_size=260)))
    assert build_tokenizer(settings).get_vocab_size() == 260
    settings.model.flavor = "7B"
    with pytest.raises(UserError, match=r"must have the 32000 tokens of llama2 7B; .*made has 260"):
        build_tokenizer(settings)
    settings.model.flavor = "debug"
    monkeypatch.setattr(FLAVORS["llama2"]["debug"], "vocab_size", 259)
    with pytest.raises(UserError, match=r"must have the 259 tokens of llama2 debug; .*made has 260"):
        build_tokenizer(settings)
