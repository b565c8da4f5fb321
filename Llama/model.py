"""Llama-2: torchtitan's transformer with the published shapes, and weights that do not depend on the layout."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.overrides import TorchFunctionMode
from torchtitan.models.llama3 import Transformer, TransformerModelArgs
from torchtitan.models.llama3.model.args import RoPEScalingArgs

# torchtitan's model stretches the rotary wavelengths as Llama-3.1 does, unless the factor is 1.
_PLAIN_ROPE = RoPEScalingArgs(scaling_factor=1.0)


def _shape(**sizes) -> TransformerModelArgs:
    return TransformerModelArgs(
        **{"vocab_size": 32_000, "rope_theta": 10_000, "rope_scaling_args": _PLAIN_ROPE, **sizes}
    )


# Touvron et al., "Llama 2", arXiv 2307.09288, and the config.json files of meta-llama/Llama-2-*-hf; feed-forward
# widths 11,008, 13,824 and 28,672 follow from multiple_of and ffn_dim_multiplier. debug is ours.
FLAVORS = {
    "debug": _shape(dim=128, n_layers=4, n_heads=4, multiple_of=32, vocab_size=4096),
    "7B": _shape(dim=4096, n_layers=32, n_heads=32, multiple_of=256),
    "13B": _shape(dim=5120, n_layers=40, n_heads=40, multiple_of=256),
    "70B": _shape(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3),
}


class Llama(Transformer):
    """torchtitan's transformer, whose weights at the start are the same on any number of ranks."""

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw the weights with the default generator, which must be seeded alike on all ranks."""
        with _DrawWhole():
            super().init_weights(buffer_device)


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
