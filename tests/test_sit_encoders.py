"""SIT's frozen networks: DINOv2 against transformers' own, the digits' CNN, the VAE against its own distribution."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common import UserError
from SIT import data, digits, encoders, vae
from SIT.digits import DigitsCNN
from tests.tiny_sit import tiny_dinov2, tiny_vae


def uint8_images(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


@pytest.fixture(scope="module")
def trained():
    return digits.train_digits_cnn(seed=0)


# ---- DINOv2


def test_dinov2_at_its_own_size_matches_transformers_patch_tokens():
    model, images = tiny_dinov2(), uint8_images(3, 3, 28, 28)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        expected = model((images / 255 - mean) / std).last_hidden_state[:, 1:]
    encoder = encoders.Dinov2(model, grid=4)
    tokens = encoder(images)
    assert (encoder.z_dim, encoder.grid) == (16, 4) and tokens.shape == (3, 16, 16)
    torch.testing.assert_close(tokens, expected)
    assert not torch.allclose(tokens[:, 0], tokens[:, 1], atol=1e-3)  # or any order of tokens would pass


def test_dinov2_tokens_are_in_the_order_of_the_patches():
    encoder = encoders.Dinov2(tiny_dinov2(num_hidden_layers=0), grid=4)  # no attention: a token sees its patch alone
    images = uint8_images(1, 3, 28, 28)
    changed = images.clone()
    changed[..., 7:14, 21:28] = 255 - changed[..., 7:14, 21:28]  # row 1, column 3
    differs = (encoder(images) != encoder(changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [7]


def test_dinov2_is_frozen_and_deterministic_in_float32_under_any_torch_settings():
    encoder = encoders.Dinov2(tiny_dinov2(drop_path_rate=0.5, hidden_dropout_prob=0.5).train(), grid=4)
    images = uint8_images(2, 3, 28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(images)
    assert half.dtype == torch.float32 and not half.requires_grad
    assert torch.equal(encoder(images), encoder(images))
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_dinov2_at_another_size_matches_transformers_on_a_table_resampled_apart():
    model, images = tiny_dinov2(), uint8_images(2, 3, 32, 32)
    expected_model = tiny_dinov2(image_size=14)  # 2 x 2 patches; the rest of the weights is the same
    expected_model.load_state_dict(model.state_dict() | {"embeddings.position_embeddings": positions_apart(model, 2)})
    tokens = encoders.Dinov2(model, grid=2)(images)
    with torch.no_grad():
        expected = expected_model(encoders.imagenet_pixels(images, 14)).last_hidden_state[:, 1:]
    torch.testing.assert_close(tokens, expected)


def positions_apart(model, grid):
    table = model.embeddings.position_embeddings.detach()
    squares = torch.stack([table[0, 1:, c].reshape(4, 4) for c in range(table.shape[-1])])[None]  # (1, C, 4, 4)
    small = torch.nn.functional.interpolate(squares, (grid, grid), mode="bicubic", antialias=True)[0]
    tokens = torch.stack([small[:, row, column] for row in range(grid) for column in range(grid)])  # (grid * grid, C)
    return torch.cat([table[:, :1], tokens[None]], dim=1)


def test_resampled_positions_match_antialiased_interpolation_which_transformers_does_not():
    model = tiny_dinov2()
    table = encoders.resample_positions(model.embeddings.position_embeddings.detach(), 2)
    torch.testing.assert_close(table, positions_apart(model, 2))
    theirs = model.embeddings.interpolate_pos_encoding(torch.zeros(1, 5, 16), 14, 14)
    assert (table - theirs).abs().max() > 0.1  # without antialiasing
    assert torch.equal(encoders.resample_positions(table, 2), table)


def slow_bicubic(picture, side):
    """Resample (H, W) by cubic convolution with a = -0.75, edges repeated, and no antialiasing; float64."""

    def kernel(x):
        x = abs(x)
        if x <= 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    def weights(length):
        matrix = np.zeros((side, length))
        for row in range(side):
            centre = (row + 0.5) * length / side - 0.5
            for place in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
                matrix[row, min(max(place, 0), length - 1)] += kernel(centre - place)
        return matrix

    return weights(picture.shape[0]) @ picture @ weights(picture.shape[1]).T


@pytest.mark.parametrize("side", [10, 16, 21])
def test_imagenet_pixels_match_a_slow_reference(side):
    images = uint8_images(2, 3, 16, 16)
    pixels = encoders.imagenet_pixels(images, side)
    assert pixels.dtype == torch.float32 and pixels.shape == (2, 3, side, side)
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        expected = slow_bicubic((images[1, channel].double().numpy() / 255 - mean) / std, side)
        np.testing.assert_allclose(pixels[1, channel], expected, atol=1e-5)  # float32 against float64


def test_imagenet_pixels_of_grey_images_match_those_of_three_equal_channels():
    grey = uint8_images(2, 1, 16, 16)
    assert torch.equal(encoders.imagenet_pixels(grey, 14), encoders.imagenet_pixels(grey.expand(-1, 3, -1, -1), 14))


def test_load_encoder_reads_a_folder_of_dinov2(tmp_path):
    model, images = tiny_dinov2(), uint8_images(1, 3, 40, 40)
    model.save_pretrained(tmp_path)
    loaded = encoders.load_encoder("dinov2-b", folder=tmp_path)
    assert (loaded.z_dim, loaded.grid) == (16, 16) and loaded(images).shape == (1, 256, 16)
    assert torch.equal(loaded(images), encoders.Dinov2(model)(images))


def test_load_encoder_refuses_weights_in_part(tmp_path):
    model = tiny_dinov2()
    weights = {name: tensor for name, tensor in model.state_dict().items() if "layer.1.norm1.weight" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(UserError, match=r"must hold all weights, lacks 1, as encoder\.layer\.1\.norm1\.weight"):
        encoders.load_encoder("dinov2-b", folder=tmp_path)


def test_load_encoder_says_where_to_put_weights_that_cannot_be_downloaded(tmp_path, monkeypatch):
    def unreachable(name, **_):
        assert name == "facebook/dinov2-giant"
        raise OSError("We couldn't connect to 'https://huggingface.co'\nCheck your connection")

    with pytest.raises(UserError, match=r"must hold facebook/dinov2-small's config\.json and weights"):
        encoders.load_encoder("dinov2-s", folder=tmp_path)
    monkeypatch.setattr("transformers.Dinov2Model.from_pretrained", unreachable)
    with pytest.raises(
        UserError, match=r"dinov2-giant cannot be loaded .* `hf download facebook/dinov2-giant "
    ) as caught:
        encoders.load_encoder("dinov2-g")
    assert "\n" not in str(caught.value)


def test_load_encoder_refuses_another_name():
    with pytest.raises(ValueError, match="dinov2-l, dinov2-g, digits; got 'clip-b'"):
        encoders.load_encoder("clip-b")


# ---- The digits' network


def test_digits_cnn_recognises_held_out_digits_and_is_frozen(trained):
    model, accuracy = trained
    held_out = data.digits()["val"]
    assert accuracy >= 0.985  # seeds 0 to 3 gave 0.994 and more
    counted = sum(int(model(held_out.images[k : k + 1]).argmax()) == held_out.labels[k] for k in range(len(held_out)))
    assert accuracy == pytest.approx(counted / len(held_out))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_digits_cnn_training_repeats_bit_for_bit_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (digits.train_digits_cnn(seed, steps=3, width=4)[0].state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classes.weight"], other["classes.weight"])


def test_digits_cnn_is_trained_on_the_training_digits_alone(monkeypatch):
    splits = data.digits()

    def other_validation():
        return splits | {"val": data.Pixels(255 - splits["val"].images, splits["val"].labels, 10)}

    first = digits.train_digits_cnn(5, steps=3, width=4)[0].state_dict()
    monkeypatch.setattr(digits, "digits", other_validation)
    again = digits.train_digits_cnn(5, steps=3, width=4)[0].state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_shifted_matches_each_image_moved_by_one_pixel_at_most():
    images = uint8_images(64, 1, 8, 8)
    moved, seen = digits.shifted(images, torch.Generator().manual_seed(0)), set()
    assert moved.dtype == torch.uint8 and moved.shape == images.shape
    for before, after in zip(images, moved, strict=True):
        framed = F.pad(before[0], (1, 1, 1, 1))
        cuts = {(y, x): framed[y : y + 8, x : x + 8] for y in range(3) for x in range(3)}
        seen |= {place for place, cut in cuts.items() if torch.equal(cut, after[0])}
        assert any(torch.equal(cut, after[0]) for cut in cuts.values())
    assert len(seen) == 9


def test_digits_encoder_gives_a_feature_for_each_token_that_sees_two_pixels_around_its_patch(trained):
    encoder = encoders.DigitsEncoder(trained[0])
    image = data.digits()["val"].images[:1]
    tokens = encoder(image)
    assert (encoder.grid, encoder.z_dim) == (4, 64) and tokens.shape == (1, 16, 64) and not tokens.requires_grad
    for row in range(8):
        for column in range(8):
            changed = image.clone()
            changed[..., row, column] = 255 - changed[..., row, column]
            differs = (encoder(changed) != tokens).any(-1).view(4, 4)
            near = [[abs(2 * i + 0.5 - row) < 3 and abs(2 * j + 0.5 - column) < 3 for j in range(4)] for i in range(4)]
            assert differs.tolist() == near  # row by row, too


def test_digits_features_and_logits_match_those_of_the_saved_network(trained, tmp_path):
    digits.save_digits_cnn(trained[0], tmp_path / digits.ENCODER_FILE)
    loaded = digits.load_digits_cnn(tmp_path / digits.ENCODER_FILE)
    images = data.digits()["val"].images[:5]
    assert torch.equal(loaded(images), trained[0](images)) and loaded(images).shape == (5, 10)
    assert torch.equal(loaded.features(images), trained[0].features(images)) and loaded.features(images).shape == (
        5,
        64,
    )
    encoder = encoders.load_encoder("digits", folder=tmp_path)
    assert torch.equal(encoder(images), trained[0].tokens(images))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


def test_digits_cnn_refuses_other_images_and_files(tmp_path):
    with pytest.raises(ValueError, match=r"needs uint8 images \(B, 1, 8, 8\), got \(2, 1, 8, 8\) torch\.float32"):
        DigitsCNN()(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"got \(2, 3, 8, 8\)"):
        DigitsCNN().tokens(uint8_images(2, 3, 8, 8))
    with pytest.raises(UserError, match="run `python -m SIT"):
        encoders.load_encoder("digits", folder=tmp_path)
    (tmp_path / digits.ENCODER_FILE).write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"encoder\.pt must hold a digits' network"):
        encoders.load_encoder("digits", folder=tmp_path)


# ---- The VAE


def test_vae_encode_matches_the_mean_on_the_deviation_of_diffusers_distribution():
    tiny, images = tiny_vae(), uint8_images(2, 3, 16, 16)
    stacked = tiny.encode(images)
    posterior = tiny.autoencoder.encode(images / 127.5 - 1).latent_dist
    assert stacked.shape == (2, 6, 8, 8) and stacked.dtype == torch.float32 and not stacked.requires_grad
    assert torch.equal(stacked[:, :3], posterior.mean)
    torch.testing.assert_close(stacked[:, 3:], (0.5 * posterior.logvar).exp())
    assert tiny.latent_shape(16) == (3, 8, 8)


def test_vae_decode_matches_diffusers_after_the_scaling_is_undone():
    tiny, latents = tiny_vae(), torch.randn(2, 3, 8, 8)
    assert tiny.scaling == 0.18215
    expected = tiny.autoencoder.decode(latents / 0.18215).sample  # pixels in about [-1, 1]
    images = tiny.decode(latents)
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8
    assert (images - (expected * 127.5 + 127.5).clamp(0, 255)).abs().max() <= 0.5 + 1e-3  # rounded
    assert tiny_vae(scaling_factor=0.5).scaling == 0.5


def test_vae_round_trip_matches_an_identity_put_in_its_place():
    class Identity(torch.nn.Module):
        config = SimpleNamespace(scaling_factor=0.18215, latent_channels=3)

        def encode(self, pixels):
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=pixels, std=torch.zeros_like(pixels)))

        def decode(self, latents):
            return SimpleNamespace(sample=latents)

    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    identity = vae.VAE(Identity())
    mean, std = identity.encode(images).chunk(2, dim=1)
    assert std.abs().max() == 0
    assert torch.equal(identity.decode(mean * 0.18215), images)


def test_vae_refuses_a_side_that_does_not_divide():
    with pytest.raises(UserError, match="a side that is a multiple of 2, got 15"):
        tiny_vae().latent_shape(15)


def test_load_vae_reads_a_folder_and_says_where_to_put_missing_files(tmp_path):
    tiny = tiny_vae()
    tiny.autoencoder.save_pretrained(tmp_path / "vae")
    images = uint8_images(1, 3, 16, 16)
    assert torch.equal(vae.load_vae(str(tmp_path / "vae")).encode(images), tiny.encode(images))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"empty must hold stabilityai/sd-vae-ft-mse's .* `hf download stabilityai/"
    ) as caught:
        vae.load_vae(str(tmp_path / "empty"))
    assert "\n" not in str(caught.value)
