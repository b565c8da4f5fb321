"""Which tensors of a model are matrices and which are decayed: decided once, by role, for all optimizers alike.

    role        tensors                                          rule       decayed
    matrix      hidden weights of 2 dimensions                   yours      yes
    embedding   tables of tokens and positions                   AdamW      yes
    head        the output layer, tied to the embedding or not   AdamW      yes
    vector      gains, biases, everything of 1 dimension         AdamW      no

Roles come from what a tensor does in the model, never from its name: a name that happens to hold "ln" or "embed"
decides nothing.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from .checks import closest
from .engine import RuleOptimizer
from .rule import rule_named

ROLES = ("matrix", "embedding", "head", "vector")
DECAYED = ("matrix", "embedding", "head")

# What each optimizer is configured with in the OLion paper (arXiv 2602.01105), where that is not its own default.
# The paper's Lion mixes with the new average, betas (0.95, 0.98): 0.95 x 0.98 = 0.931 before the old one.
PAPER = {
    "muon": {"adjust_lr_fn": "match_rms_adamw"},
    "lion": {"betas": (0.931, 0.98), "scale": 0.2},
    "adamw": {"betas": (0.9, 0.95)},
}


def roles_of(model: nn.Module, roles: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the role of every trainable parameter, by name.

    Args:
        model: any module. An output head is a Linear that shares an embedding's weight, or the model's last Linear
            where that has an embedding's shape, (vocabulary, width).
        roles: {name pattern: role}, as "*.gate": "matrix"; it goes before what is found here.

    Raises ValueError for a pattern or role that fits nothing, and for a tensor of two or more dimensions outside
    Linear, Embedding and the convolutions, whose role cannot be known.

    Example:
        >>> roles_of(model, {"pos_embed": "embedding"})
    """
    roles = dict(roles or {})
    for role in roles.values():
        if role not in ROLES:
            raise ValueError(f"a role must be one of {', '.join(ROLES)}; got {role!r}{closest(role, ROLES)}")
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    unused = [pattern for pattern in roles if not any(fnmatchcase(name, pattern) for name in trainable)]
    if unused:
        raise ValueError(f"roles: {unused[0]!r} fits no trainable parameter{closest(unused[0], trainable)}")
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    heads = [linear for linear in last if any(linear.weight.shape == table.shape for table in tables)]
    owners = {param: module for module in model.modules() for param in module.parameters(recurse=False)}
    found = {}
    for name, param in trainable.items():
        declared = [role for pattern, role in roles.items() if fnmatchcase(name, pattern)]
        found[name] = declared[0] if declared else _role(name, param, owners[param], tables, heads)
    return found


def _role(name: str, param: nn.Parameter, owner: nn.Module, tables: list[nn.Parameter], heads: list[nn.Module]) -> str:
    if param.ndim < 2:
        return "vector"
    if any(param is table for table in tables):
        return "embedding"
    if isinstance(owner, nn.Linear):
        return "head" if owner in heads else "matrix"
    if isinstance(owner, nn.modules.conv._ConvNd):
        return "matrix"
    raise ValueError(
        f"{name}: a {tuple(param.shape)} tensor of {type(owner).__name__} has no known role; "
        f"say it with roles={{{name!r}: one of {', '.join(ROLES)}}}"
    )


def build_optimizer(
    model: nn.Module,
    name: str = "olion",
    *,
    lr: float,
    adamw_lr: float | None = None,
    weight_decay: float = 0.1,
    adamw_betas: tuple[float, float] = (0.9, 0.95),
    adamw_eps: float = 1e-8,
    qkv_split: Mapping[str, int] | None = None,
    roles: Mapping[str, str] | None = None,
    process_group: dist.ProcessGroup | None = None,
    **options,
) -> RuleOptimizer:
    """Build one optimizer for a whole model: rule `name` on its matrices, AdamW on the rest.

    Args:
        model: its trainable parameters are divided by role (see the table above). In DistributedDataParallel it
            brings its process group along; a model of DTensors (FSDP2, tensor parallelism) says itself how it lies.
        name: olion, muon, adamuon, lion, adamw, or a rule of your own.
        lr: the matrices' learning rate.
        adamw_lr: the rest's; None is `lr`, as in the paper.
        weight_decay: of every tensor that is decayed.
        adamw_betas, adamw_eps: of the rest.
        qkv_split: {name pattern: k}: a fused weight that is orthogonalized as k row blocks, {"*.c_attn.weight": 3};
            without effect on elementwise rules.
        roles: {name pattern: role} where the model's own say is to be overruled; see `roles_of`.
        process_group: the ranks that hold the same plain tensors and gradients, and share the work.
        options: the rule's own, over the paper's configuration (`PAPER`), over its defaults.

    Raises ValueError for unknown names, options and roles, and for a model without trainable parameters.

    Example:
        >>> optimizer = build_optimizer(model, "olion", lr=6e-4)
    """
    rule = rule_named(name)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if isinstance(model, DistributedDataParallel):
        process_group = process_group or model.process_group
        model = getattr(model.module, "_orig_mod", model.module)
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "FSDP must be FSDP2, whose parameters are DTensors, got FullyShardedDataParallel; use fully_shard"
        )
    found = roles_of(model, roles)
    params = dict(model.named_parameters())
    matrices = [each for each, role in found.items() if role == "matrix"]
    split = _blocks_of(matrices, qkv_split or {})
    if not rule.direct:  # nothing to split
        split = dict.fromkeys(matrices, 1)
    options = {"weight_decay": weight_decay, **PAPER.get(name, {}), **options}
    rest = {
        "rule": "adamw",
        "lr": lr if adamw_lr is None else adamw_lr,
        "betas": adamw_betas,
        "eps": adamw_eps,
    }

    groups = []
    for blocks in sorted(set(split.values())):
        members = [(each, params[each]) for each in matrices if split[each] == blocks]
        groups.append({"params": members} | ({"qkv_split": blocks} if rule.direct else {}))
    for decayed in (True, False):
        members = [
            (each, params[each]) for each, role in found.items() if role != "matrix" and (role in DECAYED) == decayed
        ]
        if members:
            groups.append({"params": members, "weight_decay": weight_decay if decayed else 0.0, **rest})
    if not groups:
        raise ValueError("the model must have trainable parameters; none requires a gradient")
    return RuleOptimizer(groups, name, lr=lr, process_group=process_group, **options)


def _blocks_of(matrices: list[str], qkv_split: Mapping[str, int]) -> dict[str, int]:
    for pattern in qkv_split:
        if not any(fnmatchcase(name, pattern) for name in matrices):
            raise ValueError(f"qkv_split: {pattern!r} fits no matrix of the model{closest(pattern, matrices)}")
    blocks = dict.fromkeys(matrices, 1)
    for name in matrices:
        for pattern, count in qkv_split.items():
            if fnmatchcase(name, pattern):
                blocks[name] = count
    return blocks
