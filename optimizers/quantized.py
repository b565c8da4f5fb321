"""State at one byte per entry: int8 codes, and one float32 scale per row of each matrix.

    scale = max |row| / 127         code = round(value / scale), -127 to 127

Blockwise absmax linear quantization, as Gupta et al., "8-bit Muon", arXiv 2509.23106, with rows in place of blocks of
2,048 entries: a cut between rows, FSDP's, divides no row, so that any number of ranks holds the same codes and scales.
Where rows themselves are cut (Shard(1) of tensor parallelism), the ranks of the cut agree on the maximum of each row,
one all-reduce of 4 bytes per row. So codes and scales do not depend on the layout, and a checkpoint loads in any.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .layout import local_of
from .matrices import row_dims
from .rule import UpdateRule

INT8 = ("int8", "int8_stochastic")
StateDtype = torch.dtype | Literal["int8", "int8_stochastic"] | None
SCALE = "_scale"  # after the name of the codes

_MOST = 127
_LEAST = torch.finfo(torch.float32).tiny  # no scale of a row that is not zero


def in_int8(group: dict) -> bool:
    """Return whether a param group's averages of gradients are kept in int8."""
    return group.get("state_dtype") in INT8


def is_quantized(name: str, param: Tensor, group: dict, rule: UpdateRule) -> bool:
    """Return whether a buffer of `rule.state` is kept in int8: of two dimensions or more, and no average of squares."""
    return in_int8(group) and param.ndim > 1 and name not in rule.squares


def decoded(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of codes (rows, columns) with scales (rows, 1)."""
    return codes.to(dtype).mul_(scales.to(dtype))


def peaks_of(values: Tensor, dims: int) -> Tensor:
    """Return the largest magnitude of each row, float32; `dims` leading dimensions count rows."""
    if not values.numel():
        return values.new_zeros(*values.shape[:dims], *[1] * (values.ndim - dims), dtype=torch.float32)
    return values.abs().amax(tuple(range(dims, values.ndim)), keepdim=True).float()


def encode(codes: Tensor, scales: Tensor, values: Tensor, peaks: Tensor, uniform: Tensor | None = None) -> None:
    """Write the codes and scales of values whose rows have these peaks; a row with NaN or inf becomes NaN.

    uniform: numbers in [0, 1) that round stochastically; without them, to the nearest.
    """
    scales.copy_((peaks / _MOST).clamp_(min=_LEAST))
    steps = values / scales
    steps = steps.round_() if uniform is None else steps.add_(uniform).floor_()
    codes.copy_(steps.nan_to_num_(nan=0.0).clamp_(-_MOST, _MOST))


def groups_of_rows(param: Tensor, group: dict) -> list[Any]:
    """Return the process groups whose ranks hold parts of the same rows of a parameter."""
    if not isinstance(param, DTensor):
        return []
    dims, mesh = row_dims(param.shape, group), param.device_mesh
    cut = [axis for axis, each in enumerate(param.placements) if getattr(each, "dim", -1) >= dims]
    return [mesh.get_group(axis) for axis in cut if mesh.size(axis) > 1]


def bytes_of_scales(param: Tensor, group: dict, count: int) -> list[tuple[int, int]]:
    """Return the (bytes, ranks) of each all-reduce of row maxima in a step of a parameter with `count` int8 buffers."""
    groups = groups_of_rows(param, group) if count else []
    if not groups:
        return []
    rows = local_of(param).shape[: row_dims(param.shape, group)].numel()
    return [(4 * rows, dist.get_world_size(each)) for each in groups for _ in range(count)]


def floating(buffers: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return buffers of one parameter with those in int8 decoded, and without their scales."""
    scales = {name: buffers[name + SCALE] for name in buffers if name + SCALE in buffers}
    others = {name: buffer for name, buffer in buffers.items() if name.removesuffix(SCALE) not in scales}
    return others | {name: decoded(buffers[name], scale, dtype) for name, scale in scales.items()}
