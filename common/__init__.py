"""Shared by the experiments: config, launch, run log, checkpoint, schedule. Here: errors, warnings, progress bars."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


class UserError(Exception):
    """An error with a one-line message for the user: required, got, remedy."""

    for_the_user = True  # so is `optimizers.checks.BadValue`, which cannot import this class


class BadValue(UserError, ValueError):
    """A user's value that cannot be used."""


class Diverged(UserError):
    """Training that ended with a non-finite loss, or after too many non-finite steps in a row."""

    exit_status = 3  # run.sh tells a diverged run from a failed one by it


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, or its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def warn(message: str) -> None:
    """Print a one-line warning to stderr, above the progress bar if there is one."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def progress(iterable: Iterable | None = None, *, is_main: bool = True, **options: Any) -> tqdm:
    """Make a tqdm bar on the main process only, redrawn every second, or every 30 s where stderr is a log.

    Without an iterable use it in a `with` block, which ends its line before an error is printed.

    Example: `for batch in progress(batches, is_main=process.is_main, desc="encoding"): ...`
    """
    pace = 1.0 if sys.stderr.isatty() else 30.0
    # With its default maxinterval, tqdm redraws after 10 s regardless of mininterval.
    return tqdm(iterable, disable=not is_main, mininterval=pace, maxinterval=max(pace, 10.0), **options)
