"""The nouns that the experiments share: config, launch, run log, checkpoint, schedule; and what they say meanwhile."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


class UserError(Exception):
    """An error whose message is one line for the user: what was required, what came, what to do."""


class Diverged(UserError):
    """Training whose losses or gradients are not finite, or stay so."""

    exit_status = 3  # tells a script, run.sh, a diverged run from one that could not be run


def one_line(error: BaseException) -> str:
    """Return an error's message without its line breaks, or its type where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def warn(message: str) -> None:
    """Print one line about something that the run goes on without, above a progress bar if there is one."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def progress(iterable: Iterable | None = None, *, is_main: bool = True, **options: Any) -> tqdm:
    """Make a tqdm bar of the main process alone, drawn once a second, or in a log, which keeps each, once in 30 s.

    Use one without an iterable in a `with`: it ends its line before an error is printed.

    Example: `for batch in progress(batches, is_main=ranks.is_main, desc="encoding"): ...`
    """
    pace = 1.0 if sys.stderr.isatty() else 30.0
    # tqdm would draw after 10 s whatever mininterval says, had it seen many items in that time.
    return tqdm(iterable, disable=not is_main, mininterval=pace, maxinterval=max(pace, 10.0), **options)
