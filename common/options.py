"""Command lines of programs without a TOML file: a frozen dataclass of options, read by tyro.

    options = parse_options(Options, "python -m SIT.sample", __doc__)

Errors are one line; `--help` needs only the dataclass.
"""

import contextlib
import dataclasses
import difflib
import io
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

from common import UserError

Options = TypeVar("Options")


def parse_options(
    kind: type[Options] | Any, program: str, description: str | None = None, argv: Sequence[str] | None = None
) -> Options:
    """Read a command line (`argv`, by default the program's own) into a dataclass, or one of a union of them.

    Raises UserError for an unknown option or a value of the wrong type; exits after --help.
    """
    import tyro  # here, so that a module can be imported without it

    help_text, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(help_text), contextlib.redirect_stderr(errors):
            return tyro.cli(kind, prog=program, description=description, args=argv)
    except SystemExit as end:
        if not end.code:  # --help
            print(fitted(help_text.getvalue()), end="")
            raise
        message = message_in(errors.getvalue()).rstrip(".")
        raise UserError(f"command line: {message}{_nearest(message, kind)}; --help lists all") from None


def fitted(text: str) -> str:
    """Wrap the lines of a help that are wider than the terminal: tyro wraps options, but no description."""
    width, lines = shutil.get_terminal_size().columns, []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        lines += textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False) or [""]
    return "\n".join(lines) + "\n"


def _nearest(message: str, kind: Any) -> str:
    """Return a hint with the nearest option, if the message is about an unknown one."""
    unknown = re.match(r"Unrecognized options: --([\w-]+)", message)
    known = [field.name.replace("_", "-") for each in get_args(kind) or (kind,) for field in dataclasses.fields(each)]
    near = difflib.get_close_matches(unknown[1].replace("_", "-"), known, n=1) if unknown else []
    return f"; the nearest is --{near[0]}" if near else ""


def message_in(box: str) -> str:
    """Return the message in tyro's box: the lines between its first two horizontal rules."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip("│╭╮╰╯ ")
        if text.startswith(("──", "-----", "─ ")):  # a horizontal rule; without Unicode, hyphens below the title
            parts.append([])
        elif text:
            parts[-1].append(text)
    messages = [" ".join(part) for part in parts[1:] if part]
    return messages[0] if messages else "not understood; see --help"
