"""SIT.data and SIT.latents: items with their latents and labels, in an order of (seed, step) alone; damage is named."""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from common import UserError
from SIT import data, latents

Latents = partial(latents.Latents, n_class=3)
ROOT = Path(__file__).resolve().parents[1]
SHAPE = (2, 3, 4)  # of a latent, (C, H, W); H and W differ, so that none is taken for the other


def write_image(path, value, side=5):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), value, dtype=np.uint8)).save(path)


def write_latent(path, value, deviation=0.0, shape=SHAPE, dtype=np.float32):
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = np.full(shape, value, dtype), np.full(shape, deviation, dtype)
    np.save(path, np.concatenate(halves))


def write_labels(folder, labels, **more):
    (folder / "vae-sd/dataset.json").write_text(json.dumps({"labels": labels} | more))


def write_folder(folder, count=12, **options):
    """A folder whose item k of class k mod 3 has the image k and the mean k."""
    labels = []
    for k in range(count):
        name = f"class{k % 3}/{k}"  # by name, 10 comes before 2
        write_image(folder / "images" / f"{name}.png", k)
        write_latent(folder / "vae-sd" / f"{name}.npy", k, **options)
        labels.append([f"{name}.npy", k % 3])
    write_labels(folder, labels)
    return folder


def identities(fetched):
    """The items of write_folder in a batch, whose image, latent and label must be of one item."""
    numbers = (fetched["x"][:, 0, 0, 0] / latents.SCALING).round().long()
    if "images" in fetched:
        assert torch.equal(fetched["images"][:, 0, 0, 0].long(), numbers)
    assert torch.equal(fetched["y"], numbers % 3)
    return numbers.tolist()


def counting(count):
    """Items in memory, the k-th of which is the pixel k."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None]
    return data.Pixels(images, torch.arange(count), count)


def draw(items, seed=3, step=0, rows=None, global_batch=12):
    return data.batch(items, seed=seed, step=step, rows=rows or slice(0, global_batch), global_batch=global_batch)


# ---- Digits


def test_digits_match_scikit_learns_each_once_and_each_class_divided_alike():
    source, splits = load_digits(), data.digits()
    rows = [
        (label, image.tobytes()) for label, image in zip(source.target, source.images.astype(np.uint8), strict=True)
    ]
    found = []
    for split in splits.values():
        assert split.images.dtype == torch.uint8 and split.shape == (1, 8, 8) and split.n_class == 10
        greys = (split.images.double() * 16 / 255).round().to(torch.uint8)  # 0 to 16 again
        found += [(int(y), image.numpy().tobytes()) for y, image in zip(split.labels, greys, strict=True)]
    assert sorted(found) == sorted(rows) and len(found) == 1797
    assert (splits["train"].images.min(), splits["train"].images.max()) == (0, 255)
    counts = np.bincount(splits["val"].labels) / np.bincount(source.target)
    assert np.abs(counts - 0.2).max() < 0.005  # half an image of some 180


def test_digits_are_split_the_same_way_each_time_and_not_class_by_class():
    first, again = data.digits(), data.digits()
    assert all(torch.equal(first[split].images, again[split].images) for split in first)
    assert len(first["val"].labels[:50].unique()) == 10


def test_pixels_in_the_models_space_match_images_over_127_and_back():
    fetched = draw(counting(200), global_batch=200)
    torch.testing.assert_close(fetched["x"].double(), fetched["images"].double() / 127.5 - 1, atol=1e-6, rtol=0)
    assert fetched["x"].dtype == torch.float32 and fetched["y"].dtype == torch.int64
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_images(data.to_pixels(every)), every)
    assert data.to_images(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


# ---- Batches


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_batch_matches_the_global_batch_however_it_is_shared(tmp_path, ranks):
    items = Latents(write_folder(tmp_path, deviation=1.0))
    share = 12 // ranks
    for step in (0, 5):
        whole = draw(items, step=step)
        parts = [draw(items, step=step, rows=slice(r * share, (r + 1) * share)) for r in range(ranks)]
        for name in whole:
            assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])


def test_batch_is_the_same_again_and_another_for_another_seed_or_step(tmp_path):
    items = Latents(write_folder(tmp_path, deviation=1.0))
    first = draw(items, step=4)
    again = draw(Latents(tmp_path), step=4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for other in (draw(items, seed=4, step=4), draw(items, step=5)):
        assert not torch.equal(first["y"], other["y"]) and not torch.equal(first["x"], other["x"])


def test_batches_have_each_item_once_an_epoch_each_in_another_order():
    items = counting(10)  # 4 does not divide it: batches lie across epochs
    numbers = torch.cat([draw(items, step=step, global_batch=4)["y"] for step in range(10)]).view(4, 10)
    assert torch.equal(numbers.sort(dim=1).values, torch.arange(10).repeat(4, 1))
    assert len({tuple(epoch.tolist()) for epoch in numbers}) == 4


def test_batch_larger_than_the_items_matches_several_epochs():
    assert torch.equal(draw(counting(5), global_batch=20)["y"].bincount(), torch.full((5,), 4))


def test_take_gives_chosen_items_with_the_same_noise_each_time(tmp_path):
    items = Latents(write_folder(tmp_path, deviation=0.1))
    order = [items.names.index(f"class{k % 3}/{k}") for k in (7, 2, 11)]
    first = data.take(items, order, seed=5)
    assert first["y"].tolist() == [1, 2, 2] and first["images"][:, 0, 0, 0].tolist() == [7, 2, 11]
    assert torch.equal(first["x"], data.take(items, order, seed=5)["x"])
    assert torch.equal(first["x"][1:2], data.take(items, order[1:2], seed=5)["x"])  # whatever the rest of the batch
    assert not torch.equal(first["x"], data.take(items, order, seed=6)["x"])


def test_hold_out_divides_the_items_and_keeps_classes_mixed():
    splits = {name: part.tolist() for name, part in data.hold_out(250, 20).items()}
    assert len(splits["val"]) == 20 and sorted(splits["train"] + splits["val"]) == list(range(250))
    assert min(splits["val"]) < 60 and max(splits["val"]) > 190
    assert splits["val"] == data.hold_out(250, 20)["val"].tolist()
    assert len(data.hold_out(250, 1000)["val"]) == 25 and len(data.hold_out(4, 1000)["val"]) == 1
    with pytest.raises(UserError, match="one to validate, got 1"):
        data.hold_out(1, 1)


def test_a_part_has_its_items_alone_and_replaces_a_corrupt_one_from_among_them(tmp_path):
    items = Latents(write_folder(tmp_path, deviation=0.1), on_corrupt="skip")
    indices = [1, 4, 5, 9]
    part = items.part(indices)
    taken = data.take(part, range(4), seed=0)
    assert taken["y"].tolist() == [items.labels[index] for index in indices] and len(part) == 4
    numbers = taken["images"][:, 0, 0, 0].tolist()
    for index in indices[1:]:
        (tmp_path / "vae-sd" / f"{items.names[index]}.npy").write_bytes(b"no array")
    drawn = data.take(part, range(4), seed=0)["images"][:, 0, 0, 0].tolist()
    assert drawn == [numbers[0]] * 4 and len(part.skipped) == 3 and not items.skipped


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_digits_and_noise_are_read_ahead_without_a_second_set_of_torchs_threads():
    program = """
import os, torch
from common.read_ahead import read_ahead
from SIT import data
from SIT.objective import ObjectiveConfig, draw
items = data.digits()["train"]
torch.ones(2000, 2000).sin()  # starts the first set
settings = ObjectiveConfig(times="lognormal")
def fetch(step):
    batch = data.batch(items, seed=0, step=step, rows=slice(0, 128), global_batch=128)
    return batch | draw((1, 0, step), 256, (4, 32, 32), settings)._asdict()
batches = read_ahead(fetch, range(3))
before = len(os.listdir("/proc/self/task"))
next(batches), next(batches)
assert torch.get_num_threads() == 2 and len(os.listdir("/proc/self/task")) == before + 1
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_move_keeps_the_contents_of_a_batch():
    fetched = draw(counting(12))
    moved = data.move(fetched, "cpu")
    assert moved.keys() == fetched.keys() and all(torch.equal(moved[name], fetched[name]) for name in fetched)


@pytest.mark.gpu
def test_move_to_a_gpu_matches_the_batch_on_the_cpu():
    fetched = draw(counting(12))
    moved = data.move(fetched, "cuda")
    assert all(moved[name].is_cuda and torch.equal(moved[name].cpu(), fetched[name]) for name in fetched)


# ---- Latents: pairs


def test_latents_match_images_and_labels_by_name_where_sorting_would_not(tmp_path):
    folder = write_folder(tmp_path)
    # Sorted, "img5.png" comes before "imga.jpeg", but "img-mean-std-a.npy" before "img5.npy".
    write_image(folder / "images/x/img5.png", 12)
    write_image(folder / "images/x/imga.jpeg", 13)
    write_latent(folder / "vae-sd/x/img5.npy", 12)
    write_latent(folder / "vae-sd/x/img-mean-std-a.npy", 13)
    labels = json.loads((folder / "vae-sd/dataset.json").read_text())["labels"]
    write_labels(folder, [["x/img-mean-std-a.npy", 1], *labels[::-1], ["x/img5.npy", 0]])
    items = Latents(folder)
    assert len(items) == 14 and items.n_class == 3 and items.shape == SHAPE
    fetched = draw(items, global_batch=14)
    numbers = (fetched["x"][:, 0, 0, 0] / latents.SCALING).round().long()
    assert sorted(numbers.tolist()) == list(range(14))
    assert (fetched["images"][:, 0, 0, 0].long() - numbers).abs().max() <= 1  # JPEG may be off by one
    assert torch.equal(fetched["y"], numbers % 3)


def test_latents_match_a_folder_of_repas_own_preprocessing(tmp_path):
    for k in range(3):
        write_image(tmp_path / f"images/00000/img0000000{k}.png", k)
        write_latent(tmp_path / f"vae-sd/00000/img-mean-std-0000000{k}.npy", k)
    write_labels(tmp_path, [[f"00000/img-mean-std-0000000{k}.npy", k] for k in range(3)])
    assert sorted(identities(draw(Latents(tmp_path), global_batch=3))) == [0, 1, 2]


def test_latents_are_drawn_with_their_mean_and_deviation_times_the_scaling(tmp_path):
    write_folder(tmp_path, count=2)
    for name in ("class0/0", "class1/1"):
        write_latent(tmp_path / f"vae-sd/{name}.npy", 7.0, deviation=2.0, shape=(2, 64, 64))
    x = draw(Latents(tmp_path), global_batch=2)["x"].double() / 0.18215
    # 16,384 draws: a mean is off by 2 / 128 = 0.016 at one standard error, a deviation by 0.011.
    assert x.mean() == pytest.approx(7.0, abs=0.07) and x.std() == pytest.approx(2.0, abs=0.05)
    assert not torch.equal(x[0], x[1])
    write_labels(tmp_path, [["class0/0.npy", 0], ["class1/1.npy", 1]], scaling=0.5)
    assert draw(Latents(tmp_path), global_batch=2)["x"].mean() == pytest.approx(3.5, abs=0.035)


def test_noise_is_drawn_anew_for_each_row_and_step_and_validation_item(tmp_path):
    items = Latents(write_folder(tmp_path, count=3))
    for k in range(3):
        write_latent(tmp_path / f"vae-sd/class{k}/{k}.npy", 0.0, deviation=1.0)
    drawn = [draw(items, step=step, global_batch=3)["x"] for step in range(4)] + [
        data.take(items, range(3), seed=3)["x"]
    ]
    assert len({x.numpy().tobytes() for x in torch.cat(drawn)}) == 15


def test_latents_are_read_by_memory_map(tmp_path, monkeypatch):
    items, load, opened = Latents(write_folder(tmp_path)), np.load, []

    def watched(path, **options):
        opened.append(load(path, **options))
        return opened[-1]

    monkeypatch.setattr(latents.np, "load", watched)
    draw(items)
    assert len(opened) == 12 and all(isinstance(array, np.memmap) and not array.flags.writeable for array in opened)


def test_latents_in_half_precision_are_read_as_float32(tmp_path):
    fetched = draw(Latents(write_folder(tmp_path, dtype=np.float16)))
    assert fetched["x"].dtype == torch.float32 and sorted(identities(fetched)) == list(range(12))


def test_latents_without_images_go_without_their_folder(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    fetched = draw(Latents(tmp_path, with_images=False))
    assert fetched.keys() == {"x", "y"} and sorted(identities(fetched)) == list(range(12))
    with pytest.raises(UserError, match=r"need the folder .*images, which is missing: run `.* convert`"):
        Latents(tmp_path)


def test_flips_mirror_image_and_latent_together_about_half_the_time(tmp_path):
    write_folder(tmp_path)
    for k in range(12):
        picture = np.zeros((5, 5, 3), dtype=np.uint8)
        picture[:, 0] = 200  # bright on the left
        Image.fromarray(picture).save(tmp_path / f"images/class{k % 3}/{k}.png")
        write_latent(tmp_path / f"vae-sd-flip/class{k % 3}/{k}.npy", k + 100)
    items, flipped = Latents(tmp_path, flips=True), 0
    for step in range(10):
        fetched = draw(items, step=step)
        of_flipped = fetched["x"][:, 0, 0, 0] / latents.SCALING > 50
        bright_left, bright_right = (fetched["images"][:, 0, 0, column] == 200 for column in (0, -1))
        assert torch.equal(of_flipped, bright_right) and torch.equal(of_flipped, ~bright_left)
        flipped += int(of_flipped.sum())
    assert 38 <= flipped <= 82  # of 120; four standard deviations
    assert (draw(Latents(tmp_path))["images"][..., 0] == 200).all()  # without flips, none


# ---- Latents: refusals


def remove_image(folder):
    (folder / "images/class2/5.png").unlink()


def remove_latent(folder):
    (folder / "vae-sd/class2/5.npy").unlink()


def remove_label(folder):
    write_labels(folder, [[f"class{k % 3}/{k}.npy", k % 3] for k in range(12) if k not in (5, 8)])


def remove_one_of_either(folder):  # as many latents as images, which sorting would pair all the same
    (folder / "images/class2/5.png").unlink()
    (folder / "vae-sd/class1/4.npy").unlink()
    write_labels(folder, [[f"class{k % 3}/{k}.npy", k % 3] for k in range(12) if k != 4])


def add_image(folder):
    write_image(folder / "images/class0/extra.png", 0)


def add_twin(folder):
    write_image(folder / "images/class0/3.jpg", 0)


def add_second_label(folder):
    write_labels(folder, [[f"class{k % 3}/{k % 12}.npy", k % 3] for k in range(13)])


def set_class(label):
    return lambda folder: write_labels(folder, [[f"class{k % 3}/{k}.npy", label if k == 5 else 0] for k in range(12)])


def set_labels(text):
    return lambda folder: (folder / "vae-sd/dataset.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_image, "each latent must have its image, 1 of 12 have none, the first is class2/5"),
        (remove_latent, "each label must have its latent, 1 of 12 have none, the first is class2/5"),
        (remove_label, "each latent must have its label, 2 of 12 have none, the first is class2/5"),
        (remove_one_of_either, "each latent must have its image, 1 of 11 have none, the first is class2/5"),
        (add_image, "each image must have its latent, 1 of 13 have none, the first is class0/extra"),
        (add_twin, r"class0/3\.(png|jpg) and class0/3\.(png|jpg) must have different names"),
        (add_second_label, "must label each file once; its 13 labels are of 12"),
        (set_class(4), r"whole number from 0 to 3, class2/5\.npy has 4: correct dataset\.json or set model\.n_class"),
        (set_class(-1), r"class2/5\.npy has -1"),
        (set_class("cat"), r"class2/5\.npy has 'cat'"),
        (set_class(1.5), r"class2/5\.npy has 1\.5"),
        (set_labels('{"labels": null}'), r"dataset\.json must be \{\"labels\""),
        (set_labels("[]"), r"dataset\.json must be \{\"labels\""),
        (set_labels('{"labels": [["a", '), r"dataset\.json must be \{\"labels\""),
        (set_labels('{"labels": []}'), "must label each file once; its 0 labels"),
    ],
)
def test_latents_refuse_mismatched_folders(tmp_path, damage, message):
    damage(write_folder(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        Latents(tmp_path, n_class=4)
    assert "\n" not in str(caught.value)


def test_latents_refuse_a_model_without_classes(tmp_path):
    with pytest.raises(ValueError, match="n_class must be 1 or more, got 0"):
        Latents(write_folder(tmp_path), n_class=0)


def test_latents_name_the_vae_of_their_folder(tmp_path):
    assert Latents(write_folder(tmp_path)).vae == ""  # as REPA's own preprocessing leaves it
    labels = json.loads((tmp_path / "vae-sd/dataset.json").read_text())["labels"]
    write_labels(tmp_path, labels, vae="/models/vae")
    assert Latents(tmp_path).vae == "/models/vae"


def test_latents_refuse_a_folder_that_is_not_prepared_to_its_end(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "vae-sd/dataset.json").unlink()
    with pytest.raises(UserError, match=r"vae-sd must hold dataset\.json, .* run `python -m SIT\.prepare convert`"):
        Latents(tmp_path)
    with pytest.raises(UserError, match=r"nowhere/vae-sd must hold dataset\.json"):
        Latents(tmp_path / "nowhere")


def test_latents_ignore_remains_of_an_interrupted_write(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "images/class0/.0.png").write_bytes(b"half an image")
    (tmp_path / "vae-sd/class0/.new.npy.partial").write_bytes(b"half a latent")
    assert len(Latents(tmp_path)) == 12


def test_flips_refuse_latents_without_mirrored_ones(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(UserError, match=r"need the folder .*vae-sd-flip, which .* run `.* encode --flip`, or train"):
        Latents(tmp_path, flips=True)
    write_latent(tmp_path / "vae-sd-flip/class0/0.npy", 0)
    with pytest.raises(UserError, match="each latent must have its mirrored latent, 11 of 12 have none"):
        Latents(tmp_path, flips=True)


@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 3, 4), (1, 2, 3, 4)])
def test_latents_refuse_a_latent_of_another_shape(tmp_path, shape):
    write_folder(tmp_path)
    write_latent(tmp_path / "vae-sd/class2/5.npy", 0, shape=shape)
    for on_corrupt in ("fail", "skip"):  # nothing is broken: it belongs to another model
        with pytest.raises(UserError, match=r"latents must have one shape, \(4, 3, 4\); .*class2/5\.npy is \("):
            draw(Latents(tmp_path, on_corrupt=on_corrupt))


@pytest.mark.parametrize("shape", [(3, 3, 4), (6,)])
def test_latents_refuse_arrays_that_are_no_mean_and_deviation(tmp_path, shape):
    write_folder(tmp_path)
    np.save(tmp_path / "vae-sd/class0/0.npy", np.zeros(shape, np.float32))  # the first by name
    with pytest.raises(UserError, match=r"must be an array \(2C, H, W\), .*class0/0\.npy is"):
        Latents(tmp_path)


def test_latents_refuse_an_image_of_another_size(tmp_path):
    write_folder(tmp_path)
    write_image(tmp_path / "images/class2/5.png", 5, side=6)
    with pytest.raises(UserError, match=r"images must have one shape; .* is \(3, [56], [56]\), another is"):
        draw(Latents(tmp_path))


def cut_short(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def empty(path):
    path.write_bytes(b"")


def fill_with_text(path):
    path.write_text("no such file: 404\n" * 20)


def pickle_objects(path):
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)


def put_nan(path):
    write_latent(path, float("nan"))


CORRUPTIONS = [
    ("vae-sd/class0/9.npy", cut_short),
    ("vae-sd/class0/9.npy", empty),
    ("vae-sd/class0/9.npy", fill_with_text),
    ("vae-sd/class0/9.npy", pickle_objects),
    ("vae-sd/class0/9.npy", put_nan),
    ("vae-sd/class0/9.npy", Path.unlink),  # after the folder was opened
    ("images/class0/9.png", cut_short),
    ("images/class0/9.png", empty),
    ("images/class0/9.png", fill_with_text),
]


@pytest.mark.parametrize(("file", "corrupt"), CORRUPTIONS)
def test_a_corrupt_file_is_named(tmp_path, file, corrupt):
    items = Latents(write_folder(tmp_path))
    corrupt(tmp_path / file)
    with pytest.raises(latents.Corrupt, match=rf"{file} must ") as caught:
        draw(items)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("file", "corrupt"), CORRUPTIONS)
def test_a_corrupt_file_is_skipped_with_a_count_and_replaced_by_the_next(tmp_path, capsys, file, corrupt):
    items = Latents(write_folder(tmp_path), on_corrupt="skip")
    corrupt(tmp_path / file)
    for step in range(3):  # an epoch each
        numbers = identities(draw(items, step=step))
        assert sorted(numbers) == sorted([k for k in range(12) if k != 9] + [1])  # by name class1/1 is next
    assert list(items.skipped) == ["class0/9"]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and file in warnings[0] and warnings[0].endswith("skipped, 1 of 12 so far")


def test_a_corrupt_file_is_to_be_removed_and_made_again(tmp_path):
    write_folder(tmp_path)
    for k in range(12):
        write_latent(tmp_path / f"vae-sd-flip/class{k % 3}/{k}.npy", k)
    commands = {"vae-sd": "encode", "vae-sd-flip": "encode --flip", "images": "convert"}
    for folder, command in commands.items():
        path = next((tmp_path / folder).rglob("9.*"))
        content = path.read_bytes()
        empty(path)
        message = rf"{folder}/class0/9.*: remove it, then run `python -m SIT\.prepare {command}` again"
        with pytest.raises(latents.Corrupt, match=message):
            for step in range(10):
                draw(Latents(tmp_path, flips=True), step=step)
        path.write_bytes(content)


def test_skipping_does_not_depend_on_how_the_batch_is_shared(tmp_path):
    write_folder(tmp_path)
    for name in ("class0/0", "class2/5", "class2/8"):
        empty(tmp_path / f"vae-sd/{name}.npy")
    whole = draw(Latents(tmp_path, on_corrupt="skip"))
    parts = [draw(Latents(tmp_path, on_corrupt="skip"), rows=slice(k, k + 4)) for k in (0, 4, 8)]
    assert all(torch.equal(torch.cat([part[name] for part in parts]), whole[name]) for name in whole)


def test_skipping_everything_is_refused(tmp_path):
    write_folder(tmp_path, count=3)
    items = Latents(tmp_path, on_corrupt="skip")
    for k in range(3):
        empty(tmp_path / f"vae-sd/class{k}/{k}.npy")
    with pytest.raises(UserError, match="must hold a readable item, has none"):
        draw(items, global_batch=1)
    assert len(items.skipped) == 3
    with pytest.raises(UserError, match="must hold a readable latent"):
        Latents(tmp_path, on_corrupt="skip")


def test_on_corrupt_refuses_another_word(tmp_path):
    with pytest.raises(ValueError, match="'fail' or 'skip', got 'ignore'"):
        Latents(tmp_path, on_corrupt="ignore")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_read_image_gives_rgb_of_any_mode(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(np.full((4, 6, 3), 255, dtype=np.uint8)).convert(mode).save(path)
    image = latents.read_image(path)
    assert image.shape == (3, 4, 6) and image.dtype == np.uint8 and image.min() >= 254


def test_headers_of_arrays_are_parsed_one_at_a_time_whatever_the_number_of_threads(tmp_path, monkeypatch):
    """Python 3.11's parser sometimes raises SystemError if two threads parse; see SIT.latents."""
    parsing, most, load = [], [], np.load

    def slow_load(*arguments, **options):
        parsing.append(1)
        most.append(len(parsing))
        threading.Event().wait(0.005)  # lets another thread in
        parsing.pop()
        return load(*arguments, **options)

    np.save(tmp_path / "0.npy", np.zeros((2, 3), np.float32))
    monkeypatch.setattr(np, "load", slow_load)
    threads = [threading.Thread(target=latents.open_array, args=(tmp_path / "0.npy",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 8 and max(most) == 1
