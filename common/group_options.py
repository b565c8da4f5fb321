"""Param groups as JSON and back: numbers, strings, lists and None as they are; tuples, dtypes and tensors marked."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common import BadValue


def encode(value: Any) -> Any:
    """Return a JSON-serializable value that `decode` inverts; raises TypeError, naming an unsupported type."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encode(each) for each in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: encode(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return {"$tuple": [encode(each) for each in value]}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Tensor) and value.numel() <= 16:  # a learning rate
        return {"$tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    raise TypeError(
        f"an optimizer's options must be numbers, strings, lists, tuples, dtypes or small tensors, to be saved; got "
        f"{type(value).__name__}: remove it from the param group"
    )


def decode(value: Any) -> Any:
    """Invert `encode`; raises ValueError for an unknown dtype."""
    if isinstance(value, list):
        return [decode(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "$tuple" in value:
        return tuple(decode(each) for each in value["$tuple"])
    if "$dtype" in value:
        return _dtype(value["$dtype"])
    if "$tensor" in value:
        return torch.tensor(value["$tensor"], dtype=_dtype(value["dtype"]))
    return {key: decode(each) for key, each in value.items()}


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, name, None) if re.fullmatch(r"\w+", str(name)) else None
    if not isinstance(found, torch.dtype):
        raise BadValue(f"a dtype must be one of torch's, got {name!r}")
    return found
