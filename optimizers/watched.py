"""The matrices that a probe measures: those with directions, or of a model's role "matrix", or some of these."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from .checks import BadValue, closest
from .engine import RuleOptimizer
from .layout import Layout, layout_of
from .matrices import Blocks, blocks_in, blocks_of
from .roles import roles_of
from .rule import UpdateRule, rule_of


@dataclass(frozen=True)
class Matrix:
    """One parameter to be measured, and the matrices that it is treated as."""

    name: str
    param: Tensor
    group: dict
    blocks: Blocks
    layout: Layout | None
    owner: int | None = None  # of its gradient and momentum, where no other rank has them

    @property
    def rule(self) -> UpdateRule | None:
        return rule_of(self.group) if "rule" in self.group else None

    @property
    def label(self) -> str:
        """The shape of its matrices; "32x64+8x64" of unequal blocks."""
        return "+".join(f"{m}x{n}" for m, n in self.blocks.shape_counts)


def choose(
    optimizer: torch.optim.Optimizer,
    model: nn.Module | None = None,
    roles: Mapping[str, str] | None = None,
    matrices: Sequence[str] = ("*",),
    per_shape: int = 2,
) -> list[Matrix]:
    """Return the matrices to measure, those of one shape together; arguments and errors are those of `probe`."""
    if per_shape < 0:
        raise BadValue(f"per_shape must be a number of matrices, or 0 for all; got {per_shape}")
    candidates = _candidates(optimizer, model, roles)
    for pattern in matrices:
        if not any(fnmatchcase(each.name, pattern) for each in candidates):
            names = [each.name for each in candidates]
            shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
            raise BadValue(
                f"a probe's pattern must fit a matrix; {pattern!r} fits none of {shown or 'none'}"
                f"{closest(pattern, names)}"
            )
    chosen = [each for each in candidates if any(fnmatchcase(each.name, pattern) for pattern in matrices)]
    alike: dict[str, list[Matrix]] = defaultdict(list)
    for each in chosen:
        alike[each.label].append(each)
    return [each for members in alike.values() for each in _spread(members, per_shape)]


def _candidates(
    optimizer: torch.optim.Optimizer, model: nn.Module | None, roles: Mapping[str, str] | None
) -> list[Matrix]:
    """Return all matrices: those of a rule with directions, or else those of the model's roles."""
    params = [(group, param) for group in optimizer.param_groups for param in group["params"]]
    if isinstance(optimizer, RuleOptimizer):
        planned = zip(params, optimizer.plan.entries, strict=True)
        directed = [
            Matrix(
                entry.name,
                param,
                group,
                blocks_in(group, param.shape),  # those of a whole batch
                entry.layout,
                entry.owner if entry.owner_only else None,
            )
            for (group, param), entry in planned
            if entry.blocks
        ]
        if directed:
            return directed
    if model is None:
        raise BadValue(
            "a probe of an optimizer without directions needs the model, to tell its matrices from its embeddings; "
            "pass model="
        )
    owner = {param: group for group, param in params}
    named = {name: role for name, role in roles_of(model, roles).items() if role == "matrix"}
    return [
        Matrix(name, param, owner[param], _as_matrix(param), layout_of(param, None, None))
        for name, param in model.named_parameters()
        if name in named and param in owner
    ]


def _as_matrix(param: Tensor) -> Blocks:
    """Return a weight as one matrix, with trailing dimensions flattened."""
    return blocks_of(param.shape, as_matrices="flatten")


def _spread(members: list[Matrix], most: int) -> list[Matrix]:
    """Return at most `most` of them, evenly spaced, with the first and the last."""
    if not most or len(members) <= most:
        return members
    return [members[round(i * (len(members) - 1) / max(1, most - 1))] for i in range(most)]
