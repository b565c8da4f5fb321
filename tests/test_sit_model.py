"""SIT.model and its parts against the published sizes, slow float64 formulas and published checkpoints."""

import argparse
import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from common import UserError
from optimizers import build_optimizer
from SIT.model import SIZES, Block, ModelConfig, SiT, modulation_names, tensor_roles
from SIT.published import load_published, open_published
from SIT.tokens import patchify, sincos_positions, unpatchify

# All lengths differ that can, so that an exchange of two of them fails.
TINY = ModelConfig(
    size="",
    patch_size=2,
    depth=3,
    width=24,
    n_head=3,
    input_size=6,
    channels=5,
    mlp_ratio=2.0,
    n_class=7,
    encoder_depth=2,
    projector_width=11,
    z_dim=13,
)


def randomized(model):
    """In float64 and eval mode, every parameter drawn: zeros and equal biases hide slips."""
    model = model.double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(batch=4, config=TINY):
    x = torch.randn(batch, config.channels, config.input_size, config.input_size, dtype=torch.float64)
    return x, torch.rand(batch, dtype=torch.float64), torch.randint(config.n_class, (batch,))


# --- the published networks, written out for one image in float64


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def silu(x):
    return x / (1 + torch.exp(-x))


def normalized(x):
    centred = x - x.mean(1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(1, keepdim=True) + 1e-6)


def reference_attention(state, prefix, x, n_head):
    """Attention over tokens (N, C), head by head, token by token."""
    n, width = x.shape
    size = width // n_head
    query, key, value = linear(state, f"{prefix}.qkv", x).split(width, dim=1)
    mixed = torch.empty_like(x)
    for head in range(n_head):
        mine = slice(head * size, (head + 1) * size)
        for token in range(n):
            scores = torch.exp(key[:, mine] @ query[token, mine] / math.sqrt(size))
            mixed[token, mine] = (scores / scores.sum()) @ value[:, mine]
    return linear(state, f"{prefix}.proj", mixed)


def reference_mlp(state, prefix, x):
    x = linear(state, f"{prefix}.fc1", x)
    x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return linear(state, f"{prefix}.fc2", x)


def reference_block(state, prefix, x, condition, n_head):
    """One block over tokens (N, C) under a condition (C,)."""
    pieces = linear(state, f"{prefix}.adaLN_modulation.1", silu(condition)).split(x.shape[1])
    x = x + pieces[2] * reference_attention(
        state, f"{prefix}.attn", normalized(x) * (1 + pieces[1]) + pieces[0], n_head
    )
    return x + pieces[5] * reference_mlp(state, f"{prefix}.mlp", normalized(x) * (1 + pieces[4]) + pieces[3])


def reference_network(state, x, t, y, config):
    """A published SiT or REPA on one image x (channels, H, H): its prediction and, where it has one, its projection."""
    patch, grid, channels = config.patch_size, config.input_size // config.patch_size, config.channels
    angles = [t * 10_000 ** (-k / 128) for k in range(128)]
    waves = [math.cos(each) for each in angles] + [math.sin(each) for each in angles]
    waves = torch.tensor(waves, dtype=torch.float64)
    condition = linear(state, "t_embedder.mlp.2", silu(linear(state, "t_embedder.mlp.0", waves)))
    condition = condition + state["y_embedder.embedding_table.weight"][y]
    tokens = F.conv2d(x[None], state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    tokens, projected = tokens[0].flatten(1).T + state["pos_embed"][0], None  # (N, C), row by row
    for number in range(config.depth):
        tokens = reference_block(state, f"blocks.{number}", tokens, condition, config.n_head)
        if number + 1 == config.encoder_depth and "projectors.0.0.weight" in state:
            projected = silu(linear(state, "projectors.0.0", tokens))
            projected = linear(state, "projectors.0.4", silu(linear(state, "projectors.0.2", projected)))
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", silu(condition)).chunk(2)
    outputs = linear(state, "final_layer.linear", normalized(tokens) * (1 + scale) + shift)  # (N, P P channels)
    outputs = outputs.view(grid, grid, patch, patch, -1)
    prediction = torch.zeros(outputs.shape[-1], grid * patch, grid * patch, dtype=torch.float64)
    for row in range(grid * patch):
        for column in range(grid * patch):
            prediction[:, row, column] = outputs[row // patch, column // patch, row % patch, column % patch]
    return prediction[:channels], projected


def published_state(config, doubled=False, projector=True):
    """A random state dict in the published names and shapes; willisma/SiT's has doubled outputs and no projector."""
    width, patch, hidden = config.width, config.patch_size**2 * config.channels, int(config.mlp_ratio * config.width)
    linears = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    for number in range(config.depth):
        block = f"blocks.{number}"
        linears |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        linears |= {f"{block}.mlp.fc1": (hidden, width), f"{block}.mlp.fc2": (width, hidden)}
        linears |= {f"{block}.adaLN_modulation.1": (6 * width, width)}
    linears |= {"final_layer.linear": ((1 + doubled) * patch, width)}
    linears |= {"final_layer.adaLN_modulation.1": (2 * width, width)}
    if projector:
        inner = config.projector_width
        linears |= {"projectors.0.0": (inner, width), "projectors.0.2": (inner, inner)}
        linears |= {"projectors.0.4": (config.z_dim, inner)}
    shapes = {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    shapes |= {"x_embedder.proj.weight": (width, config.channels, config.patch_size, config.patch_size)}
    shapes |= {"x_embedder.proj.bias": (width,), "y_embedder.embedding_table.weight": (config.n_class + 1, width)}
    shapes |= {"pos_embed": (1, (config.input_size // config.patch_size) ** 2, width)}
    return {name: 0.3 * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


# --- shapes and initialisation


@pytest.mark.parametrize(("size", "millions"), [("SiT-S/2", 33), ("SiT-B/2", 130), ("SiT-L/2", 458), ("SiT-XL/2", 675)])
def test_num_parameters_match_the_published_sizes(size, millions):
    """Table 1 of SiT and DiT counts, in millions, also the positions and the doubled outputs, which ours has not."""
    with torch.device("meta"):
        model = SiT(ModelConfig(size=size, z_dim=0))
    depth, width = model.config.depth, model.config.width
    block = (3 + 1 + 4 + 4 + 6) * width**2 + (3 + 1 + 4 + 1 + 6) * width  # qkv, proj, fc1, fc2, modulation; biases
    around = (16 + 1) * width + (256 + 1 + width + 1) * width + 1001 * width  # patches, times, labels
    final = (width + 1) * 16 + (width + 1) * 2 * width
    assert model.num_parameters() == depth * block + around + final
    published = model.num_parameters() + 256 * width + (width + 1) * 16
    assert published == pytest.approx(millions * 10**6, abs=0.6 * 10**6)  # the tables round, B's 130.51 M down


def test_num_parameters_match_the_published_code_on_sit_xl():
    with torch.device("meta"):
        model = SiT(ModelConfig(size="SiT-XL/2", z_dim=0))
    # What willisma/SiT and facebookresearch/DiT log on starting: "Parameters: 675,129,632".
    assert model.num_parameters() + 256 * 1152 + (1152 + 1) * 16 == 675_129_632


def test_projector_matches_repas_count():
    with torch.device("meta"):
        more = SiT(ModelConfig()).num_parameters() - SiT(ModelConfig(z_dim=0)).num_parameters()
    assert more == 769 * 2048 + 2049 * 2048 + 2049 * 768


def test_positions_match_the_formula():
    positions = sincos_positions(width=12, grid=5)
    assert positions.dtype == torch.float64 and positions.shape == (25, 12)
    for row in range(5):
        for column in range(5):
            expected = []
            for place in (column, row):
                angles = [place / 10_000 ** (k / 3) for k in range(3)]
                expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            expected = torch.tensor(expected, dtype=torch.float64)
            torch.testing.assert_close(positions[5 * row + column], expected, rtol=0, atol=1e-15)


def test_positions_are_in_the_state_but_not_trained():
    model = SiT(TINY)
    assert torch.equal(model.state_dict()["pos_embed"][0], sincos_positions(24, 3).float())
    assert "pos_embed" not in dict(model.named_parameters())


def test_unpatchify_matches_the_inverse_of_patchify():
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(unpatchify(patchify(x, 2), 2, 3), x)
    strided = x.to(memory_format=torch.channels_last)
    assert torch.equal(patchify(strided, 2), patchify(x, 2))


def test_patchify_matches_slices_in_row_major_order():
    x = torch.randn(2, 3, 6, 8)
    patches = patchify(x, 2)
    assert patches.shape == (2, 12, 12)
    for row in range(3):
        for column in range(4):
            patch = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]  # (2, channels, 2, 2)
            assert torch.equal(patches[:, 4 * row + column], patch.permute(0, 2, 3, 1).flatten(1))


def test_initial_prediction_matches_zero_and_blocks_the_identity():
    model, (x, t, y) = SiT(TINY), inputs()
    prediction, projected = model(x.float(), t.float(), y)
    assert prediction.shape == x.shape and torch.equal(prediction, torch.zeros_like(prediction))
    assert projected.shape == (4, 9, 13) and projected.abs().min() > 0
    tokens = torch.randn(4, 9, 24)
    assert torch.equal(model.blocks[1](tokens, torch.randn(4, 24)), tokens)


def test_initial_weights_match_dits_distributions():
    model = SiT(ModelConfig(size="", patch_size=2, depth=1, width=128, n_head=4, n_class=200, encoder_depth=1))
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "adaLN" in name or name == "final_layer.linear.weight":
            assert not weight.any(), name
            continue
        xavier = math.sqrt(2 / sum(weight.shape))  # the deviation of Xavier's uniform
        drawn = "t_embedder" in name or "y_embedder" in name
        # Two standard errors of a deviation of 2,048 normal draws, the fewest, are 3 %.
        assert weight.std().item() == pytest.approx(0.02 if drawn else xavier, rel=0.04), name


# --- the forward pass


def test_block_matches_the_written_out_attention_and_modulation():
    block = randomized(Block(TINY))
    x, condition = torch.randn(2, 9, 24, dtype=torch.float64), torch.randn(2, 24, dtype=torch.float64)
    state = {f"it.{name}": tensor for name, tensor in block.state_dict().items()}
    expected = [reference_block(state, "it", *each, n_head=3) for each in zip(x, condition, strict=True)]
    torch.testing.assert_close(block(x, condition), torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_forward_refuses_another_shape():
    with pytest.raises(ValueError, match=r"x must be \(B, 5, 6, 6\), got \(4, 5, 8, 8\)"):
        SiT(TINY)(torch.zeros(4, 5, 8, 8), torch.zeros(4), torch.zeros(4, dtype=torch.long))


def test_forward_without_a_projector_matches_the_prediction_with_it():
    model, batch = randomized(SiT(TINY)), inputs()
    expected, _ = model(*batch)
    model.projector = None
    prediction, projected = model(*batch)
    assert projected is None and torch.equal(prediction, expected)


def test_prediction_in_bf16_matches_fp64():
    model, (x, t, y) = randomized(SiT(TINY)), inputs()
    expected, _ = model(x, t, y)
    prediction, _ = model.bfloat16()(x.float(), t.float(), y)  # weights in bf16, inputs in fp32: as in FSDP
    assert prediction.dtype == torch.bfloat16
    # 8 bits a rounding, over three blocks.
    assert (prediction - expected).norm() < 0.05 * expected.norm()


def test_compiled_model_matches_eager_without_a_graph_break():
    model, batch = randomized(SiT(TINY)), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*batch), model(*batch))


def test_gradients_of_recomputed_blocks_match_those_of_kept_ones():
    model, batch = randomized(SiT(TINY)).train(), inputs()
    gradients = []
    for model.recompute in (False, True):
        prediction, projected = model(*batch)
        gradients.append(torch.autograd.grad(prediction.square().sum() + projected.sum(), model.x_embedder.weight))
    torch.testing.assert_close(*gradients)


# --- published checkpoints


def assert_matches_reference(model, state, batch, reverse):
    predictions, projections = model(*batch)
    for index, (x, t, y) in enumerate(zip(*batch, strict=True)):
        expected, projected = reference_network(state, x, 1 - t.item() if reverse else t.item(), y, model.config)
        torch.testing.assert_close(predictions[index], -expected if reverse else expected, rtol=1e-9, atol=1e-9)
        if projections is not None:
            torch.testing.assert_close(projections[index], projected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wrapped", [False, True])
def test_load_published_repa_matches_the_written_out_network(wrapped):
    model, state = randomized(SiT(TINY)), published_state(TINY)
    load_published(model, {"ema": state, "model": published_state(TINY)} if wrapped else state)
    assert_matches_reference(model, state, inputs(2), reverse=False)


def test_load_published_sit_matches_the_written_out_network_with_time_reversed():
    """willisma/SiT goes from noise at 0 to data at 1: its velocity at 1 - t, negated, is ours at t."""
    config = ModelConfig(**{**vars(TINY), "z_dim": 0})
    model, state = randomized(SiT(config)), published_state(config, doubled=True, projector=False)
    load_published(model, state)
    assert_matches_reference(model, state, inputs(2), reverse=True)


def test_load_published_leaves_out_a_projector_that_the_model_has_not():
    config, state = ModelConfig(**{**vars(TINY), "z_dim": 0}), published_state(TINY)
    model = randomized(SiT(config))
    load_published(model, state)
    assert_matches_reference(model, state, inputs(1), reverse=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"blocks.2.mlp.fc1.bias": None}, r"blocks\.2\.mlp\.fc1\.bias, which is missing \(1 such\)"),
        ({"projectors.0.2.weight": None}, r"projector\.2\.weight, which is missing .* z_dim = 0"),
        ({"blocks.0.attn.q_norm.weight": torch.ones(8)}, r"got blocks\.0\.attn\.q_norm\.weight .* qk_norm"),
        (
            {"y_embedder.embedding_table.weight": torch.ones(7, 24)},
            r"y_embedder\.weight must be \(8, 24\), got \(7, 24\)",
        ),
        ({"x_embedder.proj.weight": torch.ones(24, 4, 2, 2)}, r"x_embedder\.weight must be \(24, 20\), got \(24, 16\)"),
    ],
)
def test_load_published_refuses_other_tensors_in_one_line(change, named):
    state = {name: tensor for name, tensor in {**published_state(TINY), **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=named) as caught:
        load_published(SiT(TINY), state)
    assert "\n" not in str(caught.value)


def test_load_published_refuses_a_file_without_a_known_direction_of_time():
    config = ModelConfig(**{**vars(TINY), "z_dim": 0})
    with pytest.raises(ValueError, match=r"doubled outputs \(SiT\) or projectors \(REPA\)"):
        load_published(SiT(config), published_state(config, projector=False))


@pytest.mark.parametrize("doubled", [False, True])
def test_published_file_matches_the_network_that_it_is_loaded_into(tmp_path, monkeypatch, doubled):
    monkeypatch.setitem(SIZES, "SiT-T/2", {"patch_size": 2, "depth": 2, "width": 16, "n_head": 2})
    config = ModelConfig("SiT-T/2", input_size=8, n_class=5, encoder_depth=1, projector_width=8, z_dim=4)
    state = published_state(config.resolved(), doubled, projector=not doubled)
    torch.save({"ema": state, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "a.pt")
    expected = SiT(dataclasses.replace(config, z_dim=0))
    load_published(expected, state)
    found = open_published(tmp_path / "a.pt")
    assert found.config.resolved() == dataclasses.replace(
        config.resolved(), z_dim=0, encoder_depth=4, projector_width=2048
    )
    batch = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 4, 5])
    assert torch.equal(found(*batch)[0], expected(*batch)[0])


def test_file_that_is_no_published_checkpoint_is_refused_in_one_line(tmp_path):
    for content in ({"ema": {}}, [1], {"ema": published_state(TINY)}):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(UserError, match=r"a\.pt must be a published SiT or REPA checkpoint") as caught:
            open_published(tmp_path / "a.pt")
        assert "\n" not in str(caught.value)
    (tmp_path / "a.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"a\.pt must be"):
        open_published(tmp_path / "a.pt")


# --- roles


@pytest.mark.parametrize("modulation", ["matrix", "adamw"])
@pytest.mark.parametrize("z_dim", [13, 0])
def test_groups_match_the_stated_roles(modulation, z_dim):
    # 47 classes and none: the table has the shape of the final modulation, which is no output head for that.
    model = SiT(ModelConfig(**{**vars(TINY), "z_dim": z_dim, "n_class": 47}))
    optimizer = build_optimizer(model, "olion", lr=1e-3, weight_decay=0.1, roles=tensor_roles(model, modulation))
    groups = {name: (g["rule"], g["weight_decay"]) for g in optimizer.param_groups for name in g["param_names"]}
    hidden = [f"blocks.{i}.{name}" for i in range(3) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    hidden += ["t_embedder.0", "t_embedder.2", *(["projector.0", "projector.2"] if z_dim else [])]
    others = ["x_embedder", "y_embedder", "final_layer.linear", *(["projector.4"] if z_dim else [])]
    modulations = ["final_layer.adaLN_modulation.1", *(f"blocks.{i}.adaLN_modulation.1" for i in range(3))]
    (hidden if modulation == "matrix" else others).extend(modulations)
    expected = {f"{name}.bias": ("adamw", 0.0) for name in [*hidden, *others] if name != "y_embedder"}
    expected |= {f"{name}.weight": ("olion", 0.1) for name in hidden}
    expected |= {f"{name}.weight": ("adamw", 0.1) for name in others}
    assert groups == expected
    assert sorted(modulation_names(model)) == sorted(f"{name}.weight" for name in modulations)


# --- configuration and imports


def test_resolved_matches_the_size_and_keeps_explicit_fields():
    config = ModelConfig(size="SiT-XL/4", depth=2, encoder_depth=2).resolved()
    assert (config.patch_size, config.depth, config.width, config.n_head, config.grid) == (4, 2, 1152, 16, 8)
    assert config.resolved() == config


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"size": "SiT-B/3"}, "size must be one of SiT-S/2"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"n_class": 0}, "n_class must be at least 1"),
        ({"n_head": 5}, "width must be a multiple"),
        ({"width": 27}, "width must be a multiple"),
        ({"patch_size": 4}, "input_size must be a multiple of patch_size, got 6 and 4"),
        ({"encoder_depth": 4}, "encoder_depth must be at most depth 3, got 4"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio"),
    ],
)
def test_config_refuses_an_impossible_shape(changed, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig(**{**vars(TINY), **changed})
