"""Import and export of weights: Hugging Face's format, and checkpoints of other runs.

    python -m Llama.weights runs/llama/stdlib/RUN --out exported           # for transformers, vLLM, lm-eval
    python -m Llama.weights runs/llama/stdlib/RUN --out exported --step 200 --dtype float32

An export holds config.json, model*.safetensors, the tokenizer and, of a fine-tuned run, its chat template. A run can
start from Hugging Face weights, a run or one of its checkpoints: --checkpoint.initial_load_path.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from common.guard import main_guard
from common.options import parse_options


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    """Folder of a run: runs/llama/GROUP/NAME."""
    out: Path
    """Folder to write."""
    step: int | None = None
    """Step of the checkpoint; None: the newest."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of the exported weights."""


def options() -> Options:
    """Read the command line."""
    return parse_options(Options, "python -m Llama.weights", __doc__)


if __name__ == "__main__":  # --help and errors before the imports below, which take seconds
    main_guard(options)

import os
import warnings
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from common import UserError
from common.json_files import read_object
from common.manifest import Damaged
from common.tensor_reader import TensorReader
from common.whole import written_aside
from Llama.checkpoints import FOLDER, newest_checkpoint, verify
from Llama.hf import DTYPES, Adapter, check_config, hf_config, stored_tensors
from Llama.model import FLAVORS, Shape, weights_on_meta
from Llama.templates import FINE_TUNING, TEMPLATES, Template
from Llama.tokenizer import Tokenizer, export_tokenizer


def find_weights(path: Path) -> tuple[Path, bool]:
    """Return the folder of the weights at `path` (of a run: the newest), and whether they are Hugging Face's.

    Raises UserError if there are none.
    """
    if any(path.glob("*.safetensors")):
        return path, True
    if (path / ".metadata").is_file():
        return path, False
    if newest := newest_checkpoint(path):
        return newest, False
    found = "holds none" if path.is_dir() else "does not exist"
    raise UserError(
        f"weights are *.safetensors files, a checkpoint (step-N) or the folder of a run; {path} {found}: download "
        "them (hf download ... --local-dir FOLDER), or name another folder"
    )


def check_weights(path: Path, is_hf: bool, shape: Shape, name: str) -> None:
    """Raise UserError, naming the first difference, for weights that are not exactly those of a model.

    path, is_hf: from `find_weights`. name: of the model, for the message.
    """
    expected = weights_on_meta(shape)
    if is_hf:
        expected = Adapter(shape, None).to_hf(expected)
        if (path / "config.json").is_file():
            check_config(path / "config.json", shape, name)
        found = {key: tensor.shape for key, tensor in stored_tensors(path).items()}
    else:
        found = checkpoint_shapes(path)
    remedy = "name their own model.name and model.flavor, or other weights"
    for key, tensor in expected.items():
        if key not in found or tuple(found[key]) != tuple(tensor.shape):
            there = f"it is of shape {tuple(found[key])}" if key in found else "it is missing"
            if key == "lm_head.weight" and key not in found:
                there = "it is missing, so the head is tied to the embedding, and this model's is not"
            raise UserError(
                f"the weights of {name} must have {key} of shape {tuple(tensor.shape)}; in {path} {there}: {remedy}"
            )
    if leftover := sorted(found.keys() - expected.keys()):
        raise UserError(
            f"the weights of {name} must be only those of its model; {path} also has {leftover[0]} and "
            f"{len(leftover) - 1} more: {remedy}"
        )


def checkpoint_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's model tensors, without entries of the optimizer and the run.

    Raises UserError for tensors that are not floats, and for a damaged checkpoint.
    """
    try:
        # Called by every rank of a run: only the first reads all bytes.
        verify(path, contents=os.environ.get("RANK", "0") == "0")
        metadata = TensorReader(path).read_metadata().state_dict_metadata
    except Damaged as error:
        raise UserError(f"weights must be undamaged; {path} is not: {error}; name an older step-N") from error
    names = [key for family in ("llama2", "qwen2.5") for key in weights_on_meta(FLAVORS[family]["debug"])]
    parts = {key.partition(".")[0] for key in names}
    found = {key: entry for key, entry in metadata.items() if key.partition(".")[0] in parts}
    for key, entry in found.items():
        if not isinstance(entry, TensorStorageMetadata) or entry.properties.dtype not in DTYPES.values():
            raise UserError(f"weights must be float tensors; {key} in {path} is not: name another checkpoint")
    return {key: tuple(entry.size) for key, entry in found.items()}


# ---- Export


def export(options: Options) -> Path:
    """Write a run's weights in transformers' format; returns the folder."""
    record = options.run / "config.json"
    if not record.is_file():
        raise UserError(f"need the folder of a run, with its config.json; {options.run} has none: name another")
    if options.out.exists():
        raise UserError(f"--out must be a new folder; {options.out} exists: remove it, or name another")
    settings = recorded(record)
    step = options.run / FOLDER / f"step-{options.step}" if options.step is not None else options.run
    checkpoint, _ = find_weights(step)
    model = settings["model"]
    if model["flavor"] not in FLAVORS.get(model["name"], ()):
        raise UserError(f"{record} must name a model of this version, names {model['name']} {model['flavor']}")
    shape, assets = FLAVORS[model["name"]][model["flavor"]], Path(model["hf_assets_path"])
    dtype = getattr(torch, options.dtype)
    weights = {name: torch.empty_like(w, dtype=dtype, device="cpu") for name, w in weights_on_meta(shape).items()}
    check_weights(checkpoint, False, shape, f"{model['name']} {model['flavor']}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        dcp.load(weights, storage_reader=TensorReader(checkpoint), no_dist=True)
    with written_aside(options.out) as partial:
        tuned = settings["training"]["dataset"] in FINE_TUNING
        template = TEMPLATES[text_at(record, settings, "fine_tuning", "template")] if tuned else None
        write_hf(partial, weights, shape, assets, template)
    print(f"{options.out}: {checkpoint}, in {options.dtype}")
    return options.out


def recorded(path: Path) -> dict[str, Any]:
    """Return the config in a run's config.json; raises UserError if it is damaged, or of another program."""
    config = read_object(path).get("config")
    for section, key in (("model", "name"), ("model", "flavor"), ("model", "hf_assets_path"), ("training", "dataset")):
        text_at(path, config, section, key)
    return config


def text_at(path: Path, config: Any, section: str, key: str) -> str:
    """Return a config's setting as text; raises UserError, naming the file, if it is missing."""
    found = config.get(section) if isinstance(config, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get(key), str):
        raise UserError(f"{path} must be a run's of Llama.train, with {section}.{key} in its config: restore it")
    return found[key]


def write_hf(
    folder: Path, weights: dict[str, Tensor], shape: Shape, assets: Path, template: Template | None = None
) -> None:
    """Write a model's weights and config, and the tokenizer of `assets`, with a fine-tuned model's template."""
    from huggingface_hub import save_torch_state_dict

    export_tokenizer(folder, assets, template)  # first: it can fail
    save_torch_state_dict(Adapter(shape, None).to_hf(weights), folder)
    tokenizer = Tokenizer(assets)
    ends = [tokenizer.eos_id]
    if template and template.end:
        ends.append(tokenizer.token_to_id(template.end))  # generation also stops at it
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    dtype = next(iter(weights.values())).dtype
    hf_config(shape, dtype=dtype, **ids).save_pretrained(folder)


def main() -> None:
    export(options())


if __name__ == "__main__":
    main_guard(main)
