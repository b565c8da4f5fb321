"""Ends of a training that come as suddenly as a signal, at a step that does not depend on the machine's load."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest


class Killed(BaseException):
    """As sudden as a signal: nothing in the training catches it."""


def dying(function: Callable, at: int, end: Callable[[], Any]) -> Callable:
    """Return the function, which calls `end` instead of its work when it is called for the time `at`, from 0."""
    count = itertools.count()

    def wrapped(*arguments):
        if next(count) == at:
            end()
        return function(*arguments)

    return wrapped


@contextmanager
def interrupted(module: ModuleType, name: str, at: int) -> Iterator[None]:
    """Raise `Killed` in the call number `at`, from 0, of a module's function; the block must end by it."""

    def end():
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, name, dying(getattr(module, name), at, end))
        yield
