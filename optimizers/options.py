"""Options of rules: declared once, in the constructor's signature and docstring; read and checked from there.

    class Signum(RuleOptimizer):
        rule = "signum"
        '''... (`--help` lists these lines, see common/optimizer_help.py)
        Args:
            momentum: decay of the average.
        '''
        def __init__(self, params: ParamsT, lr: NonNegative = 1e-3, momentum: Fraction = 0.9, ...): ...

An annotation declares the values of an option: NonNegative, Fraction, Literal[...], bool, int, torch.dtype, unions and
tuples of these. Any other annotation is left to the rule's own `check`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from .checks import BadValue, closest


@dataclass(frozen=True)
class Range:
    """Finite numbers from `least` on, below `below`."""

    least: float
    below: float = float("inf")

    def __repr__(self) -> str:
        return (
            f"in [{self.least:g}, {self.below:g})"
            if isfinite(self.below)
            else f"a finite number, {self.least:g} or more"
        )


NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]  # the decay of an average

_ENGINE = {"self", "params", "process_group", "__class__"}  # arguments of a constructor that are no options


def declared_by(constructor: type) -> dict[str, Any]:
    """Return the fields of an `UpdateRule` that its constructor declares: defaults and kinds of its options."""
    parameters = inspect.signature(constructor.__init__).parameters
    hints = get_type_hints(constructor.__init__, include_extras=True)
    names = [name for name in parameters if name not in _ENGINE]
    return {
        "defaults": {name: parameters[name].default for name in names},
        "kinds": {name: hints[name] for name in names},
    }


def given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor, given its `locals()`."""
    return {name: value for name, value in arguments.items() if name not in ("self", "__class__")}


def checked(name: str, value: Any, kind: Any) -> Any:
    """Return an option's value, lists as tuples, names of dtypes as dtypes; raise ValueError for other kinds."""
    try:
        return _converted(value, kind)
    except TypeError:
        hint = closest(value, _words(kind)) if isinstance(value, str) else ""
        raise BadValue(f"{name} must be {describe(kind)}; got {value!r}{hint}") from None


def _words(kind: Any) -> list[str]:
    """Return the strings that a kind names."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [word for part in get_args(kind) for word in _words(part)] if get_origin(kind) in (Union, UnionType) else []


def _converted(value: Any, kind: Any) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _number(value, kind.__metadata__[0])
    if origin in (Union, UnionType):
        for part in parts:
            try:
                return _converted(value, part)
            except TypeError:
                pass
        raise TypeError
    if origin is Literal:
        return _require(value, isinstance(value, str) and value in parts)
    if origin is tuple:
        _require(value, isinstance(value, list | tuple))
        parts = parts[:1] * len(value) if Ellipsis in parts else parts
        _require(value, len(value) == len(parts))
        return tuple(_converted(each, part) for each, part in zip(value, parts, strict=True))
    if kind is torch.dtype:
        return _dtype(value)
    if kind is bool or kind is str or kind is type(None):
        return _require(value, type(value) is kind)
    if kind is int:
        return _require(value, isinstance(value, int) and not isinstance(value, bool))
    return _number(value, Range(-float("inf"))) if kind is float else value


def _number(value: Any, allowed: Range) -> Any:
    number = isinstance(value, Real) and not isinstance(value, bool)
    number = number or (isinstance(value, Tensor) and value.numel() == 1)  # a learning rate may be a tensor
    return _require(value, number and isfinite(value) and allowed.least <= float(value) < allowed.below)


def _dtype(value: Any) -> torch.dtype:
    value = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    real = isinstance(value, torch.dtype) and value.is_floating_point
    return _require(value, real and value.itemsize > 1)  # no rule computes in 8 bits


def _require(value: Any, holds: bool) -> Any:
    if not holds:
        raise TypeError
    return value


def describe(kind: Any) -> str:
    """Return a description of the values of a kind."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return str(kind.__metadata__[0])
    if origin in (Union, UnionType):
        return " or ".join(describe(part) for part in parts)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple and Ellipsis in parts:
        return f"a list, of each entry {describe(parts[0])}"
    if origin is tuple:
        return f"{len(parts)} numbers {describe(parts[0])}"
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"}
    words |= {type(None): "None", torch.dtype: "float64, float32, bfloat16 or float16"}
    return words.get(kind, "as documented")


def kind_of_default(default: Any) -> Any:
    """Return the kind of an option that declares none: the type of its default, if that is a number or a switch."""
    return type(default) if type(default) in (bool, int, float) else Any


def outline(options: Mapping[str, Any], show: Callable[[Any], str] = repr) -> str:
    """Return options in one line."""
    return ", ".join(f"{name}={show(value)}" for name, value in options.items())
