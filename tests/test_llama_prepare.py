"""Llama.prepare against its source files, and its tokenizer against the bytes of text."""

import json
from pathlib import Path

import pytest

from common import UserError
from common.corpus import library_files, split_files
from Llama import arithmetic, evaluate, weights
from Llama import prepare as prepare_program
from Llama.config import parse_config
from Llama.data import build_tokenizer
from Llama.prepare import Prepare, prepare

ANY = ("--model.flavor", "debug", "--optimizer.lr", "1")


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "source").mkdir()
    for i in range(20):
        (tmp_path / f"source/{i}.txt").write_text(f"text {i} of the files\n" * (i + 1))
    return tmp_path / "source"


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_folder_matches_the_files_split_as_every_corpus_here(source, tmp_path):
    folder = prepare(Prepare(str(source), tmp_path / "out", vocab_size=300, val_fraction=0.2))
    parts = split_files(source, sorted(source.iterdir()), 0.2)
    for split in ("train", "val"):
        assert texts(folder / f"{split}.jsonl") == [path.read_text() for path, _, _ in parts[split]]


def test_documents_of_a_long_text_match_it_cut_at_ends_of_lines(source, tmp_path):
    folder = prepare(Prepare(str(source), tmp_path / "out", vocab_size=300, document_length=100))
    documents = texts(folder / "train.jsonl")
    paths = [path for path, _, _ in split_files(source, sorted(source.iterdir()), 0.05)["train"]]
    assert "".join(documents) == "".join(path.read_text() for path in paths)
    line = len("text 10 of the files\n")
    assert all(len(document) < 100 + line and document.endswith("\n") for document in documents)
    assert any(len(document) >= 100 for document in documents)


def test_tokenizer_matches_the_text_it_encodes_and_decodes(source, tmp_path):
    folder = prepare(Prepare(str(source), tmp_path / "out", vocab_size=300))
    tokenizer = build_tokenizer(parse_config(["--model.hf_assets_path", str(folder), *ANY]))
    text = "text 7 of\n\tthe files, and é 漢 \x00"
    tokens = tokenizer.encode(text, add_bos=True, add_eos=True)
    assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.decode(tokens[1:-1]) == text
    assert tokenizer.get_vocab_size() <= 300
    assert len(tokens) < len(text.encode())  # it has learnt words


def test_prepare_again_leaves_a_matching_folder_alone_and_refuses_another(source, tmp_path, capsys):
    folder = prepare(Prepare(str(source), tmp_path / "out", vocab_size=300))
    before = (folder / "meta.json").stat().st_mtime_ns
    prepare(Prepare(str(source), folder, vocab_size=300))
    assert (folder / "meta.json").stat().st_mtime_ns == before
    printed = capsys.readouterr()
    assert "up to date" in printed.out and printed.err.count("train.jsonl: 0") == 1  # a bar
    with pytest.raises(ValueError, match="was made with vocab_size = 300, requested is 400"):
        prepare(Prepare(str(source), folder, vocab_size=400))
    (source / "0.txt").write_text("changed")
    prepare(Prepare(str(source), folder, vocab_size=300))
    assert any("changed" in texts(folder / f"{split}.jsonl") for split in ("train", "val"))


def test_prepare_refuses_unusable_input_in_one_line(source, tmp_path):
    for options, message in [
        ({"val_fraction": 1.0}, "between 0 and 1"),
        ({"vocab_size": 100}, "--vocab-size must be 258 "),
        ({"vocab_size": 10**30}, "--vocab-size must be 258 "),
        ({"document_length": 0}, "--document-length must be 1 to"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare(Prepare(str(source), tmp_path / "out", **options))
    with pytest.raises(ValueError, match=r"has no meta.json: choose another --out"):
        prepare(Prepare(str(source), source))
    with pytest.raises(FileNotFoundError, match="the source must be a file"):
        prepare(Prepare(str(tmp_path / "nowhere"), tmp_path / "out"))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty.txt must hold text for training and for validation, has 0 documents"):
        prepare(Prepare(str(tmp_path / "empty.txt"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "[]", "null", "5", "{", '"x"'])
def test_damaged_meta_of_a_prepared_folder_refuses_with_its_path(source, tmp_path, content):
    folder = prepare(Prepare(str(source), tmp_path / "out", vocab_size=300))
    (folder / "meta.json").write_text(content)
    with pytest.raises(UserError, match=r"meta.json must .*: restore it"):
        prepare(Prepare(str(source), folder, vocab_size=300))


@pytest.mark.parametrize("options", [{"train": 0}, {"val": -1}, {"train": 10**12}, {"seed": -1}])
def test_word_problems_out_of_range_refuse_in_one_line(tmp_path, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"--{name} must be"):
        arithmetic.make(arithmetic.Options(tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("program", [prepare_program, arithmetic, evaluate, weights])
def test_unknown_options_of_programs_are_one_line(program, monkeypatch):
    monkeypatch.setattr("sys.argv", [program.__name__, "x", "--nosuch-flag", "1"])
    with pytest.raises(UserError, match="command line: ") as error:
        program.main()
    assert "\n" not in str(error.value)


def test_standard_library_has_the_validation_files_of_nanogpt():
    root, files = library_files()
    assert 0.01 < len(split_files(root, files, 0.05)["val"]) / len(files) < 0.1
