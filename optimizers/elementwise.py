"""Elementwise ops on lists of tensors, in few launches: torch's foreach kernels, or one kernel per large tensor."""

from typing import Any

import torch
from torch import Tensor

# The limit of one launch of a foreach kernel (multi_tensor_apply: 320 blocks of 65,536 entries); it cuts larger tensors
# into several launches, where a kernel of one tensor takes any size.
_LAUNCH_ENTRIES = 320 * 65536


def each(operation: str, tensors: list[Tensor], *arguments: Any, **options: Any) -> list[Tensor]:
    """Apply a method of Tensor to each of `tensors`; a list among the arguments has one entry for each.

    Example:
        >>> each("lerp_", averages, gradients, 0.1)
    """
    if sum(tensor.numel() for tensor in tensors) <= _LAUNCH_ENTRIES * len(tensors):
        results = getattr(torch, f"_foreach_{operation}")(tensors, *arguments, **options)
        return tensors if results is None else list(results)
    columns = [each if isinstance(each, list) else [each] * len(tensors) for each in arguments]
    rows = zip(*columns, strict=True) if columns else [()] * len(tensors)
    return [getattr(tensor, operation)(*row, **options) for tensor, row in zip(tensors, rows, strict=True)]
