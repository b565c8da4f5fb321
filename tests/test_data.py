"""nanoGPT.data: corpora are read back as written, batches depend on (seed, step) alone, damage is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import UserError
from nanoGPT import data
from nanoGPT.data import Encoded, TokenFile

DESCRIBED = {"tokenizer": "bytes", "source": "test"}


def corpus(folder, train=1000, val=200):
    """A corpus whose k-th token is k mod 251, of which the text is twice as long in bytes."""
    splits = {"train": train, "val": val}
    blocks = {name: [Encoded(np.arange(count) % 251, 2 * count)] for name, count in splits.items()}
    data.write_corpus(folder, blocks, DESCRIBED)
    return folder


def counting(length):
    return TokenFile("memory", np.arange(length, dtype=np.uint16), 1.0)


def test_load_matches_what_was_written(tmp_path):
    train = data.load(corpus(tmp_path / "c"), "train")
    assert isinstance(train.tokens, np.memmap) and train.tokens.dtype == np.dtype("<u2")
    assert np.array_equal(train.tokens, np.arange(1000) % 251)
    assert len(train) == 1000 and train.bytes_per_token == 2
    assert data.read_meta(tmp_path / "c")["vocab_size"] == 257


def test_load_matches_what_was_written_in_uint32(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "tokenizer", lambda name: SimpleNamespace(n_vocab=100_000))
    tokens = np.array([0, 65_535, 65_536, 99_999], dtype=np.uint32)
    data.write_corpus(tmp_path / "c", {"train": [Encoded(tokens, 4)], "val": [Encoded(tokens, 4)]}, DESCRIBED)
    assert data.load(tmp_path / "c", "val").tokens.tolist() == tokens.tolist()


def test_write_corpus_joins_blocks_and_replaces_the_corpus_before(tmp_path):
    folder = corpus(tmp_path / "c")
    blocks = [Encoded(np.array([1, 2]), 2), Encoded(np.array([3]), 1)]
    data.write_corpus(folder, {"train": blocks, "val": blocks[:1]}, DESCRIBED)
    assert data.load(folder, "train").tokens.tolist() == [1, 2, 3]
    assert data.load(folder, "val").tokens.tolist() == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_write_corpus_that_fails_leaves_the_corpus_before(tmp_path):
    def failing():
        yield Encoded(np.array([1]), 1)
        raise OSError("No space left on device")

    folder = corpus(tmp_path / "c")
    with pytest.raises(OSError, match="No space"):
        data.write_corpus(folder, {"train": failing(), "val": []}, DESCRIBED)
    assert len(data.load(folder, "train")) == 1000
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_write_corpus_refuses_an_empty_split(tmp_path):
    with pytest.raises(ValueError, match=r"val\.bin needs text"):
        data.write_corpus(tmp_path / "c", {"train": [Encoded(np.array([1]), 1)], "val": []}, DESCRIBED)
    assert not (tmp_path / "c").exists()


def test_bytes_tokenizer_matches_utf8():
    encoding = data.tokenizer("bytes")
    rng = np.random.default_rng(0)
    for length in (0, 1, 50, 5000):
        text = "".join(chr(code) for code in rng.integers(0xD800, size=length)) + "\r\n\n <|endoftext|> é\x00"
        tokens = encoding.encode(text, disallowed_special=())
        assert tokens == list(text.encode())
        assert encoding.decode(tokens) == text
    assert encoding.eot_token == 256 and encoding.n_vocab == 257
    assert encoding.decode([104, 105, 256]) == "hi<|endoftext|>"


def test_gpt2_tokenizer_refuses_an_unreachable_download_in_one_line(monkeypatch):
    def unreachable(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("tiktoken.get_encoding", unreachable)
    with pytest.raises(FileNotFoundError, match=r"no route to host.* set TIKTOKEN_CACHE_DIR to it") as caught:
        data.tokenizer("gpt2")
    assert "\n" not in str(caught.value)


def test_tokenizer_refuses_another_name():
    with pytest.raises(ValueError, match="'bytes' or 'gpt2', got 'gpt3'"):
        data.tokenizer("gpt3")


def test_batch_matches_the_windows_that_numpys_generator_draws():
    tokens = counting(5000)
    inputs, targets = data.batch(tokens, seed=7, step=3, sequences=slice(0, 6), global_batch=6, context=32)
    offsets = np.random.default_rng([7, 3]).integers(0, 5000 - 32, size=6)
    assert inputs.tolist() == [list(range(offset, offset + 32)) for offset in offsets]
    assert torch.equal(targets, inputs + 1)
    assert inputs.dtype == targets.dtype == torch.int64


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_batch_matches_the_global_batch_however_it_is_shared(ranks):
    drawn = dict(seed=1, step=9, global_batch=12, context=16)
    whole, _ = data.batch(counting(3000), sequences=slice(0, 12), **drawn)
    share = 12 // ranks
    parts = [data.batch(counting(3000), sequences=slice(r * share, (r + 1) * share), **drawn)[0] for r in range(ranks)]
    assert torch.equal(torch.cat(parts), whole)


def test_batches_read_ahead_match_those_of_batch():
    tokens, pieces = counting(3000), [slice(0, 2), slice(2, 5)]
    shared = {"seed": 7, "global_batch": 6, "context": 8}
    read = list(data.read_batches(tokens, range(3, 6), pieces, **shared))
    expected = [data.batch(tokens, step=step, sequences=piece, **shared) for step in range(3, 6) for piece in pieces]
    assert len(read) == 6
    for (inputs, targets), (wanted, following) in zip(read, expected, strict=True):
        assert torch.equal(inputs, wanted) and torch.equal(targets, following)


def test_batch_differs_between_steps_and_between_seeds():
    def draw(seed, step):
        return data.batch(counting(3000), seed=seed, step=step, sequences=slice(0, 4), global_batch=4, context=8)[0]

    assert torch.equal(draw(1, 1), draw(1, 1))
    assert not torch.equal(draw(1, 1), draw(1, 2)) and not torch.equal(draw(1, 1), draw(2, 1))
    assert not torch.equal(draw(1, 2), draw(2, 1))


def test_batch_draws_every_window_from_the_first_to_the_last():
    inputs, targets = data.batch(counting(12), seed=0, step=0, sequences=slice(0, 99), global_batch=99, context=8)
    assert inputs[:, 0].unique().tolist() == [0, 1, 2, 3]
    assert targets.max() == 11


@pytest.mark.parametrize(
    ("length", "count", "context"), [(1000, 7, 16), (1000, 62, 16), (113, 7, 16), (10_001, 100, 100)]
)
def test_validation_windows_match_an_even_spread_without_overlap(length, count, context):
    offsets = data.validation_windows(counting(length), count=count, context=context)
    assert len(offsets) == count and offsets[0] == 0
    assert np.all(np.diff(offsets) >= context)  # no target is in two windows
    assert offsets[-1] + context + 1 <= length
    even = np.arange(count) * (length - 1) / count
    assert np.all(np.abs(offsets - even) < 2 * context)  # placed in whole windows


def test_validation_windows_are_fewer_in_a_short_file():
    assert data.validation_windows(counting(33), count=100, context=16).tolist() == [0, 16]
    assert data.validation_windows(counting(32), count=100, context=16).tolist() == [0]


def test_windows_match_slices():
    inputs, targets = data.windows(counting(100), [5, 80], 10)
    assert inputs.tolist() == [list(range(5, 15)), list(range(80, 90))]
    assert torch.equal(targets, inputs + 1) and inputs.is_contiguous() and targets.is_contiguous()


@pytest.mark.gpu
def test_windows_on_a_gpu_match_those_on_the_cpu():
    on_gpu, on_cpu = (data.windows(counting(100), [5, 80], 10, device) for device in ("cuda", "cpu"))
    assert on_gpu[0].is_cuda and torch.equal(on_gpu[0].cpu(), on_cpu[0]) and torch.equal(on_gpu[1].cpu(), on_cpu[1])


def test_short_files_are_refused_with_the_size_of_a_window():
    for draw in (
        lambda: data.batch(counting(16), seed=0, step=0, sequences=slice(0, 1), global_batch=1, context=16),
        lambda: data.validation_windows(counting(16), count=1, context=16),
    ):
        with pytest.raises(ValueError, match="context \\+ 1 = 17 tokens, holds 16"):
            draw()


def test_load_refuses_a_missing_corpus_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m nanoGPT.prepare stdlib --out .*/stdlib`"):
        data.load(tmp_path / "stdlib", "train")
    with pytest.raises(FileNotFoundError, match=r"prepare FILE_OR_FOLDER --out .*/mine`"):
        data.load(tmp_path / "mine", "train")


def test_load_refuses_a_changed_byte(tmp_path):
    folder = corpus(tmp_path / "c")
    content = bytearray((folder / "train.bin").read_bytes())
    content[500] ^= 1
    (folder / "train.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.bin must have the SHA-256"):
        data.load(folder, "train")
    assert len(data.load(folder, "train", verify=False)) == 1000
    assert len(data.load(folder, "val")) == 200


def test_load_refuses_a_truncated_file_even_unverified(tmp_path):
    folder = corpus(tmp_path / "c")
    (folder / "val.bin").write_bytes((folder / "val.bin").read_bytes()[:-2])
    with pytest.raises(ValueError, match="must hold 200 tokens of 2 bytes, is 398 bytes long"):
        data.load(folder, "val", verify=False)


def test_load_refuses_a_missing_and_an_empty_file(tmp_path):
    folder = corpus(tmp_path / "c")
    (folder / "train.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.bin is missing"):
        data.load(folder, "train")
    meta = data.read_meta(folder)
    meta["files"]["val.bin"]["tokens"] = 0
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="is empty"):
        data.load(folder, "val")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON"),
        ("[]", "must hold an object"),
        ({"vocab_size": "257"}, "vocab_size as a whole number"),
        ({"vocab_size": 0}, "positive vocab_size"),
        ({"dtype": "float64"}, "dtype uint16 or uint32"),
        ({"tokenizer": None}, "tokenizer as text, got null"),
        ({"files": []}, "files as an object"),
        ({"files": {"train.bin": {"tokens": "9", "text_bytes": 8, "sha256": ""}}}, "files.train.bin.tokens as a whole"),
        ({"files": {"train.bin": {"tokens": 9}}}, "files.train.bin.text_bytes as a whole number, got none"),
    ],
)
def test_read_meta_refuses_a_damaged_file(tmp_path, content, message):
    good = {"tokenizer": "bytes", "vocab_size": 257, "dtype": "uint16", "files": {}}
    (tmp_path / "meta.json").write_text(json.dumps(good | content) if isinstance(content, dict) else content)
    with pytest.raises(UserError, match=message) as caught:
        data.read_meta(tmp_path)
    assert "\n" not in str(caught.value)


def test_padded_vocabulary_matches_gpt2s_50304():
    assert data.padded_vocabulary({"vocab_size": 50_257}) == 50_304
    assert data.padded_vocabulary({"vocab_size": 257}) == 320
    assert data.padded_vocabulary({"vocab_size": 320}) == 320
    assert data.padded_vocabulary({"vocab_size": 257}, multiple=100) == 300


def test_check_vocabulary_refuses_a_smaller_model():
    meta = {"vocab_size": 257, "tokenizer": "bytes"}
    data.check_vocabulary(meta, 257)
    with pytest.raises(ValueError, match="need a vocabulary of 257, the model has 256"):
        data.check_vocabulary(meta, 256)
