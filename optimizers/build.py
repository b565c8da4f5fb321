"""One optimizer for a whole model: a rule on its matrices, AdamW on the rest, or another rule on its tables."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from .checks import BadValue
from .engine import RuleOptimizer, refuse_unknown
from .guests import GUESTS, Guest, package
from .roles import DECAYED, Use, match, outline, refuse_unmatched, uses_of
from .rule import rule_named
from .to_owners import send_to_owners

# Each optimizer's configuration in the OLion paper (arXiv 2602.01105), where it differs from the default.
# The paper's Lion mixes with the new average, betas (0.95, 0.98): 0.95 x 0.98 = 0.931 before the old one.
PAPER = {
    "muon": {"adjust_lr_fn": "match_rms_adamw"},
    "lion": {"betas": (0.931, 0.98), "scale": 0.2},
    "adamw": {"betas": (0.9, 0.95)},
}

Split = int | Sequence[int]
Groups = list[dict]
Gradients = Literal["all_reduced", "to_owners"]


def build_optimizer(
    model: nn.Module,
    name: str = "olion",
    *,
    lr: float,
    adamw_lr: float | None = None,
    weight_decay: float = 0.1,
    adamw_betas: tuple[float, float] = (0.9, 0.95),
    adamw_eps: float = 1e-8,
    rest: str = "adamw",
    rest_lr: float | None = None,
    qkv_split: Mapping[str, Split] | None = None,
    as_matrices: str | Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    process_group: dist.ProcessGroup | None = None,
    gradients: Gradients = "all_reduced",
    **options,
) -> RuleOptimizer | Guest:
    """Build one optimizer for a whole model: rule `name` on its matrices, AdamW on the rest.

    Args:
        model: its trainable parameters are divided by role; see `roles_of`. DistributedDataParallel carries its process
            group, DTensors (FSDP2, tensor parallelism) their layout.
        name: olion, muon, adamuon, lion, adamw, or a registered rule; or soap, shampoo or adafactor of the package
            pytorch_optimizer (see `guests.py`).
        lr: learning rate of the matrices.
        adamw_lr: learning rate of the rest; None is `lr`, as in the paper.
        weight_decay: of every decayed tensor.
        adamw_betas, adamw_eps: of the rest.
        rest: rule of embeddings and heads of two dimensions, with its default options: adamw, polarsgdm or any other.
            Other tensors of the rest stay with AdamW.
        rest_lr: learning rate of `rest`; None is AdamW's. PolarSGDM's is of another size.
        qkv_split: {name pattern: blocks} of fused weights, whose blocks are orthogonalized one by one: a number of
            equal ones, {"*.c_attn.weight": 3}, or sizes in proportion, as the heads of grouped queries,
            {"*.qkv_proj.weight": (32, 8, 8)}. Blocks are rows; of Hugging Face's Conv1D, columns.
            nn.MultiheadAttention, LSTM and GRU are split by default. Without effect on elementwise rules.
        as_matrices: {name pattern: "batch" or "flatten"}, or one of these for every tensor of more than
            two dimensions; see `blocks_of`. Without effect on elementwise rules.
        roles: {name pattern: role}, overruling the model's own; see `roles_of`.
        process_group: the ranks that hold the same plain tensors and gradients, and share the work.
        gradients: under DistributedDataParallel, the ranks that get the gradient of a matrix: all_reduced, all of them,
            or to_owners, its owner alone, which halves the bytes and keeps momentum there; see `to_owners.py`.
        options: of the rule, over the paper's configuration (`PAPER`), over its defaults.

    Raises ValueError for unknown names, options and roles, and for a model without trainable parameters.

    Example:
        >>> optimizer = build_optimizer(model, "olion", lr=6e-4)
    """
    rule = None if name in GUESTS else rule_named(name)
    options = {"weight_decay": weight_decay, **PAPER.get(name, {}), **options}
    if rule:
        refuse_unknown(options, rule.defaults, name)
    if gradients not in ("all_reduced", "to_owners"):
        raise BadValue(f"gradients must be 'all_reduced' or 'to_owners'; got {gradients!r}")
    if gradients == "to_owners" and not rule:
        raise BadValue(f"gradients='to_owners' needs a rule of this package, got {name}; leave 'all_reduced'")
    outer = getattr(model, "_orig_mod", model)
    model, process_group = _unwrapped(model, process_group)
    uses, params = uses_of(model, roles), dict(model.named_parameters())
    if not uses:
        raise BadValue("the model must have trainable parameters; none requires a gradient")
    if rest == "adamw" and rest_lr is not None:
        raise BadValue(f"rest_lr needs a rest other than adamw, got {rest_lr}; set adamw_lr")
    views = _views(uses, params, qkv_split or {}, as_matrices, split=bool(rule and rule.direct))
    if rule:
        _refuse_undeclared(views, rule.name, rule.defaults)
    adamw = {"rule": "adamw", "lr": lr if adamw_lr is None else adamw_lr, "betas": adamw_betas, "eps": adamw_eps}
    tables = {"rule": rule_named(rest).name, "lr": adamw["lr"] if rest_lr is None else rest_lr}
    others = _groups_of_rest(uses, params, adamw, adamw if rest == "adamw" else tables, weight_decay)
    if not rule:
        matrices = [(each, params[each]) for each in views]
        of_others = RuleOptimizer(others, "adamw", process_group=process_group) if others else None
        return Guest(name, matrices, of_others, {"lr": lr, **options})
    groups = _groups_of_views(views, params) + others
    classes = {getattr(each, "rule", None): each for each in RuleOptimizer.__subclasses__()}
    constructor = classes.get(name, partial(RuleOptimizer, rule=name))
    optimizer = constructor(groups, lr=lr, process_group=process_group, **options)
    if gradients == "to_owners":
        send_to_owners(optimizer, outer)
    return optimizer


def check_name(name: str) -> None:
    """Raise ValueError for a name that `build_optimizer` does not know, or whose package is missing."""
    if name in GUESTS:
        package(name)
    else:
        rule_named(name)


def _refuse_undeclared(views: dict[str, tuple], rule: str, declared: Mapping) -> None:
    """Raise ValueError if a matrix needs an option (`qkv_split`, ...) that its rule does not declare."""
    for name, view in views.items():
        for option, value in view:
            if option not in declared:
                raise BadValue(
                    f"{name} needs {option}={value!r}, an option that {rule} does not declare; add it to the rule's "
                    "defaults, as OLion does"
                )


def _groups_of_views(views: dict[str, tuple], params: dict[str, nn.Parameter]) -> Groups:
    """Return the param groups of matrices: one for each combination of `qkv_split`, `qkv_dim` and `as_matrices`."""
    return [
        {"params": [(name, params[name]) for name in views if views[name] == view], **dict(view)}
        for view in sorted(set(views.values()), key=str)
    ]


def _groups_of_rest(
    uses: dict[str, Use], params: dict[str, nn.Parameter], adamw: dict, tables: dict, weight_decay: float
) -> Groups:
    """Return the param groups of all other tensors: two-dimensional tables, other decayed ones, those without decay."""
    members: dict[tuple[bool, bool], list] = {(True, True): [], (False, True): [], (False, False): []}
    for name, use in uses.items():
        if use.role != "matrix":
            decayed = use.role in DECAYED
            is_table = decayed and tables is not adamw and params[name].ndim == 2
            members[is_table, decayed].append((name, params[name]))
    return [
        {"params": named, "weight_decay": weight_decay if decayed else 0.0, **(tables if is_table else adamw)}
        for (is_table, decayed), named in members.items()
        if named
    ]


def _unwrapped(model: nn.Module, process_group: dist.ProcessGroup | None) -> tuple[nn.Module, dist.ProcessGroup | None]:
    """Return the module inside torch.compile's and DistributedDataParallel's wrappers, and the process group."""
    if not isinstance(model, nn.Module):
        raise BadValue(
            f"build_optimizer needs the model, an nn.Module, got {type(model).__name__}; for parameters, use "
            "OLion(params) or another class"
        )
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, DistributedDataParallel):
        process_group = process_group or model.process_group
        model = getattr(model.module, "_orig_mod", model.module)
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise BadValue(
            "FSDP must be FSDP2, whose parameters are DTensors, got FullyShardedDataParallel; use fully_shard"
        )
    return model, process_group


def _views(
    uses: dict[str, Use],
    params: dict[str, nn.Parameter],
    qkv_split: Mapping[str, Split],
    as_matrices: str | Mapping[str, str] | None,
    split: bool,
) -> dict[str, tuple]:
    """Return the group options of every matrix, by name: its blocks and `as_matrices`, if `split`."""
    names = [name for name, use in uses.items() if use.role == "matrix"]
    refuse_unmatched("qkv_split", qkv_split, names, "matrix")
    if isinstance(as_matrices, Mapping):
        refuse_unmatched("as_matrices", as_matrices, names, "matrix")
    if not split:
        return dict.fromkeys(names, ())
    views, unseen = {}, []
    for name in names:
        seen = uses[name].as_matrices
        if isinstance(as_matrices, Mapping):
            seen = match(as_matrices, name) or seen
        elif params[name].ndim > 2:
            seen = as_matrices or seen
        if params[name].ndim > 2 and seen is None:
            unseen.append(name)
        declared = match(qkv_split, name)
        blocks = uses[name].blocks if declared is None else declared
        blocks = tuple(blocks) if isinstance(blocks, list) else blocks
        options = {"as_matrices": seen} if seen else {}
        if blocks != 1:
            options |= {"qkv_split": blocks} | ({"qkv_dim": 1} if uses[name].transposed else {})
        views[name] = tuple(options.items())
    if unseen:
        described, patterns = outline(unseen, uses, lambda name: str(tuple(params[name].shape)))
        answers = ", ".join(f'"{pattern}": "flatten"' for pattern in patterns)
        raise BadValue(
            f"tensors of more than two dimensions need as_matrices, got none for {described}; pass "
            f'as_matrices={{{answers}}}, each "flatten" (d0 x the rest, as for convolutions) or "batch"'
        )
    return views
