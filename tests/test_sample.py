"""nanoGPT.sample on a run made here: the text is what the saved weights generate."""

import json

import numpy as np
import pytest
import torch

from common import checkpoint
from nanoGPT import data
from nanoGPT.model import GPT, GPTConfig
from nanoGPT.sample import Sample, sample

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context": 8, "bias": False, "dropout": 0.5}


@pytest.fixture
def run(tmp_path):
    """A run's folder, and the model whose weights its checkpoint holds."""
    tokens = [data.Encoded(np.arange(100), 100)]
    data.write_corpus(tmp_path / "corpus", {"train": tokens, "val": tokens}, {"tokenizer": "bytes"})
    model = GPT(GPTConfig(**SHAPE, vocab_size=320))
    torch.nn.init.normal_(model.wte.weight, std=0.5)
    folder = tmp_path / "run"
    checkpoint.save(folder / "checkpoints", 3, model, torch.optim.SGD(model.parameters(), lr=0.1), {})
    write_config(folder, tmp_path / "corpus")
    return folder, model.eval()


def write_config(folder, corpus, experiment="nanogpt"):
    settings = {"model": {**SHAPE, "vocab_size": 0}, "data": {"folder": str(corpus)}, "seed": 1}
    (folder / "config.json").write_text(json.dumps({"experiment": experiment, "config": settings}))


def test_sample_matches_the_likeliest_bytes_of_the_saved_weights(run):
    folder, model = run
    text = sample(Sample(folder, "ab", tokens=12, temperature=0, device="cpu"))
    tokens = [256, 97, 98]  # a document begins after an end-of-text
    for _ in range(12):
        scores = model(torch.tensor([tokens[-8:]]))[0][0, -1, :257]  # not the padding of the vocabulary
        tokens.append(scores.argmax().item())
    assert text == data.tokenizer("bytes").decode(tokens[1:])


def test_sample_matches_itself_for_a_seed_alone(run):
    def draw(seed):
        return sample(Sample(run[0], "x = ", tokens=20, seed=seed, device="cpu"))

    first = draw(0)
    torch.rand(5)
    assert draw(0) == first != draw(1)
    assert first.startswith("x = ")


def test_sample_of_an_empty_prompt_matches_the_start_of_a_document(run):
    assert len(sample(Sample(run[0], "", tokens=3, temperature=0, device="cpu"))) > 0
    assert sample(Sample(run[0], "", tokens=0, device="cpu")) == ""


def test_sample_refuses_what_is_not_there(run, tmp_path):
    folder, _ = run
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        sample(Sample(tmp_path / "nowhere"))
    (folder / "checkpoints").rename(folder / "moved")
    with pytest.raises(FileNotFoundError, match="must hold a checkpoint"):
        sample(Sample(folder))
    write_config(folder, tmp_path / "no-corpus")
    with pytest.raises(FileNotFoundError, match=r"python -m nanoGPT\.prepare"):
        sample(Sample(folder))


def test_sample_refuses_another_experiment_and_negative_knobs(run, tmp_path):
    folder, _ = run
    with pytest.raises(ValueError, match="--top-k must be at least 0, got -1"):
        sample(Sample(folder, top_k=-1))
    write_config(folder, tmp_path / "corpus", experiment="sit")
    with pytest.raises(ValueError, match="is of sit"):
        sample(Sample(folder))
