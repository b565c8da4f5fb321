"""scripts.curvature on losses whose H is known in closed form, and on runs, against derivatives and recorded losses."""

import json
import sys

import pytest
import torch
from torch.func import functional_call

from common import UserError, checkpoint
from common.launch import main_guard, seed_all
from nanoGPT import data
from nanoGPT.model import GPT, GPTConfig
from scripts.curvature import __main__ as program
from scripts.curvature.growth import WHOLE, draw_direction, fit, growth, measure
from scripts.curvature.subjects import open_run

RADII = [10 ** (k / 2) for k in range(-10, 5)]
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context": 8, "bias": False, "dropout": 0.5}


@pytest.mark.parametrize("shape", [(7, 4), (5, 5)])
def test_directions_keep_the_length_of_every_vector(shape):
    direction = draw_direction(shape, torch.Generator().manual_seed(1))
    torch.testing.assert_close(direction.mT @ direction, torch.eye(shape[1], dtype=torch.float64))


def test_wide_directions_keep_the_mean_square_of_lengths_with_the_documented_spread():
    m, n = 8, 24
    direction = draw_direction((m, n), torch.Generator().manual_seed(1))
    torch.testing.assert_close(direction @ direction.mT, torch.eye(m, dtype=torch.float64) * n / m)
    u = torch.nn.functional.normalize(torch.randn(20_000, n, dtype=torch.float64), dim=1)
    squares = (u @ direction.mT).square().sum(1)
    spread = (2 * (n / m - 1) / (n + 2)) ** 0.5
    assert float(squares.mean()) == pytest.approx(1, abs=5 * spread / 20_000**0.5)
    assert float(squares.std()) == pytest.approx(spread, rel=0.03)


def test_directions_are_uniform():
    """Entries of a uniform orthogonal matrix have mean 0 and mean square 1 / m; QR's signs alone give a mean."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_direction((3, 3), generator) for _ in range(2000)])
    assert float(drawn.mean(0).abs().max()) < 5 * (1 / 3 / 2000) ** 0.5
    assert float((drawn.square().mean(0) - 1 / 3).abs().max()) < 5 * (0.09 / 2000) ** 0.5


@pytest.mark.parametrize(("power", "constant"), [(2, 0.5), (4, 3.0), (2.5, 1.0)])
def test_a_power_of_the_length_of_wu_matches_its_closed_form(power, constant):
    """f = constant sum ||(W - W0) u||^p has H(r) = constant sum ||u||^p r^p, whatever the direction."""
    weight = torch.randn(9, 5, dtype=torch.float64)
    start, inputs = weight.clone(), torch.randn(5, 3, dtype=torch.float64)

    def loss():
        return 1.0 + constant * ((weight - start) @ inputs).square().sum(0).pow(power / 2).sum()

    known = constant * float(inputs.norm(dim=0).pow(power).sum())
    found, rounding = measure(loss, {"w": weight}, RADII, directions=3, seed=0)
    assert torch.equal(weight, start)  # put back exactly
    for of_direction in found["w"]:
        for radius, value in zip(RADII, of_direction, strict=True):
            assert value == pytest.approx(known * radius**power, rel=1e-9, abs=100 * 2.3e-16)  # 1 is added to it
    fitted = fit(RADII, found["w"], max(rounding, 1e-15))
    assert fitted["exponent"] == pytest.approx(power, abs=2e-3)
    assert fitted["steepest"] == pytest.approx(power, abs=5e-3)
    torch.testing.assert_close(torch.tensor(found[WHOLE]), torch.tensor(found["w"]))  # of a single matrix


def test_an_odd_part_is_cancelled_and_saturation_is_left_out():
    weight = torch.zeros(6, 6, dtype=torch.float64)
    slope, cubic = (torch.randn(6, 6, dtype=torch.float64) for _ in range(2))

    def loss():
        square = weight.square().sum()
        return (slope * weight).sum() + (cubic * weight**3).sum() + 2 * square / (1 + square)

    found, _ = measure(loss, {"w": weight}, RADII, directions=4, seed=0)
    for radius, value in zip(RADII, found["w"][2], strict=True):
        square = 6 * radius**2  # ||r D||_F^2
        assert value == pytest.approx(2 * square / (1 + square), rel=1e-6, abs=1e-13 * max(1, radius**3))
    fitted = fit(RADII, found["w"], 1e-16)
    assert fitted["plateau"] == pytest.approx(12, rel=1e-3)  # 2 * 6
    assert fitted["exponent"] < 2.001 and fitted["steepest"] == pytest.approx(2, abs=1e-3)
    assert fitted["leaves"] == pytest.approx(10**-0.5)  # 6 r^2 > 0.1 first at 0.316


def test_values_below_the_rounding_or_negative_are_not_fitted():
    below, negative = [[1e-15 * r for r in RADII]] * 2, [[-(r**2) for r in RADII]] * 2
    for found in (below, negative):
        assert set(fit(RADII, found, 1e-15).values()) == {None}
    mixed = fit(RADII, [[r**3 for r in RADII], [3 * r**3 for r in RADII]], 1e-13)
    assert mixed["exponent"] == pytest.approx(3) and mixed["error"] == pytest.approx(0, abs=1e-12)
    assert mixed["decades"] == pytest.approx(5.5)  # from 10^-3.5, where r^3 is above 100 times the rounding


@pytest.fixture
def run(tmp_path):
    """A run's folder with checkpoints of steps 3 and 5, and the model as it was at step 3."""
    tokens = [data.Encoded((torch.arange(200).numpy() * 7) % 100, 200)]
    data.write_corpus(tmp_path / "corpus", {"train": tokens, "val": tokens}, {"tokenizer": "bytes"})
    seed_all(1)
    model = GPT(GPTConfig(**SHAPE, vocab_size=320))
    folder, optimizer = tmp_path / "run", torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"model": {**SHAPE, "vocab_size": 0}, "data": {"folder": str(tmp_path / "corpus")}, "seed": 1}
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in (3, 5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        checkpoint.save(folder / "checkpoints", step, model, optimizer, {})
        if step == 3:
            middle = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (folder / "config.json").write_text(json.dumps({"experiment": "nanogpt", "config": settings}))
    return folder, initial, middle


def test_a_run_opens_at_each_of_its_steps(run):
    folder, initial, middle = run
    subject = open_run(folder, rows=2)
    assert subject.steps == [0, 3, 5]
    assert set(subject.matrices) == {
        f"blocks.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    for step, weights in ((3, middle), (0, initial)):
        subject.load(step)
        for name, tensor in subject.model.state_dict().items():
            torch.testing.assert_close(tensor, weights[name].double(), rtol=0, atol=0)
    with pytest.raises(UserError, match="no checkpoint of step 4"):
        subject.load(4)


def test_growth_on_a_gpt_matches_the_second_derivative(run):
    """For small r, H(r) / r^2 is half of D' Hessian D."""
    subject = open_run(run[0], rows=2)
    subject.load(5)
    name = "blocks.0.mlp.c_fc.weight"
    weight = subject.matrices[name]
    direction = draw_direction(weight.shape, torch.Generator().manual_seed(3))
    tokens = data.load(run[0].parent / "corpus", "val")
    batch = data.windows(tokens, data.validation_windows(tokens, count=2, context=8), 8)

    def at(step):
        return functional_call(subject.model, {name: weight + step * direction}, batch)[1]

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(at(step), step, create_graph=True)
    (second,) = torch.autograd.grad(first, step)
    assert float(at(torch.zeros(()))) == float(subject.loss())
    (found,) = growth(subject.loss, [weight], [direction], [1e-3])
    assert found == pytest.approx(float(second) / 2 * 1e-6, rel=1e-4)  # the next order is r^4


@pytest.mark.slow
def test_the_program_measures_draws_and_refuses(run, tmp_path, monkeypatch, capsys):
    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["curvature", *arguments])
        main_guard(program.main)

    out = tmp_path / "picture.png"
    options = ["--directions", "2", "--decades", "-4", "-1", "--per-decade", "1", "--out", str(out)]
    start("--run", str(run[0]), "--steps", "0", "5", *options)
    record = json.loads(out.with_suffix(".json").read_text())
    assert list(record["steps"]) == ["0", "5"] and out.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "blocks.0.attn.c_attn.weight" in printed and WHOLE in printed
    assert program.table(record) in printed  # from the record alone
    for wrong in (["--steps", "4"], ["--directions", "0"], ["--decades", "2", "1"], ["--run", str(tmp_path)]):
        with pytest.raises(SystemExit):
            start("--run", str(run[0]), *options, *wrong)
        assert len(capsys.readouterr().err.splitlines()) == 1
