"""Checkpoint folders: complete or absent, even after a crash during the write.

    folder/step-00001000/            complete: written under another name, synced to disk, then renamed
        manifest.json                contents, and the sizes and SHA-256 of the other files
        .metadata, __0_0.distcp...   the tensors, by torch.distributed.checkpoint
    folder/.partial-step-00002000/   in progress, or left by a killed process and removed by the next save

With several processes, only rank 0 calls these functions.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import warn
from common.config import at_least
from common.manifest import MANIFEST, Damaged, read_manifest, write_manifest

Manifest = dict[str, Any]


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run."""

    every: int = 1000
    """Steps between checkpoints; one more is written at the end. 0 writes none."""
    keep: int = 2
    """Number of newest checkpoints to keep."""

    def __post_init__(self):
        at_least(0, self, "every")
        at_least(1, self, "keep")


def survey(folder: Path) -> tuple[list[tuple[Path, Manifest]], list[str]]:
    """Return the checkpoints with their manifests, newest first, and one line per damaged one, also printed as warning.

    Only manifests and sizes are checked; `verify_manifest` checks the contents of the checkpoint that is loaded.
    """
    whole, damaged = [], []
    for step, path in sorted(_numbered(folder), reverse=True):
        try:
            manifest = read_manifest(path)
            _refuse_misshapen(manifest, step)
            whole.append((path, manifest))
        except Damaged as error:
            damaged.append(f"{path}: {error}")
            warn(f"checkpoint {path} is damaged and skipped: {error}")
    return whole, damaged


def _refuse_misshapen(manifest: Manifest, step: int) -> None:
    """Raise Damaged for a manifest without the fields that `checkpoint.save` writes."""
    if manifest.get("step") != step:
        raise Damaged(f"its {MANIFEST} is of step {manifest.get('step')}")
    tensors, groups, extra = (manifest.get(key) for key in ("tensors", "groups", "extra"))
    if not (isinstance(tensors, dict) and all(map(_is_shape, tensors.values()))):
        raise Damaged(f"its {MANIFEST} must hold tensors, a shape for each name")
    if not (isinstance(groups, list) and all(map(_is_group, groups))):
        raise Damaged(f"its {MANIFEST} must hold groups, each with a rule and names of params")
    if not isinstance(extra, dict):
        raise Damaged(f"its {MANIFEST} must hold extra, an object")


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(size, int) for size in value)


def _is_group(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("rule"), str):
        return False
    return isinstance(value.get("params"), list) and all(isinstance(name, str) for name in value["params"])


def prepare(folder: Path, step: int) -> Path:
    """Return an empty folder to write the checkpoint of `step` into."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".partial-*"):
        shutil.rmtree(leftover)
    partial = folder / f".partial-{_name(step)}"
    partial.mkdir()
    return partial


def finish(partial: Path, step: int, contents: dict[str, Any], checksums: bool = True) -> Path:
    """Write the manifest, then give the folder its final name, replacing an older one of that step."""
    write_manifest(partial, {"step": step, **contents}, checksums)
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
    """Return the free space on the disk of `folder`, which need not exist, as text."""
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
