"""The words of an error about a name that is not known."""

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known name nearest to `name`, or "" where none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def name_of(group: dict, position: int) -> str:
    """Return what an error calls a parameter of a param group."""
    return group["param_names"][position] if "param_names" in group else f"parameter {position} of its group"
