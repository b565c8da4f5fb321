"""GPT-2 (Radford et al. 2019), with nanoGPT's module names and the logits of Hugging Face's GPT2LMHeadModel.

Shapes: B sequences, T tokens, C width, H heads, D = C / H, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import BadValue, UserError, one_line
from nanoGPT.config import GPTConfig as GPTConfig

LEAST_TEMPERATURE = 1e-30  # here only the likeliest tokens have a probability above 0; near 1e-38 float32 gives 0 / 0


class LayerNorm(nn.LayerNorm):
    """A LayerNorm in the dtype of its input: the residual stream is fp32 even if FSDP gathers the weights in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)  # (B, T, C)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads concatenated
        return F.dropout(self.c_proj(y), self.dropout, self.training)  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C); GPT-2 was trained with the tanh form
        return F.dropout(self.c_proj(x), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class GPT(nn.Module):
    """A GPT-2 whose output head is tied to its token embedding.

    Example: `logits, loss = GPT(GPTConfig(n_layer=2))(tokens, targets)`.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.vocab_size < 1:
            raise BadValue(f"vocab_size must be at least 1, got {config.vocab_size}: set it to the corpus'")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the weights as GPT-2: N(0, 0.02), with a smaller deviation for projections into the residual stream."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and module is not self.lm_head:
                # The stream sums 2 n_layer projections; dividing by the root keeps their variance that of one.
                residual = math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj") else 1.0
                nn.init.normal_(module.weight, std=0.02 / residual)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the logits (B, T, V) of every next token, and their mean cross-entropy (nats) with targets (B, T).

        Targets of -1 are ignored. Raises ValueError if T exceeds the context.
        """
        T = tokens.size(1)
        if T > self.config.context:
            raise ValueError(f"the context is {self.config.context} tokens, got {T}: shorten the sequence")
        positions = torch.arange(T, device=tokens.device)  # (T)
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)  # (B, T, C)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        if targets is None:
            return logits, None
        # In fp32 or wider: under autocast the logits are bf16, in which a loss has two to three digits.
        precise = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))  # (B T, V)
        return logits, F.cross_entropy(precise, targets.flatten(), ignore_index=-1)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding, as Hugging Face's models do; that of positions is not indexed by tokens."""
        return self.wte

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head."""
        return self.lm_head

    def num_parameters(self) -> int:
        """Count the parameters, the tied head once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Return the floating-point operations per token, forward and backward: 6 N + 12 L C T (PaLM, appendix B).

        N excludes the position embedding, which is only looked up, and includes the tied embedding, used as the head.
        """
        config = self.config
        multiplied = self.num_parameters() - self.wpe.weight.numel()
        return 6 * multiplied + 12 * config.n_layer * config.n_embd * config.context

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        vocab_size: int | None = None,
    ) -> Tensor:
        """Continue tokens (B, T) by sampling: (B, T + max_new_tokens).

        temperature: 0 takes the likeliest token. top_k: sample only among the k likeliest. vocab_size: the corpus',
        if the model's is padded. Call `eval()` first if there is dropout.

        Raises ValueError for a temperature that is negative or not finite, and for logits that are not finite.
        """
        if not 0 <= temperature < math.inf:
            raise BadValue(f"temperature must be 0 or more, and finite; got {temperature}")
        for _ in range(max_new_tokens):
            logits, _ = self(tokens[:, -self.config.context :])  # (B, T, V)
            logits = logits[:, -1, :vocab_size].float()  # (B, V)
            if not logits.isfinite().all():
                raise BadValue("logits must be finite, are not: the weights have diverged, use those of another run")
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < kth, -torch.inf)
            if temperature == 0:
                next_token = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            else:
                below = logits - logits.amax(dim=-1, keepdim=True)  # (B, V), at most 0, so no quotient is inf
                probabilities = F.softmax(below / max(temperature, LEAST_TEMPERATURE), dim=-1)  # (B, V)
                next_token = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1)
            tokens = torch.cat([tokens, next_token], dim=1)
        return tokens

    @classmethod
    def from_huggingface(cls, source: Any, dropout: float = 0.0) -> "GPT":
        """Convert a GPT2LMHeadModel, given as an object or by name ("gpt2", "gpt2-medium", a folder).

        Raises UserError if it can be loaded neither locally nor from the Hub, ValueError if it is not a plain GPT-2.
        """
        theirs = download(source) if isinstance(source, str) else source
        hf = theirs.config
        required = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True}
        required |= {"scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
        for key, value in required.items():
            if getattr(hf, key) != value:
                raise BadValue(f"GPT-2 has {key} = {value}, got {getattr(hf, key)}: use a plain GPT-2")
        ours = cls(GPTConfig(hf.n_layer, hf.n_head, hf.n_embd, hf.n_positions, hf.vocab_size, True, dropout))
        state = {}
        for name, weight in theirs.state_dict().items():
            name = name.removeprefix("transformer.").replace("h.", "blocks.", name.startswith("transformer.h."))
            stored_transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))  # Conv1D (in, out)
            state[name] = weight.t() if stored_transposed else weight
        ours.load_state_dict(state)
        return ours.to(theirs.dtype)


def download(name: str) -> nn.Module:
    """Load a GPT2LMHeadModel from a folder, Hugging Face's cache, or the Hub."""
    from transformers import GPT2LMHeadModel  # slow to import, and only needed here

    try:
        model, found = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
    except ImportError:
        raise  # a package to install
    except Exception as error:  # Hub errors, damaged files and mismatched shapes have no narrower common class
        raise UserError(
            f"GPT-2 {name!r} cannot be loaded from a folder, HF_HOME or the Hugging Face Hub "
            f"({one_line(error)[:200]}): run `hf download {name} --local-dir FOLDER` on a machine with internet, "
            "and give that folder"
        ) from error
    # The head is tied; other missing weights would be drawn at random.
    if lacking := sorted(set(found["missing_keys"]) - {"lm_head.weight"}):
        raise UserError(
            f"{name} must hold all weights of a GPT-2, lacks {len(lacking)}, as {lacking[0]}: download it again"
        )
    return model
