"""Llama-2 and 3.1: torchtitan's transformer with the published shapes, and weights that do not depend on the layout."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode
from torchtitan.models.attention import create_attention_mask
from torchtitan.models.llama3 import Transformer, TransformerModelArgs
from torchtitan.models.llama3.model.args import RoPEScalingArgs


@dataclass
class Shape(TransformerModelArgs):
    """torchtitan's, whose default is Llama-3.1's stretching of rotary wavelengths."""

    def update_from_config(self, job_config, **_) -> None:
        super().update_from_config(job_config)
        self.max_seq_len = max(job_config.training.seq_len, job_config.validation.seq_len)
        packing = job_config.fine_tuning.packing
        self.attn_type = "flex" if packing else "sdpa"  # what can look at one example of several in a row


_PLAIN_ROPE = RoPEScalingArgs(scaling_factor=1.0)


def _llama2(**sizes) -> Shape:
    plain = {"vocab_size": 32_000, "rope_theta": 10_000, "rope_scaling_args": _PLAIN_ROPE, "max_seq_len": 4096}
    return Shape(**plain | sizes)


def _llama3(**sizes) -> Shape:
    return Shape(vocab_size=128_256, rope_theta=500_000, ffn_dim_multiplier=1.3, n_kv_heads=8, **sizes)


# model.name, model.flavor. Touvron et al., "Llama 2", arXiv 2307.09288, Grattafiori et al., "The Llama 3 Herd of
# Models", arXiv 2407.21783, and the config.json files of meta-llama/Llama-2-*-hf and Llama-3.1-*; feed-forward widths
# (Llama-2: 11,008, 13,824, 28,672) follow from multiple_of and ffn_dim_multiplier. debug is ours.
FLAVORS = {
    "llama2": {
        "debug": _llama2(dim=128, n_layers=4, n_heads=4, multiple_of=32, vocab_size=4096, max_seq_len=256),
        "7B": _llama2(dim=4096, n_layers=32, n_heads=32, multiple_of=256),
        "13B": _llama2(dim=5120, n_layers=40, n_heads=40, multiple_of=256),
        "70B": _llama2(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3),
    },
    "llama3.1": {
        "8B": _llama3(dim=4096, n_layers=32, n_heads=32, multiple_of=1024),
        "70B": _llama3(dim=8192, n_layers=80, n_heads=64, multiple_of=4096),
    },
}


class Llama(Transformer):
    """torchtitan's transformer, whose weights at the start are the same on any number of ranks."""

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw the weights with the default generator, which must be seeded alike on all ranks."""
        with _DrawWhole():
            super().init_weights(buffer_device)

    def get_attention_masks(self, input_batch: Tensor, tokenizer, extra_inputs: dict[str, Tensor]) -> BlockMask:
        """Let a token see those before it in its example: positions (b, T) begin anew with each; a text has none.

        Raises TypeError, as torchtitan expects it, for a model whose rows hold one text.
        """
        if self.model_args.attn_type != "flex":
            raise TypeError("only packed rows need a mask")
        positions = extra_inputs.get("positions", torch.ones_like(input_batch))
        example = (positions == 0).cumsum(1)  # (b, T)

        def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (example[b, query] == example[b, key])

        rows, length = input_batch.shape
        return create_attention_mask(visible, rows, None, length, length, device=input_batch.device)


def weights_on_meta(shape: Shape) -> dict[str, Tensor]:
    """Return the names and sizes of a shape's weights, as tensors without memory."""
    with torch.device("meta"):
        return Llama(shape).state_dict()


class _DrawWhole(TorchFunctionMode):
    """Draws a DTensor's random values for the whole tensor, on each rank, and keeps this rank's shard.

    On CPUs every rank would otherwise draw its shard from the same seed, that is, the same values for each.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is nn.init.normal_:  # it would call Tensor.normal_ where this mode does not see it
            function, args, kwargs = Tensor.normal_, (kwargs["tensor"], kwargs["mean"], kwargs["std"]), {}
        if function not in (Tensor.normal_, Tensor.uniform_) or not isinstance(args[0], DTensor):
            return function(*args, **kwargs)
        sharded, *options = args
        whole = torch.empty(sharded.shape, dtype=sharded.dtype, device=sharded.device)
        function(whole, *options, **kwargs)
        mesh = sharded.device_mesh
        replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return sharded.copy_(replicated.redistribute(placements=sharded.placements))
