"""Large folders written file by file: each for one request, with enough disk space, every file complete or absent."""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from common import UserError
from common.json_files import read_object
from common.whole import write_json as write_json
from common.whole import write_whole as write_whole

REQUEST = "request.json"  # source and settings of a folder: it can only be resumed with the same
BLOCK_BYTES = 4096  # of most file systems; files occupy whole blocks


def claim(folder: Path, request: dict) -> None:
    """Create a folder for a request, or reuse one of the same request; raises UserError for any other folder."""
    path = folder / REQUEST
    if not path.is_file():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} must be new or by SIT.prepare, got files without {REQUEST}: choose another")
        write_json(path, request)
    found = read_object(path, {}, f"remove {folder}, or name another folder")
    for key, value in request.items():
        if found.get(key) != value:
            raise UserError(
                f"all of {folder} must have one {key}, it was made with {found.get(key)}, requested is {value}: remove "
                "it, or name another folder"
            )


def is_whole(path: Path, size: int) -> bool:
    """Return whether a file exists and has this size, in bytes."""
    return path.is_file() and path.stat().st_size == size


def check_space(folder: Path, count: int, bytes_each: int) -> None:
    """Raise UserError if the disk has no room for `count` more files of `bytes_each` bytes."""
    blocks = bytes_each // BLOCK_BYTES + 1  # one more for the header
    needed, free = count * blocks * BLOCK_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} needs {needed / 1e9:.1f} GB for {count:,} files, the disk has {free / 1e9:.1f} GB: make room, "
            "or name a folder of another disk"
        )


def check_memory(needed: int, option: str) -> None:
    """Raise UserError if an option needs more bytes than this machine's memory."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(f"{option} needs {needed / 1e9:,.0f} GB, this machine has {there / 1e9:.0f} GB: lower it")


def map_in_groups(function: Callable[[str], str | None], arguments: list[str], workers: int) -> Iterator[str | None]:
    """Call a function on threads and yield its results in order; `map` alone would queue a million calls at once."""
    remaining = iter(arguments)
    with ThreadPoolExecutor(workers) as pool:
        while group := list(islice(remaining, 16 * workers)):
            yield from pool.map(function, group)
