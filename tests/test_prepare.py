"""nanoGPT.prepare against its source text: every document once, in one split, byte for byte."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from common import UserError, corpus
from common.config import parse_config
from nanoGPT import data, prepare
from nanoGPT.prepare import Prepare
from nanoGPT.train import Config
from tests import warm

END = "<|endoftext|>"


def read(folder, split):
    """A split as text, end-of-text tokens spelled out."""
    tokens = data.load(folder, split)
    text = data.tokenizer("bytes").decode(tokens.tokens.tolist())
    assert len(text.replace(END, "").encode()) == pytest.approx(tokens.bytes_per_token * len(tokens))
    return text


def documents(folder):
    """All documents of a corpus, sorted."""
    texts = read(folder, "train") + read(folder, "val")
    assert texts.endswith(END)
    return sorted(texts.removesuffix(END).split(END))


def run(source, folder, **options):
    return prepare.prepare(Prepare(str(source), folder, workers=2, **options))


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def many(count):
    return {f"part{k % 3}/{k}.txt": f"text {k}, ünïcode\r\n" * (k + 1) for k in range(count)}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small library in place of Python's standard library."""
    hidden = ["test/a.py", "sqlite3/tests/b.py", "idlelib/idle_test/c.py", "site-packages/d.py", "pydoc_data/e.py"]
    files = {f"{name}.py": f"import {name}\n" for name in ("alpha", "beta", "pkg/gamma")}
    folder = write(tmp_path / "library", files | dict.fromkeys([*hidden, "notes.txt"], "hidden"))
    monkeypatch.setattr(corpus.sysconfig, "get_path", {"stdlib": str(folder)}.get)
    return folder


def test_stdlib_matches_the_library_without_tests_and_packages(library, tmp_path):
    folder = run("stdlib", tmp_path / "c")
    assert documents(folder) == ["import alpha\n", "import beta\n", "import pkg/gamma\n"]
    meta = data.read_meta(folder)
    assert (meta["source"], meta["tokenizer"], meta["vocab_size"], meta["dtype"]) == ("stdlib", "bytes", 257, "uint16")
    for name, entry in meta["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
        assert (folder / name).stat().st_size == 2 * entry["tokens"]


def test_stdlib_of_this_python_has_no_test_folder_and_enough_text():
    root, files = prepare.library_files()
    names = {path.relative_to(root).as_posix() for path in files}
    assert {"abc.py", "json/decoder.py", "asyncio/tasks.py"} <= names
    assert not [name for name in names if "/tests/" in name or name.startswith(("test/", "site-packages/"))]
    parts = prepare.split_files(root, files, 0.05)
    assert 0.02 < len(parts["val"]) / len(files) < 0.08  # four standard deviations of some 700 draws at 0.05


def test_prepare_again_leaves_a_matching_corpus_alone(library, tmp_path, capsys, monkeypatch):
    folder = run("stdlib", tmp_path / "c")
    before = (folder / "train.bin").stat().st_mtime_ns
    monkeypatch.setattr(prepare, "write_corpus", None)
    run("stdlib", tmp_path / "c")
    assert (folder / "train.bin").stat().st_mtime_ns == before
    printed = capsys.readouterr()
    assert "up to date" in printed.out and printed.err.count("train.bin: 0") == 1  # a progress bar, also in a log


def test_prepare_again_follows_a_changed_file_and_mends_a_truncated_one(library, tmp_path):
    folder = run("stdlib", tmp_path / "c")
    (library / "beta.py").write_text("import beta2\n")
    run("stdlib", tmp_path / "c")
    assert "import beta2\n" in documents(folder)
    os.truncate(folder / "train.bin", 2)
    run("stdlib", tmp_path / "c")
    assert len(documents(folder)) == 3


def test_prepare_refuses_to_replace_another_corpus_or_other_files(library, tmp_path):
    folder = run("stdlib", tmp_path / "c")
    other = write(tmp_path / "texts", many(4))
    with pytest.raises(ValueError, match=r"source = stdlib, requested is .*texts: remove it or choose another --out"):
        run(other, folder)
    with pytest.raises(ValueError, match=r"val_fraction = 0\.05, requested is 0\.2"):
        run("stdlib", folder, val_fraction=0.2)
    with pytest.raises(ValueError, match="is neither"):
        run("stdlib", other)
    assert len(documents(folder)) == 3 and len(list(other.rglob("*.txt"))) == 4


def test_folder_matches_its_files_split_by_the_hash_of_their_path(tmp_path):
    files = many(60)
    folder = run(write(tmp_path / "texts", files), tmp_path / "c", val_fraction=0.25)
    assert documents(folder) == sorted(files.values())

    def place(name):
        return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12

    expected = "".join(files[name] + END for name in sorted(files) if place(name) < 0.25)
    assert read(folder, "val") == expected and expected


def test_split_files_keeps_the_split_of_files_when_others_are_added(tmp_path):
    root = write(tmp_path / "texts", many(60))
    files = sorted(path for path in root.rglob("*") if path.is_file())
    some, every = (prepare.split_files(root, chosen, 0.25) for chosen in (files[::2], files))
    for name in ("train", "val"):
        assert set(some[name]) <= set(every[name])


@pytest.mark.parametrize("val_fraction", [1e-9, 1 - 1e-9])
def test_folder_has_a_file_in_either_split_at_any_fraction(tmp_path, val_fraction):
    folder = run(write(tmp_path / "texts", many(5)), tmp_path / "c", val_fraction=val_fraction)
    assert sorted([read(folder, "train").count(END), read(folder, "val").count(END)]) == [1, 4]


def test_folder_of_text_jsonl_and_parquet_matches_their_documents(tmp_path):
    rows = [json.dumps({"text": f"row {k}\n", "id": k}) for k in range(3)]
    files = {"a.txt": "plain", "b.jsonl": "\n".join(rows), "d.md": "", ".hidden": "no", ".git/config": "no"}
    root = write(tmp_path / "texts", files | {"e.bin": b"\xff\xfe\x00"})
    parquet.write_table(pyarrow.table({"text": ["first", "second é"], "n": [1, 2]}), root / "c.parquet")
    folder = run(root, tmp_path / "c")
    assert documents(folder) == sorted(["plain", "row 0\n", "row 1\n", "row 2\n", "first", "second é"])
    assert data.read_meta(folder)["skipped_files"] == 1  # e.bin


@pytest.mark.parametrize("piece_bytes", [1, 7, 2**22])
def test_one_text_file_matches_its_head_and_tail(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(corpus, "PIECE_BYTES", piece_bytes)
    text = "".join(f"zeile {k}: äöü €𝄞\n" * (k % 3) for k in range(100))
    folder = run(write(tmp_path, {"one.txt": text}) / "one.txt", tmp_path / "c", val_fraction=0.1)
    train, val = read(folder, "train"), read(folder, "val")
    assert train.removesuffix(END) + val == text + END
    assert abs(len(val.removesuffix(END).encode()) - 0.1 * len(text.encode())) <= 4


def test_one_text_file_is_cut_between_characters_wherever_the_cut_falls(tmp_path):
    text = "a€𝄞é" * 5
    path = write(tmp_path, {"one.txt": text}) / "one.txt"
    starts = {len(text[:k].encode()) for k in range(len(text) + 1)}
    for fraction in np.linspace(0.01, 0.99, 99):
        assert corpus.tail_start(path, fraction) in starts


def test_folder_of_one_file_beside_an_empty_one_matches_that_file(tmp_path):
    folder = run(write(tmp_path / "texts", {"a.txt": "0123456789", "b.txt": ""}), tmp_path / "c", val_fraction=0.2)
    assert (read(folder, "train"), read(folder, "val")) == (f"01234567{END}", f"89{END}")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_one_table_matches_its_first_and_last_documents(tmp_path, suffix):
    path, texts = tmp_path / f"one.{suffix}", [f"document {k}" for k in range(20)]
    if suffix == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in texts))
    else:
        parquet.write_table(pyarrow.table({"text": texts}), path)
    folder = run(path, tmp_path / "c", val_fraction=0.1)
    assert read(folder, "train") == "".join(text + END for text in texts[:18])
    assert read(folder, "val") == "".join(text + END for text in texts[18:])


def test_an_end_of_text_in_a_text_is_text(tmp_path):
    folder = run(write(tmp_path / "texts", {"a.txt": f"x{END}y", "b.txt": f"x{END}y"}), tmp_path / "c")
    assert data.load(folder, "train").tokens.tolist() == [*f"x{END}y".encode(), 256]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds none"),
        ({"a": b"\xff", "b": b"\xfe"}, "has none: convert it"),
        (
            {"a.jsonl": '{"content": "x"}'},
            r"a\.jsonl, row 1 must have its text under the key 'text', has the keys content",
        ),
        ({"a.jsonl": "plain"}, r"a\.jsonl, row 1 must be JSON"),
        ({"a.jsonl": '{"text": ""}\n' * 40}, r"train\.bin needs text"),
        ({"a.txt": "x"}, "train.bin needs text"),
    ],
)
def test_prepare_refuses_a_folder_without_enough_text(tmp_path, files, message):
    (tmp_path / "texts").mkdir()
    with pytest.raises((UserError, ValueError, FileNotFoundError), match=message):
        run(write(tmp_path / "texts", files), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_prepare_refuses_a_fraction_or_workers_out_of_range(tmp_path):
    with pytest.raises(ValueError, match=r"--val-fraction must be between 0 and 1, got 1\.5"):
        run("stdlib", tmp_path / "c", val_fraction=1.5)
    with pytest.raises(ValueError, match="--workers must be from 1 to 1024, got 0"):
        prepare.prepare(Prepare("stdlib", tmp_path / "c", workers=0))


def test_command_refuses_a_missing_source_in_one_line(tmp_path):
    command = [warm.python(), "-m", "nanoGPT.prepare", "nowhere.txt", "--out", str(tmp_path / "c")]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the source must be a file, a folder or a name that --help lists")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_openwebtext_matches_the_documents_of_the_hub(tmp_path, workers):
    texts = [f"document {k} — “quoted”\n" * (1 + k % 7) for k in range(200)]
    config = Prepare("openwebtext", tmp_path / "c", "bytes", 0.05, workers)
    prepare.prepare(config, lambda: datasets.Dataset.from_dict({"text": texts}))
    assert documents(tmp_path / "c") == sorted(texts)
    assert read(tmp_path / "c", "val").count(END) == 10
    prepare.prepare(config, None)  # up to date: the Hub is not asked again


def test_openwebtext_reads_the_hubs_converted_copy_where_a_script_is_refused(monkeypatch):
    def load_dataset(name, split, revision="main"):
        if revision == "main":
            raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
        return name, split, revision

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert prepare.load_openwebtext() == ("Skylion007/openwebtext", "train", "refs/convert/parquet")


def test_openwebtext_refuses_an_unreachable_hub_in_one_line(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach 'Skylion007/openwebtext' on the Hub\n(LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match=r"set HF_HOME to it, or give as the source a folder") as caught:
        prepare.load_openwebtext()
    assert "\n" not in str(caught.value)


def test_openwebtext_refuses_unreachable_merges_before_it_downloads(tmp_path, monkeypatch):
    def unreachable(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("tiktoken.get_encoding", unreachable)
    with pytest.raises(FileNotFoundError, match="TIKTOKEN_CACHE_DIR"):
        prepare.prepare(Prepare("openwebtext", tmp_path / "c"), lambda: pytest.fail("downloaded first"))


def test_config_names_the_corpus_that_is_prepared_once(tmp_path):
    config = parse_config(Config, ["--data.folder", str(tmp_path / "stdlib")])
    folder = prepare.prepare_for(config)
    assert data.read_meta(folder)["source"] == "stdlib"
    before = (folder / "meta.json").stat().st_mtime_ns
    assert prepare.prepare_for(config) == folder
    assert (folder / "meta.json").stat().st_mtime_ns == before


def test_config_of_a_custom_corpus_that_is_missing_refuses_and_says_how_to_make_it(tmp_path):
    config = parse_config(Config, ["--data.folder", str(tmp_path / "mine")])
    with pytest.raises(FileNotFoundError, match=r"nanoGPT\.prepare"):
        prepare.prepare_for(config)


# ---- Rows that are not text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": null}', "row 3: the key 'text' must hold text, got null: correct the file, or leave it out"),
        ('{"text": 5}', "row 3: the key 'text' must hold text, got int 5"),
        ('{"text": ["a"]}', "row 3: the key 'text' must hold text, got list"),
        (
            r'{"text": "ab\ud800c"}',
            r"row 3: the text must be valid Unicode, has half a surrogate pair, \\ud800 at character 2",
        ),
        ('{"body": "x", "id": 1}', "row 3 must have its text under the key 'text', has the keys body, id"),
        ("[1]", r"row 3 must have its text under the key 'text', has list \[1\]"),
        ('{"text": "x', "row 3 must be JSON, is not"),
        ("[" * 100_000, "row 3 must be JSON, is not"),
        ('{"text": ' + "9" * 5000 + "}", "row 3 must be JSON, is not"),
    ],
)
def test_rows_of_jsonl_that_are_not_text_refuse_with_file_and_row(tmp_path, row, message):
    write(tmp_path / "texts", {"a.jsonl": '{"text": "x"}\n' * 9, "b.jsonl": '{"text": "x"}\n\n' + row + "\n"})
    with pytest.raises(UserError, match=r"b\.jsonl, " + message) as caught:
        run(tmp_path / "texts", tmp_path / "c")
    assert "\n" not in str(caught.value) and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"text": ["x", None]}, r"b\.parquet, row 2: the key 'text' must hold text, got null"),
        ({"text": [1, 2]}, r"b\.parquet, row 1: the key 'text' must hold text, got int 1"),
        ({"body": ["x"]}, r"b\.parquet must have a column 'text', has body"),
    ],
)
def test_rows_of_parquet_that_are_not_text_refuse_with_file_and_row(tmp_path, column, message):
    root = write(tmp_path / "texts", {})
    root.mkdir()
    parquet.write_table(pyarrow.table({"text": ["x"] * 9}), root / "a.parquet")
    parquet.write_table(pyarrow.table(column), root / "b.parquet")
    with pytest.raises(UserError, match=message):
        run(root, tmp_path / "c")


def test_parquet_that_is_cut_short_or_not_utf8_refuses_with_its_name(tmp_path):
    root = write(tmp_path / "texts", {"a.txt": "x", "b.txt": "y", "c.parquet": b"PAR1"})
    with pytest.raises(UserError, match=r"c\.parquet must be a whole \.parquet file, is not"):
        run(root, tmp_path / "c")
    bad = pyarrow.array([b"\xff"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": bad}), root / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet, row 1: the text must be UTF-8"):
        run(root, tmp_path / "c")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("bad", "message"), [(None, "must hold text, got null"), (7, "must hold text, got int 7")])
def test_openwebtext_refuses_rows_that_are_not_text(tmp_path, workers, bad, message):
    rows = {"text": [7] * 40 if bad else [*["x"] * 39, None]}
    with pytest.raises(UserError, match=rf"Skylion007/openwebtext, shuffled row \d+: the key 'text' {message}"):
        prepare.prepare(
            Prepare("openwebtext", tmp_path / "c", "bytes", 0.05, workers), lambda: datasets.Dataset.from_dict(rows)
        )
    assert not (tmp_path / "c").exists()


def test_openwebtext_refuses_a_set_without_a_column_of_text(tmp_path):
    with pytest.raises(UserError, match="must have a column 'text', has body"):
        prepare.prepare(
            Prepare("openwebtext", tmp_path / "c", "bytes"), lambda: datasets.Dataset.from_dict({"body": ["x"]})
        )
