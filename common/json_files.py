"""Reader of this repository's JSON files: returns an object of the expected shape, or raises a one-line error.

    END = {"step": int, "val_loss": (float, None), "diverged": bool}
    end = read_object(folder / "finished.json", END, "remove it, and run again")

A shape is a type; None for null; a tuple of alternatives; [shape] for an array; {key: shape} for an object, in which
further keys are allowed and a "key?" is optional. An int passes as a float; a bool passes as neither.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import UserError, one_line

Shape = Any
ANY_OBJECT: Mapping[str, Shape] = {}

_WORDS = {
    dict: "an object",
    list: "an array",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def read_object(
    path: str | Path, shape: Mapping[str, Shape] = ANY_OBJECT, remedy: str = "restore it"
) -> dict[str, Any]:
    """Return the JSON object in a file; raises UserError, naming file, key and remedy, for anything else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} must be readable, in UTF-8 ({one_line(error)}): {remedy}") from None
    return parse_object(text, str(path), shape, remedy)


def parse_object(text: str, source: str, shape: Mapping[str, Shape], remedy: str) -> dict[str, Any]:
    """Return the JSON object in a text; `source` is its name in errors."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} must be JSON ({one_line(error)}): {remedy}") from None
    check(value, source, shape, remedy)
    return value


def check(value: Any, source: str, shape: Mapping[str, Shape], remedy: str) -> None:
    """Raise UserError if a value does not have this shape; `source` is its name in the error."""
    if difference := _difference(value, shape, ""):
        raise UserError(f"{source} must hold {difference}: {remedy}")


def is_json(text: str) -> bool:
    """Return whether a text is JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _difference(value: Any, shape: Shape, entry: str) -> str | None:
    """Return a value's first difference from its shape, as "key as a number, got text"; None without one."""
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return _mismatch(value, shape, entry)
        for key, inner in shape.items():
            name = key.removesuffix("?")
            inside = f"{entry}.{name}" if entry else name
            if name not in value:
                if name == key:
                    return f"{inside} as {_words(inner)}, got none"
            elif difference := _difference(value[name], inner, inside):
                return difference
        return None
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _mismatch(value, shape, entry)
        found = (_difference(each, shape[0], f"{entry}[{i}]") for i, each in enumerate(value))
        return next((difference for difference in found if difference), None)
    if isinstance(shape, tuple):
        return None if any(not _difference(value, each, entry) for each in shape) else _mismatch(value, shape, entry)
    return None if _is(value, shape) else _mismatch(value, shape, entry)


def _is(value: Any, kind: type | None) -> bool:
    if kind is None:
        return value is None
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _mismatch(value: Any, shape: Shape, entry: str) -> str:
    text = json.dumps(value)
    shown = text if len(text) <= 40 else f"{text[:37]}..."
    return f"{entry} as {_words(shape)}, got {shown}" if entry else f"{_words(shape)}, got {shown}"


def _words(shape: Shape) -> str:
    if isinstance(shape, tuple):
        return " or ".join(map(_words, shape))
    if isinstance(shape, Mapping):
        return "an object"
    if isinstance(shape, list):
        return "an array"
    return "null" if shape is None else _WORDS[shape]
