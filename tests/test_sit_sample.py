"""SIT/sample.py: images of the averaged model for any ranks and batches; written files; refusals."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from ranks import Ranks
from tiny_sit import tiny_vae
from tiny_sit_run import ONE, random_model
from torch import Tensor, nn

from common import UserError, checkpoint, launch
from common.launch import Process
from SIT import sample as program
from SIT import sampling
from SIT.data import to_images
from SIT.model import ModelConfig, SiT
from SIT.sample import Options, Sampler
from SIT.sampling import draw, load_run, open_decoder, picture, sample

OBJECTIVE = {"path": "linear", "prediction": "velocity", "label_dropout": 0.1}
CPU = torch.device("cpu")
SAMPLERS = [Sampler(3, "euler"), Sampler(3, "heun"), Sampler(3, "sde"), Sampler(3, "heun", guidance=2.0)]


@pytest.fixture(scope="module")
def model() -> SiT:
    torch.manual_seed(0)
    return random_model()


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> Path:
    """A run's folder; its checkpoint holds `model` as the average of another."""
    folder = tmp_path_factory.mktemp("run")
    both = nn.ModuleDict({"model": random_model(), "average": model})
    checkpoint.save(folder / "checkpoints", 3, both, torch.optim.SGD(both["model"].parameters(), lr=0.1), {})
    write_record(folder, model.config)
    return folder


def write_record(folder: Path, config: ModelConfig, experiment: str = "sit") -> None:
    settings = {
        "model": asdict(config),
        "data": {"kind": "digits", "vae": ""},
        "objective": OBJECTIVE,
        "optimizer": {"name": "olion"},
    }
    (folder / "config.json").write_text(json.dumps({"experiment": experiment, "config": settings}))


def drawn(model: SiT, numbers: list[int], sampler: Sampler = SAMPLERS[1], seed: int = 0) -> Tensor:
    return draw(model, numbers, sampler, OBJECTIVE, seed, CPU)


def sample_on_ranks(options: Options) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    sample(options, Process(rank, rank, size, CPU, size))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_of_small_batches_match_those_of_one(model, sampler):
    whole = drawn(model, list(range(7)), sampler)  # (7, 1, 8, 8)
    parts = [drawn(model, numbers, sampler) for numbers in ([0, 1, 2], [3], [4, 5, 6])]
    # fp32 products of matrices of other sizes, a few times over.
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-4)
    others = [(whole[i] - whole[j]).abs().max() for i in range(7) for j in range(i)]
    assert min(others) > 0.1


def test_images_of_heun_match_the_limit_of_small_steps_better_than_euler_s(model):
    limit = drawn(model, [0, 1], Sampler(300, "euler"))
    errors = {sampler.method: (drawn(model, [0, 1], sampler) - limit).abs().mean() for sampler in SAMPLERS[:3]}
    assert errors["sde"] > 2 * errors["euler"] > 4 * errors["heun"]


@pytest.mark.parametrize("sampler", SAMPLERS[1:3])
def test_images_match_themselves_for_a_seed_alone(model, sampler):
    first, again, other = (drawn(model, [0, 1], sampler, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().amax(dim=(1, 2, 3)).min() > 0.1


def test_images_of_two_ranks_match_those_of_one_process(run, tmp_path):
    options = Options(run=run, count=11, batch_size=3, steps=3, method="sde", npz=True, device="cpu")
    sample(replace(options, out=tmp_path / "one.png", batch_size=4), ONE)
    with Ranks(2) as ranks:
        ranks(sample_on_ranks, replace(options, out=tmp_path / "two.png"))  # the second has none in the last round
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert np.array_equal(one["arr_1"], two["arr_1"])
    # Rounding may take a pixel over the edge between two levels.
    assert abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
    assert len({image.tobytes() for image in two["arr_0"]}) == 11


def test_images_in_bfloat16_match_those_in_float32(model):
    whole, half = (
        draw(model, [0, 1], SAMPLERS[1], OBJECTIVE, 0, CPU, dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32 and not torch.equal(half, whole)
    # A velocity is rounded to 8 bits, and six evaluations of it add up to images of about 1.
    torch.testing.assert_close(half, whole, rtol=0, atol=0.1)


def test_npz_matches_the_images_in_the_layout_of_the_adm_evaluator(run, model, tmp_path):
    out = tmp_path / "made" / "digits.png"
    assert sample(Options(run=run, count=12, steps=3, npz=True, out=out, device="cpu"), ONE) == out
    written = np.load(out.with_suffix(".npz"))
    images = written["arr_0"]
    assert (images.shape, images.dtype, list(written)) == ((12, 8, 8, 3), np.uint8, ["arr_0", "arr_1"])
    assert written["arr_1"].tolist() == [*range(10), 0, 1]
    expected = to_images(drawn(model, list(range(12))))  # (12, 1, 8, 8)
    for channel in range(3):
        assert np.array_equal(images[..., channel], expected[:, 0].numpy())
    assert images.std() > 10


def test_model_of_a_run_matches_its_average_without_the_projector(run, model):
    loaded, settings = load_run(run, CPU)
    assert settings["objective"] == OBJECTIVE and not loaded.training and loaded.projector is None
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_guidance_changes_the_images_inside_its_interval_alone(model):
    plain = drawn(model, [0, 1])
    assert torch.equal(drawn(model, [0, 1], Sampler(3, guidance=3.0, interval=(0.4, 0.6))), plain)  # no step is there
    late = drawn(model, [0, 1], Sampler(3, guidance=3.0, interval=(0.0, 0.4)))
    everywhere = drawn(model, [0, 1], Sampler(3, guidance=3.0))
    assert min((a - b).abs().max() for a, b in ((late, plain), (everywhere, plain), (late, everywhere))) > 0.01


def test_figure_matches_its_images_row_by_row():
    images = torch.arange(5, dtype=torch.uint8).mul(40).view(5, 1, 1, 1).expand(5, 3, 2, 2).clone()
    images[:, 1] = 7
    images[4, 0, 0, 1] = 255  # in the third image from the left, the pixel at the top right
    pixels = np.asarray(picture(images, columns=3, least_side=4))  # (8, 12, 3): two rows, twice as large
    assert pixels.shape == (8, 12, 3)
    assert pixels[0, ::4, 0].tolist() == [0, 40, 80] and pixels[4, ::4, 0].tolist() == [120, 160, 0]
    assert (pixels[..., 1] == 7).sum() == 5 * 16 and pixels[4:, 8:].max() == 0  # the sixth place is empty
    assert pixels[4:6, 6:8, 0].tolist() == [[255, 255]] * 2 and pixels[6, 6, 0] == 160


def test_figure_of_a_run_shows_its_first_hundred_in_a_square(run, tmp_path):
    sample(Options(run=run, count=101, steps=1, out=tmp_path / "a.png", device="cpu"), ONE)
    assert Image.open(tmp_path / "a.png").size == (320, 320)


def test_folder_that_is_no_run_refuses_in_one_line(model, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"name the folder of a SIT run") as refusal:
            load_run(folder, CPU)
        assert "\n" not in str(refusal.value)
    for content in ("", "{", "{}", "[]", "null", '{"experiment": "sit"}', '{"experiment": "sit", "config": []}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json must (be|hold) .*: name the folder of a SIT run"):
            load_run(tmp_path, CPU)
    write_record(tmp_path, model.config, experiment="nanogpt")
    with pytest.raises(UserError, match=r"need the folder of a SIT run, got .* of nanogpt"):
        load_run(tmp_path, CPU)
    write_record(tmp_path, model.config)
    with pytest.raises(UserError, match=r"must have a checkpoint"):
        load_run(tmp_path, CPU)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "count must be 1 or more; got 0"),
        (["--batch-size", "-3"], "batch_size must be 1 or more; got -3"),
        (["--seed", "-1"], "seed must be 0 or more; got -1"),
        (["--guidance", "nan"], "--guidance must be a number up to 1000, got nan"),
        (["--guidance", "1e38"], "--guidance must be a number up to 1000, got 1e+38"),
        (["--guided-channels", "2"], "--guided-channels must be at most the model's 1, got 2"),
        (["--count", "1000000000000", "--steps", "1"], "--count needs 64,000 GB"),
        (["--cout", "3"], "command line: Unrecognized options: --cout, 3; the nearest is --count"),
        (["--out", "a.npz", "--npz"], "--out must be the picture, a .png, beside which --npz writes its file; got"),
        (["--guidance", "2", "--interval", "0.8", "0.2"], "a guidance interval must be 0 <= low <= high <= 1"),
    ],
)
def test_bad_option_ends_the_program_with_one_line(run, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["SIT.sample", str(run), "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        launch.main_guard(program.main)
    assert ended.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes(range(256)) * 9),
        lambda path: path.write_text('{"a": 1}'),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"ema": 3}, path),
        lambda path: torch.save({"x_embedder.proj.weight": torch.zeros(3)}, path),
        lambda path: torch.save(
            {"x_embedder.proj.weight": torch.zeros(4, 3, 2, 2), "pos_embed": torch.zeros(())}, path
        ),
    ],
)
def test_sample_of_any_file_refuses_in_one_line(tmp_path, write):
    write(tmp_path / "any.pt")
    with pytest.raises(UserError, match=r"any\.pt must be a published SiT or REPA checkpoint, is not") as refusal:
        sample(Options(run=tmp_path / "any.pt", device="cpu"), ONE)
    assert "\n" not in str(refusal.value)


def test_images_that_are_not_finite_refuse(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "draw", lambda *given: draw(*given) * torch.nan)
    with pytest.raises(UserError, match="are not: lower --guidance"):
        sample(Options(run=run, count=1, steps=1, out=tmp_path / "a.png", device="cpu"), ONE)
    assert not (tmp_path / "a.png").exists()


def test_guidance_refuses_a_model_that_never_went_without_a_class(run, tmp_path, model, monkeypatch):
    monkeypatch.setitem(OBJECTIVE, "label_dropout", 0.0)
    write_record(tmp_path, model.config)
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    with pytest.raises(UserError, match=r"label_dropout above 0, .* has 0: leave --guidance out"):
        sample(Options(run=tmp_path, guidance=2.0, device="cpu"), ONE)
    sample(Options(run=tmp_path, count=1, steps=1, device="cpu"), ONE)


def test_npz_is_whole_or_not_there_and_too_small_a_disk_refuses_before_all_is_drawn(run, tmp_path, monkeypatch):
    out, options = tmp_path / "a.png", Options(run=run, count=30, batch_size=10, steps=1, npz=True, device="cpu")
    rounds = []
    monkeypatch.setattr(sampling, "draw", lambda *given: rounds.append(0) or draw(*given))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 4096}))
    with pytest.raises(UserError, match="make room"):
        sample(replace(options, out=out), ONE)
    assert len(rounds) == 1
    monkeypatch.undo()

    def interrupted(opened, *arrays):
        opened.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample(replace(options, out=out), ONE)
    assert not out.with_suffix(".npz").exists()


def test_decoder_of_another_vae_is_refused(tmp_path):
    tiny_vae().autoencoder.save_pretrained(tmp_path)
    decode = open_decoder("latents", str(tmp_path), 3, CPU, 0.18215)
    assert decode(torch.zeros(1, 3, 4, 4)).shape == (1, 3, 8, 8)
    for channels, scaling in ((4, None), (3, 0.13)):
        with pytest.raises(UserError, match=r"need the VAE of the latents, .* has 3 and 0.18215: name the other"):
            open_decoder("latents", str(tmp_path), channels, CPU, scaling)
