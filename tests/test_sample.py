"""nanoGPT.sample on a run made here: the text is what the saved weights generate."""

import json
import math

import numpy as np
import pytest
import torch

from common import UserError, checkpoint
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
    with pytest.raises(UserError, match=r"config\.json must be readable.*No such file.*: give the folder of a run"):
        sample(Sample(tmp_path / "nowhere"))
    (folder / "checkpoints").rename(folder / "moved")
    with pytest.raises(FileNotFoundError, match="must hold a checkpoint"):
        sample(Sample(folder))
    write_config(folder, tmp_path / "no-corpus")
    with pytest.raises(FileNotFoundError, match=r"python -m nanoGPT\.prepare"):
        sample(Sample(folder))


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", "null", '{"experiment": "nanogpt", "config": []}', '{"experiment": "nanogpt", "config": {}}'],
)
def test_sample_refuses_a_damaged_config_in_one_line(run, content):
    folder, _ = run
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json must (be|hold) ") as caught:
        sample(Sample(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 1e-30, 1e-6])
def test_sample_at_a_vanishing_temperature_matches_the_likeliest(run, temperature):
    likeliest, near = (sample(Sample(run[0], "ab", 12, t, device="cpu")) for t in (0.0, temperature))
    assert near == likeliest


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"top_k": -1}, "top_k must be 0 or more; got -1"),
        ({"temperature": math.nan}, "temperature must be 0 or more; got nan"),
        ({"temperature": math.inf}, "temperature must be finite"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"seed": 2**70}, r"--seed must be below 2\*\*64"),
    ],
)
def test_sample_refuses_an_option_out_of_its_range(run, option, said):
    with pytest.raises(UserError, match=said):
        sample(Sample(run[0], device="cpu", **option))


def test_generate_refuses_a_bad_temperature_and_weights_that_diverged(run):
    _, model = run
    for temperature in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be 0 or more, and finite"):
            model.generate(torch.zeros(1, 1, dtype=torch.long), 1, temperature)
    model.wte.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="logits must be finite, are not: the weights have diverged"):
        model.generate(torch.zeros(1, 1, dtype=torch.long), 1)


def test_sample_refuses_another_experiment_and_a_model_of_other_fields(run, tmp_path):
    folder, _ = run
    write_config(folder, tmp_path / "corpus", experiment="sit")
    with pytest.raises(UserError, match="is of sit"):
        sample(Sample(folder))
    write_config(folder, tmp_path / "corpus")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"n_layer"', '"n_layers"'))
    with pytest.raises(UserError, match="unknown key 'n_layers'; the nearest known key is 'n_layer'"):
        sample(Sample(folder))
