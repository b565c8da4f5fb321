"""Atomic writes: files and folders are written under another name, then renamed, so none is ever half-written."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], Any], sync: bool = False) -> None:
    """Create or replace a file with the content that `write` writes; creates its folder too.

    sync: force the content to disk before the rename, so that a crash of the machine cannot undo it; slow for a
    million small files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Create or replace a text file, in UTF-8."""
    write_whole(path, lambda file: file.write(text.encode()), sync=True)


def write_json(path: Path, record: Any, indent: int | None = None) -> None:
    """Create or replace a JSON file; raises ValueError for NaN or infinity, which JSON does not have."""
    write_text(path, json.dumps(record, indent=indent, allow_nan=False) + "\n")


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` when the block ends without an error."""
    partial, old = (folder.parent / f".{kind}-{folder.name}" for kind in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)  # the rename failed: restore the old folder
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time create `folder`: a second one waits here, then finds it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
