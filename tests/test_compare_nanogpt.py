"""The comparison with a checkout of karpathy/nanoGPT: both are run, alternately, and their medians divided."""

import sys

import pytest
import tiny_gpt
import warm

from common import BadValue, UserError
from scripts.compare_nanogpt import main

# A stand-in of their train.py, which must find what it reads in its working folder.
TRAIN = """
import pickle
from ast import literal_eval
assert open("configurator.py").read() == "# theirs"
given = dict(word[2:].split("=", 1) for word in __import__("sys").argv[1:])
assert given["dataset"] == "corpus" and (given["n_layer"], given["block_size"]) == ("2", "32"), given
vocab = pickle.load(open("data/corpus/meta.pkl", "rb"))["vocab_size"]
assert vocab == 320 and len(open("data/corpus/train.bin", "rb").read()) > 1000
for step in range(int(given["max_iters"]) + 1):
    print(f"iter {step}: loss 1.0, time {1000.0 if step == 0 else 4.0:.2f}ms, mfu 1%")
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name, text in {"train.py": TRAIN, "model.py": "", "configurator.py": "# theirs"}.items():
        (folder / name).write_text(text)
    return folder


def run(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "executable", warm.python())
    monkeypatch.setattr(sys, "argv", ["compare_nanogpt", *map(str, words)])
    main()


@pytest.mark.slow
def test_table_holds_both_medians_and_their_ratio(monkeypatch, checkout, tmp_path, capsys):
    config = tiny_gpt.write_config(tmp_path, tiny_gpt.write_corpus(tmp_path), "")
    run(monkeypatch, checkout, config, "--steps", 8, "--rounds", 1)
    _, _, rule, row, last = capsys.readouterr().out.splitlines()
    mine, other, ratio = (float(cell) for cell in row.split("|")[2:5])
    assert rule.startswith("|---") and other == 4.0 and mine > 0
    assert ratio == pytest.approx(mine / other, abs=0.1 / 4)
    assert last.split("|")[1].strip() == "median"


def test_a_folder_that_is_no_checkout_and_too_few_steps_refuse_in_one_line(monkeypatch, checkout, tmp_path):
    with pytest.raises(UserError, match=r"must hold karpathy/nanoGPT's train.py; .* is missing"):
        run(monkeypatch, tmp_path)
    with pytest.raises(BadValue, match="steps must be 4 or more"):
        run(monkeypatch, checkout, "--steps", 3)
