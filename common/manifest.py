"""Manifests: sizes and SHA-256 of a folder's files, to detect damaged or exchanged ones.

    write_manifest(folder, {"step": 1000})       # folder/manifest.json, over every file of the folder
    manifest = verify_manifest(folder)           # or Damaged, naming each file that differs

The manifest includes its own SHA-256. It detects damage, not forgery: anyone can write a matching manifest.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from common import BadValue, one_line
from common.whole import write_json

MANIFEST = "manifest.json"
FORMAT = 2  # incremented when older code would misread newer manifests

_THREADS = 8  # hashlib releases the GIL; a disk seldom feeds more


class Damaged(BadValue):
    """A folder that differs from its manifest; the message is one line."""


def write_manifest(folder: str | Path, contents: dict[str, Any] | None = None, checksums: bool = True) -> dict:
    """Write folder/manifest.json over all files that the folder holds; returns the manifest.

    Args:
        folder: complete; no other process may write to it.
        contents: further fields, JSON-serializable.
        checksums: hash the files (about 1 GB/s per core); otherwise only sizes are recorded.
    """
    folder = Path(folder)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    sums = _sums(paths) if checksums else [None] * len(paths)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": each}
        for path, each in zip(paths, sums, strict=True)
    }
    manifest = json.loads(json.dumps({"format": FORMAT, "files": files, **(contents or {})}))
    write_json(folder / MANIFEST, {"sha256": _digest(manifest), "manifest": manifest}, indent=1)
    return manifest


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return a folder's manifest; raises Damaged if its own SHA-256 or the size of a file differs."""
    folder = Path(folder)
    try:
        written = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"its {MANIFEST} cannot be read: {one_line(error)}") from error
    if isinstance(written, dict) and written.get("format") == 1:
        raise Damaged(f"it has format 1, of an older version of this code, which reads format {FORMAT}")
    if not isinstance(written, dict) or not isinstance(written.get("manifest"), dict):
        raise Damaged(f"its {MANIFEST} must hold a manifest and its sha256, got {_shown(written)}")
    manifest = written["manifest"]
    if written.get("sha256") != _digest(manifest):
        raise Damaged(f"its {MANIFEST} is not as it was written: its SHA-256 differs")
    if manifest.get("format") != FORMAT:
        raise Damaged(f"its format is {_shown(manifest.get('format'))}, and this code reads {FORMAT}")
    _refuse_misshapen(manifest)
    sizes = {name: _size_difference(folder / name, file) for name, file in manifest["files"].items()}
    differences = [f"{name} {difference}" for name, difference in sizes.items() if difference]
    if differences:
        raise Damaged("; ".join(differences))
    return manifest


def verify_manifest(folder: str | Path, checksums: bool = True) -> dict[str, Any]:
    """Return a folder's manifest after checking every file; raises Damaged, naming each file that differs.

    checksums: also hash the files whose SHA-256 the manifest has; otherwise only sizes are compared.
    """
    folder, manifest = Path(folder), read_manifest(folder)
    hashed = {name: file["sha256"] for name, file in manifest["files"].items() if checksums and file["sha256"]}
    try:
        found = _sums([folder / name for name in hashed])
    except OSError as error:
        raise Damaged(f"a file cannot be read: {one_line(error)}") from error
    different = [name for name, here in zip(hashed, found, strict=True) if here != hashed[name]]
    if different:
        raise Damaged(f"not as written, their SHA-256 differs: {', '.join(different)}")
    return manifest


def _refuse_misshapen(manifest: dict[str, Any]) -> None:
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.items())):
        raise Damaged(f"its {MANIFEST} must list files with bytes and sha256, got {_shown(files)}")


def _is_entry(item: tuple[str, Any]) -> bool:
    name, file = item
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts
    return (
        inside
        and isinstance(file, dict)
        and isinstance(file.get("bytes"), int)
        and isinstance(file.get("sha256", 0), str | None)
    )


def _size_difference(path: Path, file: dict[str, Any]) -> str | None:
    try:
        found = path.stat().st_size
    except OSError:
        return "is missing"
    return None if found == file["bytes"] else f"has {found} bytes instead of {file['bytes']}"


def _sums(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(_sum, paths))


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
