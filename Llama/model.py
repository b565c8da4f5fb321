"""Llama-2, Llama-3.1 and Qwen2.5: torchtitan's transformer with published shapes, and weights independent of layout."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode
from torchtitan.models.attention import create_attention_mask
from torchtitan.models.llama3 import Transformer, TransformerModelArgs
from torchtitan.models.llama3.model.args import RoPEScalingArgs


@dataclass
class Shape(TransformerModelArgs):
    """torchtitan's shape, whose default is Llama-3.1's scaling of rotary wavelengths."""

    qkv_bias: bool = False
    """Whether queries, keys and values have biases: Qwen2.5's do."""
    tied: bool = False
    """Whether the head is tied to the embedding."""

    def update_from_config(self, job_config, **_) -> None:
        super().update_from_config(job_config)
        self.max_seq_len = max(job_config.training.seq_len, job_config.validation.seq_len)
        packing = job_config.fine_tuning.packing
        self.attn_type = "flex" if packing else "sdpa"  # only flex supports attention within packed examples

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Return the number of parameters, and the operations per token, including those of a tied head."""
        count, flops = super().get_nparams_and_flops(model, seq_len)
        return count, flops + (6 * self.vocab_size * self.dim if self.tied else 0)


_PLAIN_ROPE = RoPEScalingArgs(scaling_factor=1.0)


def _llama2(**sizes) -> Shape:
    plain = {"vocab_size": 32_000, "rope_theta": 10_000, "rope_scaling_args": _PLAIN_ROPE, "max_seq_len": 4096}
    return Shape(**plain | sizes)


def _llama3(**sizes) -> Shape:
    return Shape(vocab_size=128_256, rope_theta=500_000, ffn_dim_multiplier=1.3, n_kv_heads=8, **sizes)


def _qwen(**sizes) -> Shape:
    plain = {"n_kv_heads": 2, "rope_theta": 1_000_000, "rope_scaling_args": _PLAIN_ROPE, "norm_eps": 1e-6}
    return Shape(**plain, qkv_bias=True, tied=True, **sizes)


# model.name, model.flavor. Touvron et al., "Llama 2", arXiv 2307.09288, Grattafiori et al., "The Llama 3 Herd of
# Models", arXiv 2407.21783, and the config.json files of meta-llama/Llama-2-*-hf and Llama-3.1-*; feed-forward widths
# (Llama-2: 11,008, 13,824, 28,672) follow from multiple_of and ffn_dim_multiplier. Qwen Team, "Qwen2.5 Technical
# Report", arXiv 2412.15115, and Qwen/Qwen2.5-0.5B. Those named debug are ours.
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
    "qwen2.5": {
        "debug": _qwen(dim=128, n_layers=4, n_heads=4, multiple_of=32, vocab_size=4096, max_seq_len=256),
        "0.5B": _qwen(
            dim=896,
            n_layers=24,
            n_heads=14,
            multiple_of=256,
            ffn_dim_multiplier=2.03,  # 4,864 wide
            vocab_size=151_936,
            max_seq_len=32_768,
        ),
    },
}
TIED_STD = 0.02  # of a tied table: initializer_range of Qwen2.5's config.json


class Llama(Transformer):
    """torchtitan's transformer, with initial weights that do not depend on the number of ranks."""

    def __init__(self, shape: Shape):
        super().__init__(shape)
        for layer in self.layers.values() if shape.qkv_bias else ():
            for name in ("wq", "wk", "wv"):
                width = len(getattr(layer.attention, name).weight)
                setattr(layer.attention, name, nn.Linear(shape.dim, width, bias=True))
        if shape.tied:
            self.shared = self.tok_embeddings
            self.tok_embeddings, self.output = Lookup(self.shared), TiedHead(self.shared)

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw the weights with the default generator, which must have the same seed on all ranks."""
        with _DrawWhole():
            super().init_weights(buffer_device)
            if self.model_args.tied:
                nn.init.normal_(self.shared.weight, mean=0.0, std=TIED_STD)
        for name, param in self.named_parameters():
            if name.endswith(".bias"):
                param.zero_()

    def get_attention_masks(self, input_batch: Tensor, tokenizer, extra_inputs: dict[str, Tensor]) -> BlockMask:
        """Return a causal mask within packed examples, at whose starts positions (b, T) are 0; texts have none.

        Raises TypeError, as torchtitan expects, for a model without packed rows.
        """
        if self.model_args.attn_type != "flex":
            raise TypeError("only packed rows need a mask")
        positions = extra_inputs.get("positions", torch.ones_like(input_batch))
        example = (positions == 0).cumsum(1)  # (b, T)

        def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (example[b, query] == example[b, key])

        rows, length = input_batch.shape
        return create_attention_mask(visible, rows, None, length, length, device=input_batch.device)


class OfTable(nn.Module):
    """A layer whose table is the model's parameter, so that FSDP keeps it gathered from the first layer to the last."""

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self._table = (table,)  # a module in a tuple is not registered a second time

    @property
    def weight(self) -> Tensor:
        """The table (vocabulary, width)."""
        return self._table[0].weight


class Lookup(OfTable):
    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)  # (b, T, width)


class TiedHead(OfTable):
    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)  # (b, T, vocabulary)


def weights_on_meta(shape: Shape) -> dict[str, Tensor]:
    """Return the names and sizes of a shape's weights, as tensors without memory."""
    with torch.device("meta"):
        return Llama(shape).state_dict()


class _DrawWhole(TorchFunctionMode):
    """Draws a DTensor's random values for the whole tensor on each rank, and keeps this rank's shard.

    Otherwise, on CPUs, all ranks draw their shards from the same seed: equal values in all shards.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is nn.init.normal_:  # it calls Tensor.normal_ where this mode is inactive
            function, args, kwargs = Tensor.normal_, (kwargs["tensor"], kwargs["mean"], kwargs["std"]), {}
        if function not in (Tensor.normal_, Tensor.uniform_) or not isinstance(args[0], DTensor):
            return function(*args, **kwargs)
        sharded, *options = args
        whole = torch.empty(sharded.shape, dtype=sharded.dtype, device=sharded.device)
        function(whole, *options, **kwargs)
        mesh = sharded.device_mesh
        replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return sharded.copy_(replicated.redistribute(placements=sharded.placements))
