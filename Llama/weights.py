"""Weights from elsewhere, and for elsewhere: the Hugging Face format, and other runs' checkpoints.

    python -m Llama.weights runs/llama/stdlib/RUN --out exported           # for transformers, vLLM, lm-eval
    python -m Llama.weights runs/llama/stdlib/RUN --out exported --step 200 --dtype float32

What is exported has config.json, model*.safetensors, the tokenizer and, of a fine-tuned run, its chat template. Any of
the three kinds of folder (Hugging Face weights, a run, one of its checkpoints) is where a run can start:
--checkpoint.initial_load_path.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed.checkpoint as dcp
import tyro
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

from common import UserError
from common.corpus import written_aside
from common.launch import main_guard
from Llama.model import FLAVORS, Llama, Shape
from Llama.templates import FINE_TUNING, TEMPLATES

if TYPE_CHECKING:
    from transformers import LlamaConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CHECKPOINTS = "checkpoint"  # torchtitan's folder of them, below a run's


class Adapter(Llama3StateDictAdapter):
    """torchtitan's translation to Hugging Face's names, for weights that are cut within an attention head, too."""

    def _permute(self, weight: Tensor, *sizes: int) -> Tensor:
        # A view of a shard would mix heads, without an error where their number happens to divide.
        if isinstance(weight, DTensor):
            weight = weight.redistribute(placements=[Replicate()] * weight.device_mesh.ndim)
        return super()._permute(weight, *sizes)


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    """The folder of a run: runs/llama/GROUP/NAME."""
    out: Path
    """The folder to make."""
    step: int | None = None
    """Of the checkpoint; None is the newest."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the weights that are written."""


def newest_checkpoint(folder: Path) -> Path | None:
    """Find a run's newest complete checkpoint."""
    steps = {
        int(match[1]): path
        for path in (folder / CHECKPOINTS).glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / ".metadata").is_file()
    }
    return steps[max(steps)] if steps else None


def find_weights(path: Path) -> tuple[Path, bool]:
    """Find the weights that a folder holds or, of a run, its newest; and tell whether they are Hugging Face's.

    Raises UserError where there are none.
    """
    if any(path.glob("*.safetensors")):
        return path, True
    if (path / ".metadata").is_file():
        return path, False
    if newest := newest_checkpoint(path):
        return newest, False
    what = "holds none" if path.is_dir() else "does not exist"
    raise UserError(
        f"weights are *.safetensors files, a checkpoint (step-N) or the folder of a run; {path} {what}: download "
        "them (hf download ... --local-dir FOLDER), or name another folder"
    )


def check_weights(path: Path, is_hf: bool, shape: Shape, name: str) -> None:
    """Refuse weights that are another model's, naming what differs. `name`: what a config calls the model."""
    expected = _weights_on_meta(shape)
    if is_hf:
        expected = Adapter(shape, None).to_hf(expected)
        found = _hf_sizes(path)
        if (path / "config.json").is_file():
            _check_config(path, shape, name)
    else:
        metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        found = {key: entry.size for key, entry in metadata.items() if hasattr(entry, "size")}
    for key, tensor in expected.items():
        if key not in found or tuple(found[key]) != tuple(tensor.shape):
            there = f"of shape {tuple(found[key])}" if key in found else "missing"
            raise UserError(
                f"the weights of {name} must have {key} of shape {tuple(tensor.shape)}; in {path} it is {there}: name "
                "their own model.name and model.flavor, or other weights"
            )


def _weights_on_meta(shape: Shape) -> dict[str, Tensor]:
    with torch.device("meta"):
        return Llama(shape).state_dict()


def _hf_sizes(path: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    sizes = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            sizes |= {key: weights.get_slice(key).get_shape() for key in weights.keys()}
    return sizes


def _check_config(path: Path, shape: Shape, name: str) -> None:
    from transformers import AutoConfig

    found, expected = AutoConfig.from_pretrained(path).to_dict(), hf_config(shape).to_dict()
    for key in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_parameters"):  # shapes miss these
        if found.get(key) != expected[key]:
            raise UserError(
                f"the weights of {name} must have {key} {expected[key]}; {path / 'config.json'} says "
                f"{found.get(key)}: name their own model.name and model.flavor, or other weights"
            )


def hf_config(shape: Shape, **more) -> "LlamaConfig":
    """Say a shape in transformers' words."""
    from transformers import LlamaConfig

    scaling = shape.rope_scaling_args
    rope = {"rope_type": "default", "rope_theta": float(shape.rope_theta)}
    if scaling.scaling_factor != 1:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.scaling_factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return LlamaConfig(
        hidden_size=shape.dim,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads or shape.n_heads,
        intermediate_size=len(_weights_on_meta(shape)["layers.0.feed_forward.w1.weight"]),
        vocab_size=shape.vocab_size,
        rms_norm_eps=shape.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=shape.max_seq_len,
        architectures=["LlamaForCausalLM"],
        **more,
    )


# ---- Export


def export(options: Options) -> Path:
    """Write a run's weights as transformers reads them, and return the folder."""
    record = options.run / "config.json"
    if not record.is_file():
        raise UserError(f"what is exported is the folder of a run, with its config.json; {options.run} has none")
    if options.out.exists():
        raise UserError(f"--out must be a new folder; {options.out} is there: remove it, or name another")
    settings = json.loads(record.read_text())["config"]
    step = options.run / CHECKPOINTS / f"step-{options.step}" if options.step is not None else options.run
    checkpoint, _ = find_weights(step)
    model = settings["model"]
    shape, assets = FLAVORS[model["name"]][model["flavor"]], Path(model["hf_assets_path"])
    dtype = getattr(torch, options.dtype)
    weights = {name: torch.empty_like(w, dtype=dtype, device="cpu") for name, w in _weights_on_meta(shape).items()}
    dcp.load(weights, checkpoint_id=checkpoint)
    with written_aside(options.out) as partial:
        tuned = settings["training"]["dataset"] in FINE_TUNING
        template = TEMPLATES[settings["fine_tuning"]["template"]] if tuned else None
        write_hf(partial, weights, shape, assets, ends=(template.end,) if template and template.end else ())
        if template:
            (partial / "chat_template.jinja").write_text(template.jinja())
    print(f"{options.out}: {checkpoint}, in {options.dtype}")
    return options.out


def write_hf(folder: Path, weights: dict[str, Tensor], shape: Shape, assets: Path, ends: tuple[str, ...] = ()) -> None:
    """Write weights of Llama.model, their config, and the tokenizer of `assets`; `ends`: more tokens to stop at."""
    from huggingface_hub import save_torch_state_dict
    from tokenizers import Tokenizer

    save_torch_state_dict(Adapter(shape, None).to_hf(weights), folder)
    for name in TOKENIZER_FILES:
        if (assets / name).is_file():
            shutil.copy(assets / name, folder)
    tokens = json.loads((assets / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(assets / "tokenizer.json"))
    ids = {}
    for kind in ("bos", "eos"):
        token = tokens.get(f"{kind}_token")
        token = token["content"] if isinstance(token, dict) else token  # the Hub has both spellings
        ids[f"{kind}_token_id"] = token and tokenizer.token_to_id(token)
    if ends:
        ids["eos_token_id"] = [ids["eos_token_id"], *map(tokenizer.token_to_id, ends)]
    dtype = next(iter(weights.values())).dtype
    hf_config(shape, dtype=dtype, **ids).save_pretrained(folder)


def main() -> None:
    export(tyro.cli(Options, prog="python -m Llama.weights", description=__doc__))


if __name__ == "__main__":
    main_guard(main)
