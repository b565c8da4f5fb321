"""Output layers, distinguished from hidden Linear layers by their position in a model."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

from torch import nn

_FUSED = 6  # most blocks of one hidden layer that later modules read apart: adaLN's shifts, scales and gates
_MULTIPLE, _PADDING = 8, 128  # vocabularies are padded to a multiple of at least 8, at most 128

_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def find(model: nn.Module, tables: set) -> dict[nn.Module, str]:
    """Return "head" for every output layer, and the reason for doubt about a Linear that may be one.

    tables: the weights of the model's embeddings; a Linear tied to one of them is left out.
    """
    found: dict[nn.Module, str] = dict.fromkeys(_declared(model), "head")
    hidden = _hidden(model)
    vocabularies: list[Any] = [weight.shape for weight in _vocabularies(model) or tables]
    labels = {getattr(getattr(module, "config", None), "num_labels", None) for module in model.modules()}
    modules = list(model.modules())
    if sum(isinstance(module, _WEIGHTED) or is_transposed_linear(module) for module in modules) < 2 and not tables:
        return found  # a layer alone
    everywhere = {size for module in modules for size in _reads(module)}
    later: set[int] = set()  # input sizes of the modules registered after this one
    last = True  # whether no hidden weight is registered after this one
    for module in reversed(modules):
        if isinstance(module, nn.Linear) and module not in hidden and module.weight not in tables:
            verdict = found.get(module) or _verdict(module, vocabularies, labels, later, everywhere, last)
            if verdict != "matrix":
                found[module] = verdict
        last = last and not (isinstance(module, _WEIGHTED) and module not in found)
        later |= _reads(module)
    return found


def is_transposed_linear(module: nn.Module) -> bool:
    """Return whether a module is Hugging Face's Conv1D, a Linear whose weight is stored (in, out)."""
    return any(c.__module__ == "transformers.pytorch_utils" and c.__name__ == "Conv1D" for c in type(module).__mro__)


def _verdict(
    linear: nn.Linear,
    vocabularies: list[tuple[int, int]],
    labels: set[int | None],
    later: set[int],
    everywhere: set[int],
    last: bool,
) -> str:
    """Return "head", "matrix" or the reason for doubt, for a Linear outside the repeated layers."""
    outputs, square = linear.out_features, linear.out_features == linear.in_features
    read = outputs in later or any(size > 1 and outputs % size == 0 and outputs // size <= _FUSED for size in later)
    sizes = [rows for rows, width in vocabularies if width == linear.in_features and _about(rows, outputs)]
    if sizes:
        if not read:
            return "head"
        if square and outputs not in sizes:
            return "matrix"
        return f"may be a head, with {outputs} outputs for a table of {sizes[0]}, or hidden"
    if outputs == 1 or outputs in labels:
        return "head"
    if read or square:
        return "matrix"
    if last and outputs not in everywhere:
        return "head"
    return f"may be a head, since no module after it reads its {outputs} outputs, or hidden"


def _about(rows: int, outputs: int) -> bool:
    """Return whether two sizes are of one vocabulary, either of them padded."""
    low, high = sorted((rows, outputs))
    return high == low or (high % _MULTIPLE == 0 and high <= -(-low // _PADDING) * _PADDING)


def _declared(model: nn.Module) -> Iterator[nn.Linear]:
    """Yield the Linear layers that Hugging Face models name as their output embeddings."""
    for module in model.modules():
        ask = getattr(module, "get_output_embeddings", None)
        try:
            answer = ask() if callable(ask) else None
        except (AttributeError, NotImplementedError):  # a model without a head
            continue
        several = answer if isinstance(answer, nn.ModuleList) else [answer]  # Musicgen has one per codebook
        yield from (each for each in several if isinstance(each, nn.Linear))


def _vocabularies(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that Hugging Face models name as their input embeddings."""
    found = []
    for module in model.modules():
        ask = getattr(module, "get_input_embeddings", None)
        try:
            answer = ask() if callable(ask) else None
        except (AttributeError, NotImplementedError):  # a model of images or sound
            continue
        found += [answer.weight] if isinstance(answer, nn.Embedding) else []
    return found


def _hidden(model: nn.Module) -> set[nn.Module]:
    """Return the modules that hold no output layer.

    Those below repeated layers, those of the body under a Hugging Face model's head, and those in a Sequential
    whose outputs the next one reads.
    """
    below: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            parts = [each for each in module.children() if any(True for _ in each.children())]
            kinds = [type(each) for each in parts]
            below |= {part for each in parts if kinds.count(type(each)) > 1 for part in each.modules()}
        if isinstance(module, nn.Sequential):
            weighted = [each for each in module if any(True for _ in each.parameters())]
            below |= {each for each, following in pairwise(weighted) if _writes(each) & _reads(following)}
        body = getattr(module, "base_model", None) if hasattr(module, "base_model_prefix") else None
        if isinstance(body, nn.Module) and body is not module:
            below |= set(body.modules())
    return below


def _writes(module: nn.Module) -> set[int]:
    return {module.out_features} if isinstance(module, nn.Linear) else set()


def _reads(module: nn.Module) -> set[int]:
    """Return the sizes of a module's own inputs."""
    if isinstance(module, nn.Linear):
        return {module.in_features}
    if isinstance(module, nn.modules.conv._ConvNd):
        return {module.in_channels}
    if isinstance(module, nn.MultiheadAttention):
        return {module.embed_dim, module.kdim, module.vdim}
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return {module.input_size}
    if is_transposed_linear(module):
        return {cast(int, module.nx)}
    return {param.numel() for param in module.parameters(recurse=False) if param.ndim == 1}  # a norm's gains
