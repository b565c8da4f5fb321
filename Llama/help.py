"""`python -m Llama.train --help` in a second: the options without the imports of torch and of torchtitan."""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from unittest import mock

from common.config import parse_config

SECTIONS = "torchtitan.config.job_config"  # its dataclasses need nothing of what it imports


def show() -> None:
    """Print the help of the options in sys.argv, and exit; return if they do not ask for it."""
    if not {"-h", "--help"} & set(sys.argv):
        return
    package = find_spec("torchtitan")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'torchtitan'", name="torchtitan")
    file = Path(package.origin).parent / "config" / "job_config.py"
    names = ("torch", "torchtitan", "torchtitan.config", "torchtitan.tools", "torchtitan.tools.logging")
    stand_ins = {name: ModuleType(name) for name in names}
    vars(stand_ins["torchtitan.tools.logging"])["logger"] = None
    spec = spec_from_file_location(SECTIONS, file)
    assert spec and spec.loader  # a file of Python's has both
    sections = module_from_spec(spec)
    vars(stand_ins["torchtitan"])["config"] = stand_ins["torchtitan.config"]
    vars(stand_ins["torchtitan.config"])["job_config"] = sections
    with mock.patch.dict(sys.modules, {**stand_ins, SECTIONS: sections}):
        spec.loader.exec_module(sections)
        from Llama.options import JobConfig

        for name in stand_ins:  # tyro would ask for torch's types
            del sys.modules[name]
        parse_config(JobConfig)
