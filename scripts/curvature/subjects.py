"""The model of a run of any experiment, at any checkpoint, in float64, and its loss on one fixed batch.

    subject = open_run(Path("runs/nanogpt/stdlib/olion-lr8e-3-s1337"), rows=4)
    subject.load(400)          # of subject.steps; 0 is the initialization
    subject.loss()             # a scalar, float64

Batches are the first rows of the validation set, for a SiT with the noise and times of validation. Weights
are the trained ones, not a SiT's average over time; the initialization is drawn from the run's seed, as the run
drew it (of a Llama in one process: on several ranks it may have been another one).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import UserError, checkpoint, launch
from common.checkpoint_folder import survey
from common.config import from_dict
from common.json_files import read_object
from optimizers import roles_of

REMEDY = "name the folder of a run of nanoGPT, Llama or SIT, with config.json and its checkpoints"
ONE = launch.Process(0, 0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Subject:
    """A model whose weights can be changed, and its loss."""

    model: nn.Module  # float64, in evaluation mode
    loss: Callable[[], Tensor]  # of the batch, at the present weights: a scalar, float64
    matrices: dict[str, Tensor]  # the model's own parameters of role matrix, of two dimensions, by name
    steps: list[int]  # with checkpoints, ascending; 0 is the initialization
    load: Callable[[int], None]  # loads the weights of a step


def open_run(folder: Path, rows: int) -> Subject:
    """Open a run of any experiment with the first `rows` of its validation set; UserError for another folder."""
    record = read_object(folder / "config.json", {"config": dict}, REMEDY)
    adapters = {"nanogpt": _nanogpt, "sit": _sit, "llama": _llama}
    if record.get("experiment") not in adapters:
        raise UserError(f"{folder} must be a run of {', '.join(adapters)}, is of {record.get('experiment')}: {REMEDY}")
    return adapters[record["experiment"]](folder, record["config"], rows)


def _nanogpt(folder: Path, config: dict[str, Any], rows: int) -> Subject:
    from nanoGPT import data
    from nanoGPT.config import Config
    from nanoGPT.model import GPT
    from nanoGPT.train import fit_vocabulary

    settings = fit_vocabulary(from_dict(Config, config))
    tokens = data.load(settings.data.folder, "val")
    offsets = data.validation_windows(tokens, count=rows, context=settings.model.context)
    inputs, targets = data.windows(tokens, offsets, settings.model.context)
    model = _seeded(settings.seed, lambda: GPT(settings.model))
    return _subject(model, lambda: model(inputs, targets)[1], roles_of(model), *_stored(folder, model))


def _sit(folder: Path, config: dict[str, Any], rows: int) -> Subject:
    from SIT import data
    from SIT.config import Config
    from SIT.model import SiT, tensor_roles
    from SIT.objective import VALIDATION, draw, losses_of
    from SIT.train import open_encoder, open_items

    settings = from_dict(Config, config | {"dtype": "float64"})
    items, encoder = open_items(settings, ONE)["val"], open_encoder(settings, ONE)
    drawn = draw((VALIDATION,), min(rows, len(items)), items.shape, settings.objective)
    drawn = drawn._replace(dropped=torch.zeros_like(drawn.dropped), noise=drawn.noise.double(), t=drawn.t.double())
    batch = data.take(items, list(range(len(drawn.t))), seed=0)
    batch["x"] = batch["x"].double()
    both = nn.ModuleDict({name: _seeded(settings.seed, lambda: SiT(settings.model)) for name in ("model", "average")})
    model = both["model"]

    def loss() -> Tensor:
        denoising, projection = losses_of(model, batch, drawn, encoder, settings, ONE)
        return denoising.mean() + settings.objective.projection_weight * projection.mean()

    roles = roles_of(model, tensor_roles(model, settings.optimizer.modulation))
    return _subject(model, loss, roles, *_stored(folder, both))


def _llama(folder: Path, config: dict[str, Any], rows: int) -> Subject:
    import torch.distributed.checkpoint as dcp
    from torch.nn.functional import cross_entropy

    from common.tensor_reader import TensorReader
    from Llama.checkpoints import FOLDER, numbered, verify
    from Llama.data import Lane, to_batch
    from Llama.model import FLAVORS, Llama
    from Llama.sources import open_source, read
    from Llama.tokenizer import Tokenizer

    titan = import_module("torchtitan.models.llama3.model.model")  # after Llama, which makes it importable on CPUs
    titan.apply_rotary_emb = _rotate  # torchtitan's rounds queries and keys to float32
    named, length = config["model"], config["training"]["seq_len"]
    text = next(each for each in (config["validation"], config["training"]) if each["dataset"])
    if text["dataset"] not in ("text", "c4"):
        raise UserError(f"{folder} was fine-tuned, and the loss here is that of text: name a run of pretraining")
    source = open_source(text["dataset"], text["dataset_path"], "validation")
    lane = Lane(read(source, 0, 1, seed=0), Tokenizer(Path(named["hf_assets_path"])), length)
    inputs, labels = to_batch(np.stack([lane.window() for _ in range(rows)]))
    model = Llama(replace(FLAVORS[named["name"]][named["flavor"]], max_seq_len=length))
    launch.seed_all(config["seed"])
    model.init_weights()
    initial = _copied(model)

    def load(step: int) -> None:
        if step == 0:
            model.load_state_dict(initial)
        else:
            verify(folder / FOLDER / f"step-{step}")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
                reader = TensorReader(folder / FOLDER / f"step-{step}")
                dcp.load(model.state_dict(), storage_reader=reader, no_dist=True)

    def loss() -> Tensor:
        return cross_entropy(model(inputs["input"]).flatten(0, 1), labels.flatten())

    steps = [0, *sorted(numbered(folder / FOLDER))]
    return _subject(model, loss, roles_of(model), steps, load)


def _rotate(xq: Tensor, xk: Tensor, freqs_cis: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Apply torchtitan's rotary embedding in the dtype that queries and keys (b, T, heads, D) come in."""
    from torchtitan.models.llama3.model.model import reshape_for_broadcast

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * reshape_for_broadcast(freqs_cis, pairs, positions)).flatten(3)

    return turned(xq), turned(xk)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    launch.seed_all(seed)
    return make()


def _stored(folder: Path, model: nn.Module) -> tuple[list[int], Callable[[int], None]]:
    """Return the steps of a run of nanoGPT or SIT, and a function that loads one into the initialized model."""
    initial = _copied(model)
    steps = sorted(manifest["step"] for _, manifest in survey(folder / "checkpoints")[0])

    def load(step: int) -> None:
        model.load_state_dict(initial)
        if step and checkpoint.load(folder / "checkpoints", model, step=step) is None:
            raise UserError(f"{folder} has no checkpoint of step {step}: name another")

    return [0, *steps], load


def _subject(
    model: nn.Module,
    loss: Callable[[], Tensor],
    roles: dict[str, str],
    steps: list[int],
    load: Callable[[int], None],
) -> Subject:
    model.eval().double().requires_grad_(False)
    named = dict(model.named_parameters())
    matrices = {name: named[name] for name, role in roles.items() if role == "matrix" and named[name].ndim == 2}
    return Subject(model, loss, matrices, steps, load)
