"""The role of every tensor of a model, the same for all optimizers.

    role        tensors                                               trained by   decayed
    matrix      hidden weights of two dimensions, batches of them     your rule    yes
    embedding   tables of tokens and positions                        AdamW        yes
    head        output layers: to the vocabulary, classes, a value    AdamW        yes
    vector      gains, biases, everything of one dimension            AdamW        no

A role follows from a tensor's module and the module's position in the model, never from a name. A tensor without a
clear role is refused.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from . import heads
from .checks import BadValue, closest

ROLES = ("matrix", "embedding", "head", "vector")
DECAYED = ("matrix", "embedding", "head")
GATES = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}  # row blocks of torch's fused recurrent weights

_CONVOLUTION = nn.modules.conv._ConvNd
_NORM = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_TABLE = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Use:
    """The use of a tensor in its model.

    Attributes:
        role: one of `ROLES`; None if the role is not clear.
        blocks: of a matrix, the number of fused blocks, each orthogonalized by itself.
        transposed: whether fused blocks are columns, of a weight that is stored (in, out).
        as_matrices: of a matrix, the optimizers' option of that name; None for a plain 2-D weight.
        doubt: the reason for a role of None.
    """

    role: str | None
    blocks: int = 1
    transposed: bool = False
    as_matrices: str | None = None
    doubt: str = ""


def roles_of(model: nn.Module, roles: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the role of every trainable parameter, by name.

    Args:
        model: any module. Heads are the layers that a model's `get_output_embeddings()` returns, and outside its
            repeated layers a Linear from the width to about the vocabulary, to the config's `num_labels`, to one
            number, or to a size that no later module reads.
        roles: {name pattern: role}, as "*.gate": "matrix"; overrules the model.

    Raises ValueError for a pattern or role that fits nothing, and one for all tensors without a clear role.

    Example:
        >>> roles_of(model, {"pos_embed": "embedding"})
    """
    return {name: str(use.role) for name, use in uses_of(model, roles).items()}


def uses_of(model: nn.Module, roles: Mapping[str, str] | None = None) -> dict[str, Use]:
    """Return the use of every trainable parameter, by name; arguments and errors are those of `roles_of`."""
    if not isinstance(model, nn.Module):
        raise BadValue(f"roles_of needs a torch.nn.Module, got {type(model).__name__}; pass the model")
    roles = dict(roles or {})
    for role in roles.values():
        if role not in ROLES:
            raise BadValue(f"a role must be one of {', '.join(ROLES)}; got {role!r}{closest(role, ROLES)}")
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    refuse_unmatched("roles", roles, trainable, "trainable parameter")
    owners = {param: module for module in model.modules() for param in module.parameters(recurse=False)}
    tables = {module.weight for module in model.modules() if isinstance(module, _TABLE)}
    verdicts = heads.find(model, tables)
    uses = {}
    for name, param in trainable.items():
        use = _use(name.rpartition(".")[2], param, owners[param], tables, verdicts)
        if role := match(roles, name):
            use = replace(use, role=role, doubt="") if role == "matrix" else Use(role)
        uses[name] = use
    _refuse_unseen(uses, trainable)
    return uses


def match(patterns: Mapping[str, Any], name: str) -> Any:
    """Return the value of the first pattern that fits the name, or None."""
    return next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), None)


def refuse_unmatched(option: str, patterns: Mapping[str, object], names: Iterable[str], kind: str) -> None:
    """Raise ValueError for a pattern that fits no name."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise BadValue(f"{option}: {pattern!r} fits no {kind} of the model{closest(pattern, names)}")


def _use(leaf: str, param: nn.Parameter, owner: nn.Module, tables: set, verdicts: dict[nn.Module, str]) -> Use:
    if param.ndim < 2 or isinstance(owner, _NORM):
        return Use("vector")
    if param in tables:
        return Use("embedding")
    if owner in verdicts:
        verdict = verdicts[owner]
        return Use(verdict) if verdict in ROLES else Use(None, doubt=verdict)
    if isinstance(owner, nn.Linear | _CONVOLUTION):
        return Use("matrix")
    if isinstance(owner, nn.MultiheadAttention):
        if leaf in ("bias_k", "bias_v"):  # (1, 1, width)
            return Use("vector")
        return Use("matrix", blocks=3 if leaf == "in_proj_weight" else 1)
    if isinstance(owner, _RECURRENT):
        projection = leaf.startswith("weight_hr")  # of an LSTM with proj_size: not fused
        return Use("matrix", blocks=1 if projection else GATES.get(getattr(owner, "mode", type(owner).__name__), 1))
    if heads.is_transposed_linear(owner):
        return Use("matrix", transposed=True)
    if _is_experts(param, owner):
        return Use("matrix", as_matrices="batch") if param.ndim == 3 else Use("vector")  # biases (experts, outputs)
    return Use(None, doubt=f"of {type(owner).__name__}")


def _is_experts(param: nn.Parameter, owner: nn.Module) -> bool:
    """Return whether a tensor holds stacked experts, whose modules Hugging Face marks by these attributes."""
    marked = hasattr(owner, "num_experts") and hasattr(owner, "is_transposed")
    return marked and param.shape[0] == owner.num_experts


def _refuse_unseen(uses: dict[str, Use], params: dict[str, nn.Parameter]) -> None:
    """Raise ValueError for all tensors without a role, with the `roles` to paste."""
    unseen = [name for name, use in uses.items() if use.role is None]
    if unseen:
        described, patterns = outline(unseen, uses, lambda name: f"{tuple(params[name].shape)} {uses[name].doubt}")
        answers = ", ".join(f'"{pattern}": "matrix"' for pattern in patterns)
        raise BadValue(
            f"every tensor needs a clear role, got {len(unseen)} without: {described}; "
            f"pass roles={{{answers}}}, each one of {', '.join(ROLES)}"
        )


def outline(chosen: list[str], names: Iterable[str], describe: Callable[[str], str]) -> tuple[str, list[str]]:
    """Return a description of the chosen names in one line, and patterns that fit them alone.

    The same tensor of several layers has one pattern, "layers.*.gate".
    """
    patterns: dict[str, list[str]] = {}
    for name in chosen:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        alone = all(each in chosen for each in names if fnmatchcase(each, pattern))
        patterns.setdefault(pattern if alone else name, []).append(name)
    firsts = []
    for first, *others in patterns.values():
        more = f" and {len(others)} alike" if others else ""
        firsts.append(f"{first} {describe(first)}{more}")
    return "; ".join(firsts), list(patterns)
