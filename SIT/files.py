"""Large folders made file by file: for one purpose, with room on the disk, and every file whole or not there."""

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

REQUEST = "request.json"  # the source and settings of a folder: an interrupted one goes on with the same alone
BLOCK_BYTES = 4096  # of most file systems: a file takes whole ones


def claim(folder: Path, request: dict) -> None:
    """Make a folder for one purpose, or find one that was made for it; refuses a folder of anything else."""
    path = folder / REQUEST
    if not path.is_file():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} must be new, or made by SIT.prepare; has files but no {REQUEST}: choose another")
        write_json(path, request)
    found = read_object(path, {}, f"remove {folder}, or name another folder")
    for key, value in request.items():
        if found.get(key) != value:
            raise UserError(
                f"all of {folder} must have one {key}, it was made with {found.get(key)}, requested is {value}: remove "
                "it, or name another folder"
            )


def is_whole(path: Path, size: int) -> bool:
    """Tell whether a file is there and has this size, in bytes."""
    return path.is_file() and path.stat().st_size == size


def check_space(folder: Path, count: int, bytes_each: int) -> None:
    """Refuse to begin where a disk has no room for `count` more files of so many bytes."""
    blocks = bytes_each // BLOCK_BYTES + 1  # with the header of an image
    needed, free = count * blocks * BLOCK_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} needs {needed / 1e9:.1f} GB for {count:,} files, the disk has {free / 1e9:.1f} GB: make room, "
            "or name a folder of another disk"
        )


def check_memory(needed: int, option: str) -> None:
    """Raise UserError where an option asks for more bytes than this machine's memory."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(f"{option} asks for {needed / 1e9:,.0f} GB, this machine has {there / 1e9:.0f} GB: lower it")


def map_in_groups(function: Callable[[str], str | None], arguments: list[str], workers: int) -> Iterator[str | None]:
    """Call a function on threads, and yield its results in order; `map` alone would line up a million calls at once."""
    remaining = iter(arguments)
    with ThreadPoolExecutor(workers) as pool:
        while group := list(islice(remaining, 16 * workers)):
            yield from pool.map(function, group)
