"""SiT (Ma et al., arXiv 2401.08740): DiT's transformer (Peebles and Xie, arXiv 2212.09748), predicting velocities.

With a projector for representation alignment (REPA, Yu et al., arXiv 2410.06940). Shapes: B images, H = W side, N
patches (tokens), P side of a patch, C width, D width of a head, Z encoder features.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from SIT.config import SIZES as SIZES
from SIT.config import ModelConfig as ModelConfig
from SIT.tokens import FREQUENCIES, patchify, sincos_positions, timestep_waves, unpatchify


class Attention(nn.Module):
    def __init__(self, width: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D) each
        y = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D)
        return self.proj(y.transpose(1, 2).reshape(B, N, C))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # (B, N, C); DiT was trained with the tanh form


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalize tokens (B, N, C), then scale and shift them by (B, 1, C), which depend on the condition; DiT's eps."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def modulation(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, outputs * width))


class Block(nn.Module):
    """A transformer block whose norms and residual branches are modulated by the condition (adaLN-Zero)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn = Attention(config.width, config.n_head)
        self.mlp = MLP(config.width, int(config.mlp_ratio * config.width))
        self.adaLN_modulation = modulation(config.width, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulations = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)  # (B, 1, C) each
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulations
        x = x + gate_attn * self.attn(modulate(x, shift_attn, scale_attn))  # (B, N, C)
        return x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))  # (B, N, C)


class FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)  # (B, 1, C) each
        return self.linear(modulate(x, shift, scale))  # (B, N, outputs)


class SiT(nn.Module):
    """A SiT, with the published module names where the modules agree.

    Example: `prediction, projected = SiT(ModelConfig(size="SiT-S/2"))(x, t, y)`. To sample, which needs no projection,
    `model.projector = None` saves its computation.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        config = self.config = config.resolved()
        patch = config.patch_size**2 * config.channels
        self.x_embedder = nn.Linear(patch, config.width)  # a convolution of stride P as a matrix
        self.register_buffer("pos_embed", torch.empty(1, config.grid**2, config.width))  # saved, as in published ones
        self.t_embedder = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.y_embedder = nn.Embedding(config.n_class + 1, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.projector = _projector(config) if config.z_dim else None
        self.final_layer = FinalLayer(config.width, patch)
        self.recompute = False  # in training: activation checkpointing of the blocks
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the weights as DiT; modulations and output are zero, so that blocks start as the identity."""
        self.pos_embed.copy_(sincos_positions(self.config.width, self.config.grid))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if "adaLN_modulation" in name or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
                elif name.startswith("t_embedder"):
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.weight, std=0.02)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predict from noisy inputs x (B, channels, H, W) at times t (B,) in [0, 1] with labels y (B,).

        Returns the prediction, with the shape of x, and the projected tokens (B, N, Z) in row-major order, or None
        without a projector. Raises ValueError if the shape of x is not the config's.
        """
        config = self.config
        if x.shape[1:] != config.input_shape:
            wanted = f"(B, {config.channels}, {config.input_size}, {config.input_size})"
            raise ValueError(f"x must be {wanted}, got {tuple(x.shape)}: set input_size and channels to the data's")
        # In float64 runs the weights are float64, but x and t are not.
        patches = patchify(x, config.patch_size).to(self.x_embedder.weight.dtype)  # (B, N, P P channels)
        waves = timestep_waves(t).to(self.t_embedder[0].weight.dtype)  # (B, 2 FREQUENCIES)
        condition = self.t_embedder(waves) + self.y_embedder(y)  # (B, C)
        tokens = self.x_embedder(patches) + self.pos_embed  # (B, N, C)
        projected = None
        for number, block in enumerate(self.blocks, start=1):
            if self.recompute and self.training:
                tokens = checkpoint(block, tokens, condition, use_reentrant=False)  # (B, N, C)
            else:
                tokens = block(tokens, condition)  # (B, N, C)
            if number == config.encoder_depth and self.projector is not None:
                projected = self.projector(tokens)  # (B, N, Z)
        prediction = self.final_layer(tokens, condition)  # (B, N, P P channels)
        return unpatchify(prediction, config.patch_size, config.channels), projected

    def num_parameters(self) -> int:
        """Count the trained parameters; position embeddings are constants."""
        return sum(parameter.numel() for parameter in self.parameters())


def _projector(config: ModelConfig) -> nn.Sequential:
    hidden = config.projector_width
    first, second, last = nn.Linear(config.width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, config.z_dim)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)


def modulation_names(model: SiT) -> list[str]:
    """Return the names of the modulation weights, which map the condition to shifts, scales and gates."""
    return [name for name, weight in model.named_parameters() if "adaLN_modulation" in name and weight.ndim == 2]


def tensor_roles(model: SiT, modulation: Literal["matrix", "adamw"] = "matrix") -> dict[str, str]:
    """Return the roles that differ from those of optimizers.roles_of: `build_optimizer(..., roles=these)`.

    patches       embedding   the first layer reads data, as a table reads tokens
    outputs       head        the last layers, of the prediction and of the projector, write data or features
    modulation    matrix      hidden weights with a dense input; or, with "adamw", embedding: AdamW with a matrix's
                              decay, so that only the rule changes

    roles_of finds the others: attention, MLPs, the timestep's MLP (its input is dense) and the projector's hidden
    layers are matrices, the labels' table is an embedding, biases are vectors.
    """
    roles = {"x_embedder.weight": "embedding", "final_layer.linear.weight": "head"}
    if model.projector is not None:
        roles[f"projector.{len(model.projector) - 1}.weight"] = "head"
    role = {"matrix": "matrix", "adamw": "embedding"}[modulation]
    return roles | dict.fromkeys(modulation_names(model), role)
