"""Llamas pretrained and fine-tuned through torchtitan, with the optimizers of this repository."""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType

from common.guard import plain_interrupt

plain_interrupt()  # the imports below take seconds


class TorchtitanFinder:
    """Import hook: the first import of torchtitan adapts it to machines without a GPU."""

    @classmethod
    def find_spec(cls, name: str, *_: object) -> ModuleSpec | None:
        if name != "torchtitan":
            return None
        sys.meta_path.remove(cls)
        if (spec := importlib.util.find_spec(name)) and spec.loader:
            spec.loader.exec_module = partial(cls.execute, spec.loader.exec_module)
        return spec

    @staticmethod
    def execute(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        """Execute torchtitan's module, adapted."""
        from Llama.cpu import importing_torchtitan  # here: torch takes seconds to import

        with importing_torchtitan():
            execute(module)


if "torchtitan" not in sys.modules:
    sys.meta_path.insert(0, TorchtitanFinder)
