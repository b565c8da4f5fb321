"""Weights in Hugging Face's format: names, the file of each tensor, and checks of foreign folders.

A model of this repository is a plain Llama or Qwen2.5 in floating point. Any other folder (quantized tensors, other
biases, another activation, a duplicate tensor) is refused in one line, since it could load and compute wrong values.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.hf_storage import _HFStorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

from common import UserError, one_line
from common.json_files import read_object
from Llama.model import Shape, weights_on_meta

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# safetensors' names of the supported element types, github.com/huggingface/safetensors
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX = "*.safetensors.index.json"
NOT_WEIGHTS = "rotary_emb.inv_freq"  # a table in old exports, computed here

# Entries of config.json that do not change logits: ids, defaults of generation and training, and provenance.
IRRELEVANT = set(
    "architectures attention_dropout bad_words_ids bos_token_id chunk_size_feed_forward do_sample dtype eos_token_id "
    "finetuning_task gradient_checkpointing id2label initializer_range label2id max_length max_position_embeddings "
    "max_window_layers output_attentions output_hidden_states pad_token_id pretraining_tp problem_type return_dict "
    "temperature tokenizer_class top_k top_p torch_dtype unk_token_id use_cache".split()
)


class Adapter(Llama3StateDictAdapter):
    """torchtitan's conversion to Hugging Face's names, also for weights sharded within an attention head."""

    def __init__(self, model_args: Shape, hf_assets_path: str | None):
        super().__init__(model_args, hf_assets_path)
        if model_args.qkv_bias:
            for theirs, ours in (("q", "wq"), ("k", "wk"), ("v", "wv")):
                self.from_hf_map[f"model.layers.{{}}.self_attn.{theirs}_proj.bias"] = (
                    f"layers.{{}}.attention.{ours}.bias"
                )
        if model_args.tied:
            del self.from_hf_map["lm_head.weight"]
            self.from_hf_map["model.embed_tokens.weight"] = "shared.weight"

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Rename, and reorder the entries of each head for Hugging Face's rotary embedding."""
        found = super().to_hf(state_dict)
        return found | {key: self._permute(found[key][:, None], heads)[:, 0] for key, heads in self._biases(found)}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Invert `to_hf`."""
        ordered = {
            key: self._reverse_permute(hf_state_dict[key][:, None], heads)[:, 0]
            for key, heads in self._biases(hf_state_dict)
        }
        return super().from_hf(hf_state_dict | ordered)

    def _biases(self, state_dict: dict[str, Any]) -> Iterator[tuple[str, int]]:
        """Yield the biases of queries and keys by Hugging Face's names, with their numbers of heads."""
        heads = {"q_proj.bias": self.model_args.n_heads, "k_proj.bias": self.model_args.n_kv_heads}
        return ((key, count) for key in state_dict for end, count in heads.items() if key.endswith(end))

    def _permute(self, weight: Tensor, *sizes: int) -> Tensor:
        # A view of a shard would mix heads, without an error if the sizes happen to divide.
        if isinstance(weight, DTensor):
            weight = weight.redistribute(placements=[Replicate()] * weight.device_mesh.ndim)
        return super()._permute(weight, *sizes)

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> "Reader":
        return Reader(path)


@dataclass(frozen=True)
class Stored:
    """A tensor of a file, from its header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Reader(HuggingFaceStorageReader):
    """torch's reader of safetensors, with `stored_tensors`: torch's uses the last file that holds a name."""

    def read_metadata(self) -> Metadata:
        tensors, storage = {}, {}
        for name, found in stored_tensors(Path(self.path)).items():
            dtype, size = DTYPES[found.dtype], torch.Size(found.shape)
            start = torch.Size([0] * len(size))
            chunks = [ChunkStorageMetadata(offsets=start, sizes=size)]
            tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)
            storage[MetadataIndex(name, start)] = _HFStorageInfo(str(found.file), size, dtype)
        return Metadata(tensors, storage_data=storage, storage_meta=StorageMeta(load_id=self.load_id))


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return the tensors in the headers of a folder's *.safetensors: those of its index, or all.

    Raises UserError for an index or file that cannot be read, a tensor in two files, and an element type other than a
    float of 16 bits or more.
    """
    owner = read_index(folder)
    tensors: dict[str, Stored] = {}
    for file in sorted({folder / name for name in owner.values()} if owner else folder.glob("*.safetensors")):
        for name, found in read_header(file).items():
            if name.endswith(NOT_WEIGHTS) or owner.get(name, file.name) != file.name:
                continue
            if name in tensors:
                raise UserError(
                    f"each tensor must be in one file; {name} is in {tensors[name].file} and in {file}: remove one, or "
                    "add the folder's model.safetensors.index.json"
                )
            if found.dtype not in DTYPES:
                raise UserError(
                    f"weights must be float32, float16 or bfloat16; {name} in {file} is {found.dtype}: download "
                    "weights that are not quantized"
                )
            tensors[name] = found
    if lost := owner.keys() - tensors.keys() - {name for name in owner if name.endswith(NOT_WEIGHTS)}:
        name = min(lost)
        raise UserError(f"{folder / owner[name]} must hold {name}, as the index says; download that file again")
    return tensors


def read_index(folder: Path) -> dict[str, str]:
    """Return the file of each tensor from the folder's index, {} without one; raises UserError if it is damaged."""
    indices = sorted(folder.glob(INDEX))
    if not indices:
        return {}
    path = folder / "model.safetensors.index.json"
    path = path if path in indices else indices[0]
    entries = read_object(path).get("weight_map")
    well_formed = isinstance(entries, dict) and all(
        isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file for file in entries.values()
    )
    if not entries or not well_formed:
        raise UserError(f"{path} must map tensors to files of its folder, in weight_map; download it again")
    return entries


def read_header(file: Path) -> dict[str, Stored]:
    """Return the shapes and element types of a file; raises UserError if it is missing, truncated or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}
            return {name: Stored(file, tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"weights must be whole safetensors files; {file} cannot be read ({one_line(error)[:100]}): download it "
            "again"
        ) from error


# ---- config.json


def check_config(path: Path, shape: Shape, name: str) -> None:
    """Raise UserError if a config.json differs from `shape` in any entry, known or not, that can change logits.

    The file is read as JSON: transformers' AutoConfig could run code of the folder.
    """
    entries, ours = read_object(path), hf_config(shape)
    if (kind := entries.get("model_type", ours.model_type)) != ours.model_type:
        raise UserError(
            f"the weights of {name} must be of model_type {ours.model_type!r}; {path} says model_type {kind!r}: name "
            "other weights"
        )
    expected = ours.to_dict() | {"head_dim": shape.dim // shape.n_heads}
    try:  # normalized: older files have rope_theta and rope_scaling, and omit former defaults
        found = type(ours)(**{key: value for key, value in entries.items() if key != "model_type"}).to_dict()
    except Exception as error:  # errors of transformers' checks have no narrower common class
        raise UserError(f"{path} must be the config.json of {name}: {one_line(error)[:200]}; restore it") from error
    for key in sorted(found.keys() - IRRELEVANT):
        value, here = found[key], expected.get(key)
        if value == here or key.startswith("_") or key.endswith("version") or (value is False and here is None):
            continue
        remedy = "name their own model.name and model.flavor, or other weights"
        if key == "tie_word_embeddings" and value:
            remedy = "their head is tied to the embedding, this model's is not; name other weights"
        elif here in (None, False):
            remedy = "the model here does not support it; name other weights"
        raise UserError(f"the weights of {name} must have {key} {here}; {path} says {value}: {remedy}")


def hf_config(shape: Shape, **more: Any) -> "PretrainedConfig":
    """Convert a shape to transformers' config."""
    from transformers import LlamaConfig, Qwen2Config

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
    if shape.qkv_bias:
        kind, more = Qwen2Config, {"tie_word_embeddings": shape.tied, **more}
    else:
        kind = LlamaConfig
    return kind(
        hidden_size=shape.dim,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads or shape.n_heads,
        intermediate_size=len(weights_on_meta(shape)["layers.0.feed_forward.w1.weight"]),
        vocab_size=shape.vocab_size,
        rms_norm_eps=shape.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=shape.max_seq_len,
        architectures=["Qwen2ForCausalLM" if shape.qkv_bias else "LlamaForCausalLM"],
        **more,
    )
