"""The folders that checkpoints live in: each whole or absent, whatever happens while it is written.

    folder/step-00001000/            whole: written aside, forced to disk, then renamed
        manifest.json                what it holds, and the sizes of its other files
        .metadata, __0_0.distcp...   the tensors, by torch.distributed.checkpoint
    folder/.partial-step-00002000/   being written, or left by a killed process and swept away by the next save

Where there are several processes, rank 0 alone calls these functions.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import one_line, warn
from common.config import at_least

MANIFEST = "manifest.json"
FORMAT = 1  # of the folder; to be raised when this code would misread a newer one


@dataclass(frozen=True)
class CheckpointConfig:
    """What can be resumed."""

    every: int = 1000
    """Steps between checkpoints, and one at the end; 0 writes none."""
    keep: int = 2
    """Newest checkpoints that are kept."""

    def __post_init__(self):
        at_least(0, self, "every")
        at_least(1, self, "keep")


def survey(folder: Path) -> tuple[list[tuple[Path, dict[str, Any]]], bool]:
    """Return the whole checkpoints with their manifests, newest first, and whether any was damaged (with a warning)."""
    whole, damaged = [], False
    for _, path in sorted(_numbered(folder), reverse=True):
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise ValueError(f"its format is {manifest['format']}, and this code reads {FORMAT}")
            for name, size in manifest["files"].items():
                found = (path / name).stat().st_size
                if found != size:
                    raise ValueError(f"{name} has {found} bytes instead of {size}")
            whole.append((path, manifest))
        except (OSError, ValueError, KeyError) as error:
            damaged = True
            warn(f"checkpoint {path} is damaged and passed over: {one_line(error)}")
    return whole, damaged


def prepare(folder: Path, step: int) -> Path:
    """Return an empty folder to write the checkpoint of `step` into."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".partial-*"):
        shutil.rmtree(leftover)
    partial = folder / f".partial-{_name(step)}"
    partial.mkdir()
    return partial


def finish(partial: Path, step: int, contents: dict[str, Any]) -> Path:
    """Write the manifest into a written folder and give the folder its name, in place of an older one of that step."""
    files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    with open(partial / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "step": step, "files": files, **contents}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)
    final = partial.with_name(_name(step))
    replaced = partial.with_name(f"{partial.name}-replaced")
    if final.exists():
        final.rename(replaced)  # a folder that is not empty cannot be renamed over
    partial.rename(final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def remove_old(folder: Path, step: int, keep: int) -> None:
    """Remove all checkpoints after `step`, and all but the last `keep` up to it."""
    numbered = sorted(_numbered(folder))
    later = [path for number, path in numbered if number > step]
    earlier = [path for number, path in numbered if number <= step]
    for path in later + earlier[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def free_space(folder: Path) -> str:
    """Return the free space of the disk that `folder` is on, or would be, for a message."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return f"{shutil.disk_usage(existing).free / 2**20:.0f} MiB free there"


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    matches = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*"))
    return [(int(match[1]), path) for match, path in matches if match]


def _sync(folder: Path) -> None:
    """Force a folder's entries to disk; without it a crash of the machine can undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
