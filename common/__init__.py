"""The nouns that the experiments share: config, launch, run log, checkpoint, schedule."""

import sys


class UserError(Exception):
    """An error whose message is one line for the user: what was required, what came, what to do."""


class Diverged(UserError):
    """Training whose losses or gradients are not finite, or stay so."""

    exit_status = 3  # tells a script, run.sh, a diverged run from one that could not be run


def one_line(error: BaseException) -> str:
    """Return an error's message without its line breaks, or its type where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def warn(message: str) -> None:
    """Print one line about something that the run goes on without."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
