"""Weights of published SiT (github.com/willisma/SiT) and REPA (github.com/sihyun-yu/REPA) checkpoints.

`python -m SIT.sample SiT-XL-2-256x256.pt` draws from one.
"""

import argparse
from collections.abc import KeysView, Mapping
from pathlib import Path

import torch
from torch import Tensor

from common import BadValue, UserError, one_line
from SIT.model import SIZES, ModelConfig, SiT
from SIT.tokens import timestep_frequencies

RENAMED = {  # prefix of a published name -> ours; other names are equal
    "x_embedder.proj.": "x_embedder.",
    "t_embedder.mlp.": "t_embedder.",
    "y_embedder.embedding_table.": "y_embedder.",
    "projectors.0.": "projector.",
}
# The sections of a run's config.json, for a published model.
PUBLISHED = {
    "data": {"kind": "latents", "vae": ""},
    "objective": {"path": "linear", "prediction": "velocity", "label_dropout": 0.1},
}


def open_published(path: Path) -> SiT:
    """Read a checkpoint file of a published size, without its projector; raises UserError for anything else."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # REPA's checkpoints hold their arguments
            state_dict = torch.load(path, map_location="cpu", weights_only=True)
        model = SiT(_shape_of(state_dict.get("ema", state_dict)))
        load_published(model, state_dict)
    except Exception as error:  # an arbitrary file can make torch.load raise anything
        raise UserError(
            f"{path} must be a published SiT or REPA checkpoint, is not ({one_line(error)[:200]}): name one, or the "
            "folder of a run"
        ) from error
    return model


def _shape_of(state: Mapping[str, Tensor]) -> ModelConfig:
    width, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    depth = sum(name.endswith(".attn.qkv.weight") for name in state)
    sizes = [
        size for size, of in SIZES.items() if (of["depth"], of["width"], of["patch_size"]) == (depth, width, patch_size)
    ]
    if not sizes:
        raise BadValue(f"no published size has depth {depth}, width {width} and patch {patch_size}")
    grid = round(state["pos_embed"].shape[1] ** 0.5)
    n_class = len(state["y_embedder.embedding_table.weight"]) - 1
    return ModelConfig(sizes[0], input_size=grid * patch_size, channels=channels, n_class=n_class, z_dim=0)


def load_published(model: SiT, state_dict: Mapping) -> None:
    """Copy a published checkpoint's weights into a model of the same shape.

    state_dict: published names -> tensors, or a REPA checkpoint, of which the average ("ema") is used. REPA's projector
    is dropped if the model has none. In SiT's checkpoints, recognised by doubled outputs (the second half, a variance,
    is unused), time runs from noise to data; they are converted exactly to REPA's time, from data to noise.

    Raises ValueError for a weight that is missing, unknown or of another shape, and for a checkpoint of neither kind.
    """
    state = {_renamed(name): tensor for name, tensor in state_dict.get("ema", state_dict).items()}
    repa = any(name.startswith("projector.") for name in state)
    if model.projector is None:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("projector.")}
    expected = model.state_dict()
    _refuse_other_names(state.keys(), expected.keys())
    if state["x_embedder.weight"].ndim == 4:  # a convolution's (C, channels, P, P)
        state["x_embedder.weight"] = state["x_embedder.weight"].permute(0, 2, 3, 1).flatten(1)  # (C, P P channels)
    if len(state["final_layer.linear.bias"]) == 2 * len(expected["final_layer.linear.bias"]):
        _halve_outputs(state, model.config.channels)
        _reverse_time(state)
    elif not repa:
        raise BadValue(
            "the checkpoint must have doubled outputs (SiT) or projectors (REPA), which tell the direction of time; it "
            "has neither"
        )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            wanted, got = tuple(tensor.shape), tuple(state[name].shape)
            raise BadValue(f"{name} must be {wanted}, got {got}: build the model with the checkpoint's shape")
    model.load_state_dict(state)


def _renamed(name: str) -> str:
    for theirs, ours in RENAMED.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _refuse_other_names(found: KeysView[str], expected: KeysView[str]) -> None:
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing:
        remedy = "z_dim = 0 builds none" if missing[0].startswith("projector.") else "is it a SiT of this depth?"
        raise BadValue(f"the checkpoint must have {missing[0]}, which is missing ({len(missing)} such): {remedy}")
    if unknown:
        remedy = "is it a SiT of this depth, without qk_norm and with one projector?"
        raise BadValue(f"the checkpoint must be a SiT's, got {unknown[0]} ({len(unknown)} such): {remedy}")


def _halve_outputs(state: dict[str, Tensor], channels: int) -> None:
    """Keep the first half of the output channels, which vary fastest in an output patch."""
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        halves = state[name].unflatten(0, (-1, 2, channels))  # (P P, 2, channels, ...)
        state[name] = halves[:, 0].flatten(0, 1)  # (P P channels, ...)


def _reverse_time(state: dict[str, Tensor]) -> None:
    """Convert u(x, 1 - t) to v(x, t) = -u; cos f(1 - t), sin f(1 - t) are rotations of cos ft, sin ft."""
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = -state[name]
    weight = state["t_embedder.0.weight"]
    of_cosine, of_sine = weight.double().chunk(2, dim=1)  # (C, FREQUENCIES) each
    frequencies = timestep_frequencies(torch.float64, weight.device)
    cosine, sine = frequencies.cos(), frequencies.sin()
    rotated = [of_cosine * cosine + of_sine * sine, of_cosine * sine - of_sine * cosine]
    state["t_embedder.0.weight"] = torch.cat(rotated, dim=1).to(weight.dtype)  # (C, 2 FREQUENCIES)
