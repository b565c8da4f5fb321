"""The state of parameters: made in their layout, refitted after they were moved, checked when loaded."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from .checks import BadValue, name_of
from .layout import local_of
from .matrices import row_dims
from .quantized import SCALE, is_quantized
from .rounding import REMAINDER, is_compensated
from .rule import UpdateRule
from .update import state_dtype

Buffers = dict[str, Tensor]
Groups = list[dict[str, Any]]


def new_state(param: Tensor, group: dict, rule: UpdateRule) -> Buffers:
    """Return a parameter's buffers, all zero."""
    state, dtype = {}, state_dtype(param, group)
    for name in rule.state:
        coded = is_quantized(name, param, group, rule)
        state[name] = torch.zeros_like(param, dtype=torch.int8 if coded else dtype)
        if coded:
            state[name + SCALE] = _new_rows(param, group, torch.float32)
    state |= {name: _new_rows(param, group, dtype) for name in rule.rows}
    if is_compensated(param, group):
        state[REMAINDER] = torch.zeros_like(param, dtype=torch.int16)
    scalars = {name: torch.zeros((), dtype=torch.float32, device=param.device) for name in rule.scalars}
    return {name: buffer.detach() for name, buffer in {**state, **scalars}.items()}


def _new_rows(param: Tensor, group: dict, dtype: torch.dtype) -> Tensor:
    """Return one zero per row of a parameter's matrices, cut as its rows are."""
    local, dims = local_of(param), row_dims(param.shape, group)
    shape, mine = ((*each.shape[:dims], *[1] * (each.ndim - dims)) for each in (param, local))
    rows = torch.zeros(mine, dtype=dtype, device=local.device)
    if not isinstance(param, DTensor):
        return rows
    placements = [Replicate() if getattr(each, "dim", -1) >= dims else each for each in param.placements]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        rows, param.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def refitted(buffers: Buffers, param: Tensor, group: dict, rule: UpdateRule) -> Buffers:
    """Return the buffers in the present layout, dtype, device and strides of their parameter.

    From one DTensor layout to another this is a collective of the old one's ranks.
    """
    fresh = new_state(param, group, rule)
    for name, buffer in fresh.items():
        if name in buffers:  # a weight converted to bfloat16 has a new remainder
            _local_copy(buffer, _in_layout(buffers[name], buffer))
    return fresh


def _in_layout(old: Tensor, new: Tensor) -> Tensor:
    """Return a tensor with the old's values in the new's layout."""
    if isinstance(old, DTensor) and not (isinstance(new, DTensor) and _layout(old) == _layout(new)):
        old = old.full_tensor()
    if isinstance(new, DTensor) and not isinstance(old, DTensor):
        # No source rank: every rank has the whole already, and nothing is sent.
        old = distribute_tensor(old.to(new.device), new.device_mesh, new.placements, src_data_rank=None)
    return old


def _local_copy(target: Tensor, source: Tensor) -> None:
    local_of(target).copy_(local_of(source))


def _layout(tensor: Tensor) -> tuple:
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()


def fingerprint(param: Tensor) -> tuple:
    """Return the properties of a parameter that determine its state and route; they compare with ==."""
    return id(param), param.dtype, param.device, param.shape, param.stride(), _layout(param)


def refuse_resized(group: dict, position: int, buffers: Buffers, rule: UpdateRule) -> None:
    """Raise ValueError for a parameter whose state or gradient has another shape.

    A fused kernel would read and write beyond the shorter one.
    """
    param = group["params"][position]
    others = {f"state {name!r}": buffers[name] for name in rule.state if name in buffers}
    if param.grad is not None:
        others["gradient"] = param.grad
    for name, tensor in others.items():
        if tensor.shape != param.shape:
            raise BadValue(
                f"{name_of(group, position)}: the {name} must have the parameter's shape {tuple(param.shape)}, got "
                f"{tuple(tensor.shape)}; build the optimizer, and compute gradients, after resizing parameters"
            )


# --- loading


def saved_buffers(groups: Groups, state_dict: dict) -> dict[Tensor, Buffers]:
    """Return the saved buffers of each parameter of `groups`: by name where both sides have names, else by position.

    Raises ValueError if the param groups differ in rules, numbers or names.
    """
    saved_groups = state_dict["param_groups"]
    required, got = _outline(groups), _outline(saved_groups)
    if required != got:
        raise BadValue(
            f"the state must be of param groups (rule, parameters) {required}; got {got}; "
            "build the optimizer that the state was saved from"
        )
    found = {}
    for group, saved in zip(groups, saved_groups, strict=True):
        for param, key in zip(group["params"], _keys_in_order(group, saved), strict=True):
            found[param] = state_dict["state"].get(key, {})
    return found


def _keys_in_order(group: dict, saved: dict) -> list:
    """Return the keys of a saved group's parameters in the order of this group's parameters."""
    keys, names, saved_names = saved["params"], group.get("param_names"), saved.get("param_names")
    # torch.distributed.checkpoint has matched by name already; its keys are names, in this group's order.
    if names is None or saved_names is None or any(isinstance(key, str) for key in keys):
        return keys
    key_of = dict(zip(saved_names, keys, strict=True))
    if missing := [name for name in names if name not in key_of]:
        others = [name for name in saved_names if name not in set(names)]
        raise BadValue(
            f"the state must be of the parameters' names; got none for {missing[0]!r}, but {others[:1]}; load it into "
            "the model that it was saved from, or rename its param_names"
        )
    return [key_of[name] for name in names]


def refuse_unfit(groups: Groups, state: dict[Tensor, Buffers], saved: dict[Tensor, Buffers]) -> None:
    """Raise ValueError for saved buffers that do not fit the parameters' own, or are not finite."""
    named = [(name_of(group, i), param) for group in groups for i, param in enumerate(group["params"])]
    differences = [
        f"{name} needs {required}, got {got}"
        for name, param in named
        if (required := _shapes(state[param])) != (got := _shapes(saved[param]))
        and (got or param.requires_grad)  # torch saves the state of frozen parameters, and does not return it
    ]
    if differences:
        raise BadValue(
            f"the state must fit the parameters; of {len(differences)} that do not: {'; '.join(differences[:3])}; "
            "load it into the model and layout that it is of, or through torch.distributed.checkpoint.state_dict"
        )
    for name, param in named:
        for key, buffer in saved[param].items():
            if not local_of(buffer).isfinite().all():
                raise BadValue(f"the state must be finite, got NaN or inf in {key!r} of {name}; load an earlier one")


def fill(buffers: Buffers, saved: Buffers) -> None:
    """Copy saved buffers into a parameter's own, which keep their dtype, device and memory."""
    for name, buffer in saved.items():
        buffers[name].copy_(buffer)


def _outline(groups: Groups) -> list[tuple[str | None, int]]:
    return [(group.get("rule"), len(group["params"])) for group in groups]


def _shapes(buffers: Buffers) -> dict[str, tuple]:
    """Return the properties that must agree for a copy: shapes and, of DTensors, placements."""
    return {
        name: (*getattr(buffer, "shape", [type(buffer).__name__]), *getattr(buffer, "placements", ()))
        for name, buffer in buffers.items()
    }
