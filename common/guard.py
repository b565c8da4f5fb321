"""Program exits: one line for user errors and for Ctrl-C, and no abort after a process group.

    if __name__ == "__main__":
        main_guard(main)

No heavy imports here: a program installs the guard first, then imports torch inside `main`.
"""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from common import UserError, one_line

REPOSITORY = Path(__file__).resolve().parents[1]
STOPPED = "stopped; the same command continues"
# torch's messages for an allocation that fails on a CPU, and for a tensor size beyond 64 bits.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "Storage size calculation overflowed", "integer overflow")

_left_a_group = False  # whether this process has been in a process group that launch.stop destroyed


def group_was_left() -> None:
    """Record that this process was in a process group, so that it exits through `leave`."""
    global _left_a_group
    _left_a_group = True


def leave(status: int = 0) -> NoReturn:
    """Flush the output and exit with `status`, without the interpreter's shutdown.

    A DeviceMesh in DTensor's caches keeps gloo threads alive after the group is destroyed; a thread that frees a
    tensor during the shutdown aborts the process (6 of 115 runs of one test on a loaded machine).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main_guard(main: Callable[[], None], resume: str = "--resume") -> None:
    """Run a program; a user error becomes one `error: ...` line and exit status 1, or the error's `exit_status`.

    User errors are UserError, the optimizers' BadValue, OSError (files, network), a missing package, insufficient
    memory, and a lost rank. Any other exception, a plain ValueError among them, is a bug and keeps its traceback;
    `python -X dev` shows all tracebacks. Ctrl-C becomes one line and status 130, as in shells. A process that was in a
    process group exits through `leave`.
    """
    try:
        _with_plain_errors(main, resume)
    except BaseException as error:
        if not _was_in_a_group():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        code = error.code if isinstance(error, SystemExit) else 1
        leave(code if isinstance(code, int) else int(code is not None))
    if _was_in_a_group():
        leave()


def plain_interrupt() -> None:
    """Make Ctrl-C one line before main_guard runs: imports take seconds."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt) and not sys.flags.dev_mode:
            print(STOPPED, file=sys.stderr, flush=True)
        else:
            before(kind, error, trace)

    sys.excepthook = hook


def _with_plain_errors(main: Callable[[], None], resume: str) -> None:
    try:
        main()
    except KeyboardInterrupt:
        if sys.flags.dev_mode:
            raise
        _end(f"{STOPPED} (training: with {resume})", 130)
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if sys.flags.dev_mode or not package or (REPOSITORY / package).is_dir():
            raise
        _end(
            f"error: need the package {package} of requirements.txt ({one_line(error)}): "
            "pip install -r requirements.txt"
        )
    except (UserError, OSError, ValueError) as error:
        if sys.flags.dev_mode or not (isinstance(error, OSError) or getattr(error, "for_the_user", False)):
            raise
        _end(f"error: {one_line(error)}", getattr(error, "exit_status", 1))
    except (RuntimeError, MemoryError) as error:
        line = _of_memory(error) or _of_lost_rank(error, resume)
        if sys.flags.dev_mode or not line:
            raise
        _end(line)


def _end(line: str, status: int = 1) -> NoReturn:
    print(line, file=sys.stderr, flush=True)
    sys.exit(status)


def _of_memory(error: Exception) -> str | None:
    if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
        return None
    return f"error: out of memory ({one_line(error)[:200]}): use a smaller batch, count or model"


def _of_lost_rank(error: Exception, resume: str) -> str | None:
    """Describe a failed collective: NCCL and the store raise DistError, gloo's errors only name its source files."""
    kind = getattr(_distributed(), "DistError", ())
    if not isinstance(error, kind) and "/gloo/" not in str(error):
        return None
    rank = _distributed().get_rank() if _is_in_a_group() else 0
    return (
        f"error: rank {rank} lost another rank, which exited or hangs: see that rank's error; the same command with "
        f"{resume} continues from the last checkpoint, on any number of ranks ({one_line(error)})"
    )


def _distributed() -> Any:
    """Return torch.distributed if it is imported: without it there is no process group."""
    return sys.modules.get("torch.distributed")


def _is_in_a_group() -> bool:
    is_initialized = getattr(_distributed(), "is_initialized", None)  # absent in the middle of importing torch
    return is_initialized is not None and is_initialized()


def _was_in_a_group() -> bool:
    return _left_a_group or _is_in_a_group()
