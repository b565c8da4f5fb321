"""The error of a value that cannot be used, and its words."""

import difflib
from collections.abc import Iterable


class BadValue(ValueError):
    """A value, tensor or layout that cannot be used; the message is one line: required, got, remedy."""

    for_the_user = True  # common.guard prints the message without a traceback


def closest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known name nearest to `name`, or "" if none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def name_of(group: dict, position: int) -> str:
    """Return the name of a parameter of a param group, for error messages."""
    return group["param_names"][position] if "param_names" in group else f"parameter {position} of its group"
