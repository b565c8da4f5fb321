"""SIT.prepare on a folder of 40 small images in 4 classes: its output, and its state after a failure."""

import json
import os
import shutil
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from common import UserError
from common.config import parse_config
from SIT import convert, digits, files, prepare
from SIT.config import Config
from SIT.encode import encode as encode_images
from SIT.latents import Corrupt, Latents, read_image
from SIT.prepare import Convert, Encode, prepare_for
from tests.ranks import Ranks
from tests.tiny_sit import tiny_vae

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("ant", "bee", "cat", "dog")
SIZE = 16


def write_images(folder):
    """Ten images per class, of odd sizes: colour and grey JPEGs and PNGs, with alpha and with a palette."""
    random = np.random.default_rng(0)
    for k in range(40):
        name, height, width = CLASSES[k % 4], *random.integers(9, 70, size=2)
        pixels = random.integers(256, size=(height, width, 3), dtype=np.uint8)
        mode, suffix = [("RGB", "JPEG"), ("L", "jpg"), ("RGBA", "png"), ("P", "png"), ("RGB", "png")][k % 5]
        path = folder / name / f"{name}_{k}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert(mode).save(path)
    (folder / "ant/notes.txt").write_text("no image")
    return folder


@pytest.fixture
def source(tmp_path):
    return write_images(tmp_path / "source")


@pytest.fixture
def converted(source, tmp_path):
    convert.convert(Convert(source, tmp_path / "data", size=SIZE, workers=2))
    return tmp_path / "data"


def encode(folder, batch_size=7, **options):
    return encode_images(Encode(folder, batch_size=batch_size, device="cpu", workers=2, **options), tiny_vae())


def contents(folder):
    """Every file below a folder, by its path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def no_space(monkeypatch, free):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage(10**12, 10**12 - free, free))


# ---- convert


def test_convert_gives_every_image_at_one_size_with_the_class_of_its_folder(converted):
    record = json.loads((converted / "images/dataset.json").read_text())
    assert record["classes"] == list(CLASSES) and record["size"] == SIZE and len(record["labels"]) == 40
    for file, label in record["labels"]:
        assert file.startswith(CLASSES[label] + "/") and file.endswith(".png")
        with Image.open(converted / "images" / file) as image:
            assert image.size == (SIZE, SIZE) and image.mode == "RGB"
    assert sorted(path.name for path in (converted / "images").iterdir() if path.is_file()) == [
        "dataset.json",
        "request.json",
    ]


def test_convert_matches_centre_crops_of_the_sources(source, converted):
    for path in source.rglob("*.*g"):
        image = read_image(converted / "images" / path.relative_to(source).with_suffix(".png"))
        assert np.array_equal(image, convert.centre_crop(read_image(path), SIZE))


def slow_halving(image):
    """Average 2 x 2 pixels of (3, H, W), H and W even; columns first, and rounded each time, as PIL's box filter is."""
    image = image.astype(int)
    image = (image[:, :, 0::2] + image[:, :, 1::2] + 1) // 2
    return (image[:, 0::2] + image[:, 1::2] + 1) // 2


def test_centre_crop_matches_repeated_halving_and_the_middle_of_the_longer_side():
    image = np.random.default_rng(0).integers(256, size=(3, 32, 48), dtype=np.uint8)
    tall = image.transpose(0, 2, 1)
    # Halved twice they have the size already, so that the bicubic step changes nothing.
    assert np.array_equal(convert.centre_crop(image, 8), slow_halving(slow_halving(image))[:, :, 2:10])
    assert np.array_equal(convert.centre_crop(tall, 8), slow_halving(slow_halving(tall))[:, 2:10])
    assert np.array_equal(convert.centre_crop(image, 32), image[:, :, 8:40])
    assert np.array_equal(convert.centre_crop(image[:, :, :47], 32), image[:, :, 7:39])  # of 15 pixels, 7 to the left
    assert np.array_equal(convert.centre_crop(tall[:, :47], 32), tall[:, 7:39])


@pytest.mark.parametrize(("height", "width"), [(20, 31), (9, 9), (31, 17), (10, 200)])
def test_centre_crop_matches_torchs_antialiased_bicubic_where_nothing_is_halved(height, width):
    image = np.random.default_rng(0).integers(256, size=(3, height, width), dtype=np.uint8)
    scaled = [round(side * 16 / min(height, width)) for side in (height, width)]
    resized = F.interpolate(torch.from_numpy(image)[None], scaled, mode="bicubic", antialias=True)[0]
    top, left = (scaled[0] - 16) // 2, (scaled[1] - 16) // 2
    expected = resized[:, top : top + 16, left : left + 16].numpy()
    # Both round and clip after each direction; their weights are rounded differently.
    assert np.abs(convert.centre_crop(image, 16).astype(int) - expected).max() <= 1


def test_convert_again_continues_where_it_was_interrupted(source, tmp_path, monkeypatch):
    whole, crop, calls = tmp_path / "whole", convert.centre_crop, []
    convert.convert(Convert(source, whole, size=SIZE, workers=1))

    def failing(image, size):
        calls.append(size)
        if len(calls) == 25:
            raise OSError("No space left on device")
        return crop(image, size)

    monkeypatch.setattr(convert, "centre_crop", failing)
    config = Convert(source, tmp_path / "data", size=SIZE, workers=1)
    with pytest.raises(OSError, match="No space"):
        convert.convert(config)
    assert not (tmp_path / "data/images/dataset.json").exists()
    done = len(list((tmp_path / "data/images").rglob("*.png")))
    calls[:] = range(100)
    convert.convert(config)
    assert len(calls) == 100 + 40 - done and done >= 24
    found, expected = contents(tmp_path / "data"), contents(whole)
    assert found == expected


def test_convert_names_a_corrupt_image_or_skips_it_with_a_count(source, tmp_path, capsys):
    (source / "bee/bee_5.JPEG").write_bytes(b"not an image")
    with pytest.raises(Corrupt, match=r"bee/bee_5\.JPEG must be a whole image"):
        convert.convert(Convert(source, tmp_path / "data", size=SIZE, workers=2))
    convert.convert(Convert(source, tmp_path / "data", size=SIZE, on_corrupt="skip", workers=2))
    printed = capsys.readouterr()
    assert "39 images in 4 classes, 1 skipped" in printed.out and "bee_5.JPEG" in printed.err
    labels = json.loads((tmp_path / "data/images/dataset.json").read_text())["labels"]
    assert len(labels) == 39 and "bee/bee_5.png" not in dict(labels)


def test_convert_refuses_a_source_without_a_readable_image(source, tmp_path):
    for path in source.rglob("*_*"):
        path.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"must hold a readable image .* 4 of 4 hold none, the first is ant"):
        convert.convert(Convert(source, tmp_path / "data", size=SIZE, on_corrupt="skip", workers=2))
    assert not (tmp_path / "data/images/dataset.json").exists()


def test_convert_matches_16_bit_images_scaled_to_8_bits(tmp_path):
    levels = np.array([[0, 257, 32_768], [65_280, 65_400, 65_535], [128, 129, 1000]], np.uint16)
    expected = np.round(levels / 65_535 * 255).astype(np.uint8)  # none lies at a half
    for suffix in ("png", "tif"):
        Image.fromarray(levels).save(tmp_path / f"grey.{suffix}")
        image = read_image(tmp_path / f"grey.{suffix}")
        assert image.shape == (3, 3, 3) and all(np.array_equal(channel, expected) for channel in image)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_convert_refuses_pixels_without_a_known_white(tmp_path, dtype):
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "deep.tif")
    with pytest.raises(
        Corrupt, match=r"deep\.tif must be a whole image, .* an unknown range: save 8 or 16 bits"
    ) as caught:
        read_image(tmp_path / "deep.tif")
    assert "\n" not in str(caught.value)


def test_convert_counts_and_names_files_that_are_no_images(source, tmp_path, capsys):
    Image.new("L", (9, 9)).save(source / "ant/a.GIF")
    Image.new("L", (9, 9)).save(source / "dog/b.gif")
    (source / "LICENSE").write_text("free")
    Image.new("RGB", (20, 20)).save(source / "bee/scan.tiff")
    (source / ".thumbnails").mkdir()
    Image.new("L", (9, 9)).save(source / ".thumbnails/t.png")
    convert.convert(Convert(source, tmp_path / "data", size=SIZE, workers=2))
    printed = capsys.readouterr()
    assert "4 files that are not images skipped (.gif: 2, " in printed.err
    assert ".txt: 1" in printed.err and "no suffix: 1" in printed.err and "the first is LICENSE" in printed.err
    record = json.loads((tmp_path / "data/images/dataset.json").read_text())
    assert record["classes"] == list(CLASSES) and ["bee/scan.png", 1] in record["labels"]


def test_convert_refuses_a_class_without_an_image_that_would_shift_the_others(source, tmp_path):
    config = Convert(source, tmp_path / "data", size=SIZE, on_corrupt="skip", workers=2)
    (source / "bird").mkdir()
    with pytest.raises(UserError, match="1 of 5 hold none, the first is bird: convert its files, or move it away"):
        convert.convert(config)
    Image.new("L", (9, 9)).save(source / "bird/b.gif")
    with pytest.raises(UserError, match="1 of 5 hold none, the first is bird"):
        convert.convert(config)
    assert not (tmp_path / "data").exists()
    (source / "bird/b.gif").rename(source / "bird/b.png")  # PIL goes by the content, and reads it
    (source / "bird/b.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="1 of 5 hold none, the first is bird"):
        convert.convert(config)
    assert not (tmp_path / "data/images/dataset.json").exists()


def test_convert_refuses_to_write_into_its_source(source, monkeypatch):
    before = contents(source)
    monkeypatch.chdir(source)
    for out in (source, source / "ant", Path(".")):
        with pytest.raises(UserError, match="--out must be outside the source"):
            convert.convert(Convert(source, out, size=SIZE))
    assert contents(source) == before


def test_convert_refuses_images_outside_of_class_folders_and_names_that_collide(source, tmp_path):
    config = Convert(source, tmp_path / "data", size=SIZE)
    shutil.copy(source / "ant/ant_0.JPEG", source)
    with pytest.raises(UserError, match=r"ant_0\.JPEG outside of one"):
        convert.convert(config)
    (source / "ant_0.JPEG").rename(source / "ant/ant_0.jpg")
    with pytest.raises(UserError, match=r"ant/ant_0\.(jpg|JPEG) and ant/ant_0\.(jpg|JPEG) must have different names"):
        convert.convert(config)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="a folder of images per class, got none"):
        convert.convert(Convert(tmp_path / "empty", tmp_path / "data"))
    with pytest.raises(UserError, match=r"need the folder .*nowhere, which is missing: name a folder that exists"):
        convert.convert(Convert(tmp_path / "nowhere", tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_convert_refuses_a_folder_of_another_size_or_of_other_files(source, converted, tmp_path):
    before = contents(converted)
    with pytest.raises(UserError, match="must have one size, it was made with 16, requested is 8: remove it, or name"):
        convert.convert(Convert(source, converted, size=8))
    assert contents(converted) == before
    (tmp_path / "mine/images").mkdir(parents=True)
    (tmp_path / "mine/images/holiday.png").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"got files without request\.json"):
        convert.convert(Convert(source, tmp_path / "mine"))


@pytest.mark.parametrize("text", ["", '{"size": 1', "[1]", "null", "\udc80"])
def test_convert_refuses_a_damaged_request_in_one_line(source, converted, text):
    (converted / "images/request.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"request\.json must (be|hold) .*: remove .*, or name another") as caught:
        convert.convert(Convert(source, converted, size=SIZE))
    assert "\n" not in str(caught.value)


def test_convert_refuses_too_little_disk_for_the_remaining_images(source, tmp_path, monkeypatch):
    config = Convert(source, tmp_path / "data", size=100, workers=2)  # 30,000 bytes: 8 blocks of 4,096
    no_space(monkeypatch, 40 * 8 * 4096 - 1)
    with pytest.raises(UserError, match=r"images needs 0\.0 GB for 40 files, the disk has 0\.0 GB: make room"):
        convert.convert(config)
    no_space(monkeypatch, 40 * 8 * 4096)
    folder = convert.convert(config)
    assert max(path.stat().st_size for path in folder.rglob("*.png")) <= 8 * 4096
    no_space(monkeypatch, 0)
    convert.convert(config)  # nothing is left to write


# ---- encode


def test_encode_matches_the_vae_on_each_image_and_opens_as_latents(converted):
    folder, tiny = encode(converted), tiny_vae()
    assert folder == converted / "vae-sd"
    record = json.loads((folder / "dataset.json").read_text())
    images = dict(json.loads((converted / "images/dataset.json").read_text())["labels"])
    assert dict(record["labels"]) == {file.replace(".png", ".npy"): label for file, label in images.items()}
    assert record["scaling"] == tiny.scaling and record["vae"] == "stabilityai/sd-vae-ft-mse"
    for file in images:
        latent = np.load(folder / file.replace(".png", ".npy"))
        expected = tiny.encode(torch.from_numpy(read_image(converted / "images" / file))[None])[0]
        assert latent.shape == (6, 8, 8) and latent.dtype == np.float32
        np.testing.assert_allclose(latent, expected, atol=1e-5)  # a batch of 7 or of 1: other sums of float32
    items = Latents(converted, n_class=4)
    assert len(items) == 40 and items.shape == (3, 8, 8) and items.vae == record["vae"]


def test_encode_flip_matches_the_vae_on_mirrored_images_and_makes_flips_possible(converted):
    encode(converted)
    folder, tiny = encode(converted, flip=True), tiny_vae()
    assert folder == converted / "vae-sd-flip"
    image = torch.from_numpy(read_image(converted / "images/dog/dog_3.png"))
    expected = tiny.encode(image.flip(2)[None])[0]
    np.testing.assert_allclose(np.load(folder / "dog/dog_3.npy"), expected, atol=1e-5)
    assert len(Latents(converted, n_class=4, flips=True)) == 40


@pytest.mark.parametrize("written", [0, 1, 7, 18, 39])
def test_encode_that_was_interrupted_resumes_to_the_same_bits(converted, tmp_path, monkeypatch, written, capsys):
    expected = contents(encode(shutil.copytree(converted, tmp_path / "whole")))
    save, calls = np.save, []

    def interrupted(opened, arr):
        calls.append(opened.name)
        if len(calls) > written:
            opened.write(b"half")
            raise KeyboardInterrupt
        save(opened, arr)

    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(converted)
    assert not (converted / "vae-sd/dataset.json").exists() and len(list(converted.rglob("*.npy"))) == written
    with pytest.raises(UserError, match=r"must hold dataset\.json, which is written last"):
        Latents(converted, n_class=4)
    monkeypatch.setattr(np, "save", save)
    encode(converted)
    assert contents(converted / "vae-sd") == expected
    left = 40 - written // 7 * 7
    assert f"of which {left} were encoded now" in capsys.readouterr().out


def test_encode_ends_the_line_of_its_progress_before_an_error(converted, monkeypatch, capsys):
    def full(opened, arr):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space") as caught:
        encode(converted)
    assert capsys.readouterr().err.endswith("\n"), caught  # which keeps the bar alive, as the error's line will find it


def test_encode_again_keeps_existing_latents(converted, capsys):
    folder = encode(converted)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    encode(converted)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")} == times
    assert "40 latents, of which 0 were encoded now" in capsys.readouterr().out


def test_encode_again_replaces_latents_that_are_not_of_the_right_size(converted, capsys):
    folder = encode(converted)
    expected = contents(folder)
    files = [folder / f"ant/ant_{k}.npy" for k in (0, 12, 16)]
    files[0].write_bytes(files[0].read_bytes()[:-1])
    files[1].write_bytes(b"")
    np.save(files[2], np.zeros((6, 8, 9), np.float32))
    encode(converted)
    assert contents(folder) == expected
    assert "of which 7 were encoded now" in capsys.readouterr().out  # the first batch


def encode_on_rank(folder):
    """Encode with rank 1 the slower one; returns whether dataset.json was there before this rank was done."""
    rank, tiny, early = torch.distributed.get_rank(), tiny_vae(), []
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    encode_batch = tiny.encode

    def slow_encode(images):
        time.sleep(0.2 * rank)
        early.append((folder / "vae-sd/dataset.json").exists())
        return encode_batch(images)

    tiny.encode = slow_encode
    encode_images(Encode(folder, batch_size=7, device="cpu", workers=2), tiny)
    return early


def test_encode_on_two_ranks_matches_one_process_bit_for_bit(converted, tmp_path):
    expected = contents(encode(shutil.copytree(converted, tmp_path / "one")))
    with Ranks(2) as ranks:
        early = ranks(encode_on_rank, converted)
    assert early == [[False] * 3, [False] * 3]  # six batches, and dataset.json only after all of them
    assert contents(converted / "vae-sd") == expected


def test_encode_refuses_too_little_disk_for_the_remaining_images(converted, monkeypatch):
    no_space(monkeypatch, 40 * 4096 - 1)  # 6 x 8 x 8 float32 are 1,536 bytes: a block each
    with pytest.raises(UserError, match=r"vae-sd needs 0\.0 GB for 40 files, the disk has 0\.0 GB: make room"):
        encode(converted)
    assert not list(converted.rglob("*.npy"))
    no_space(monkeypatch, 40 * 4096)
    encode(converted)
    for file in ("ant/ant_0.npy", "ant/ant_4.npy"):
        (converted / "vae-sd" / file).unlink()
    no_space(monkeypatch, 2 * 4096)
    encode(converted)


def test_encode_names_an_image_that_is_corrupt_missing_or_of_another_size(converted):
    path = converted / "images/cat/cat_10.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(Corrupt, match=r"cat/cat_10\.png must be a whole image"):
        encode(converted)
    path.unlink()
    with pytest.raises(
        Corrupt, match=r"cat/cat_10\.png must be a whole image, .*No such file.* run `.* convert` again"
    ):
        encode(converted)
    Image.new("RGB", (18, 16)).save(path)
    with pytest.raises(UserError, match=r"the first is \(3, 16, 16\), cat/cat_10\.png \(3, 16, 18\)"):
        encode(converted)


def test_encode_refuses_to_mix_vaes_or_sizes(converted, source, monkeypatch):
    folder = encode(converted)
    expected = contents(folder)
    (source / "vae").mkdir()
    monkeypatch.chdir(source)
    for asked, recorded in (("other/vae", "other/vae"), ("vae", source / "vae")):
        message = rf"vae-sd must have one vae, it was made with stabilityai/sd-vae-ft-mse, requested is {recorded}:"
        with pytest.raises(UserError, match=message):
            encode(converted, vae=asked)
    shutil.rmtree(converted / "images")
    (source / "vae").rmdir()
    convert.convert(Convert(source, converted, size=2 * SIZE, workers=2))
    with pytest.raises(UserError, match=r"must have one image side, it was made with 16, requested is 32"):
        encode(converted)
    assert contents(folder) == expected


def test_encode_adds_latents_of_images_that_were_added(converted, source, capsys):
    folder = encode(converted)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    shutil.copy(source / "dog/dog_3.png", source / "dog/new.png")
    convert.convert(Convert(source, converted, size=SIZE, workers=2))
    encode(converted)
    assert "41 latents, of which 6 were encoded now" in capsys.readouterr().out  # the batch of it: 41 = 5 x 7 + 6
    assert sum(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items()) == 35
    items = Latents(converted, n_class=4)
    assert len(items) == 41 and items.labels[items.names.index("dog/new")] == 3


def test_encode_refuses_a_folder_without_converted_images(tmp_path):
    with pytest.raises(UserError, match=r"images must hold dataset\.json.* run `python -m SIT\.prepare convert`"):
        encode(tmp_path)


# ---- digits, and the command line


def test_train_digits_makes_an_encoder_and_another_network_for_the_judge(tmp_path, monkeypatch, capsys):
    train = digits.train_digits_cnn
    monkeypatch.setattr(digits, "train_digits_cnn", lambda **recipe: train(**recipe, steps=2))
    digits.prepare(tmp_path / "digits")
    encoder, judge = (digits.load_digits_cnn(tmp_path / "digits" / file) for file in ("encoder.pt", "judge.pt"))
    assert judge.width > encoder.width
    assert capsys.readouterr().out.count("of the validation digits") == 2
    monkeypatch.setattr(digits, "train_digits_cnn", None)
    digits.prepare(tmp_path / "digits")  # both are there


def test_command_line_converts_and_encodes_with_a_vae_from_a_folder(source, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["SIT.prepare", *map(str, arguments)])
        prepare.main()  # in this process: one of its own imports torch for seconds

    tiny_vae().autoencoder.save_pretrained(tmp_path / "vae")
    run("convert", source, "--out", tmp_path / "data", "--size", SIZE)
    run("encode", tmp_path / "data", "--vae", tmp_path / "vae", "--device", "cpu")
    assert "100%" in capsys.readouterr().err  # a progress bar, also in a log
    items = Latents(tmp_path / "data", n_class=4)
    assert len(items) == 40 and items.vae == str(tmp_path / "vae")
    with pytest.raises(UserError, match=r"^size must be 1 or more; got 0$"):
        run("convert", source, "--out", tmp_path / "data", "--size", 0)
    with pytest.raises(UserError, match=f"^{source} "):
        run("encode", tmp_path / "data", "--vae", source, "--device", "cpu")


def test_prepare_makes_the_files_of_a_config_that_extends_the_one_of_the_digits(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(digits, "prepare", lambda folder: made.append(folder) or folder)
    child = tmp_path / "child.toml"
    child.write_text(f'extends = "{ROOT}/SIT/configs/digits.toml"\nsteps = 3\n')
    assert prepare_for(parse_config(Config, [str(child)])) == [digits.FOLDER] == made
    made.clear()
    prepare_for(parse_config(Config, [str(child), "--objective.encoder_folder", str(tmp_path)]))
    assert set(made) == {digits.FOLDER, tmp_path}
    made.clear()
    assert prepare_for(parse_config(Config, [str(ROOT / "SIT/configs/sit_b2_imagenet.toml")])) == made == []
