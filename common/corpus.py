"""Text that experiments train on: which files, and which part of them is for validation."""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from common.text_rows import texts

# Tests are no code that one reads; pydoc_data is generated prose, and longer than all else in validation.
NOT_LIBRARY = {"test", "tests", "idle_test", "pydoc_data", "site-packages", "dist-packages"}
TABLES = (".jsonl", ".parquet")  # files of many documents, one per row
PIECE_BYTES = 2**22  # a longer text is read by pieces: bounded memory, and work for every thread
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # UTF-8: all bytes of a character but its first

Part = tuple[Path, int, int | None]  # a file, and the range in it of documents (of bytes, in plain text)


def library_files() -> tuple[Path, list[Path]]:
    """List this Python's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in root.rglob("*.py") if not NOT_LIBRARY & set(path.relative_to(root).parts)]
    if len(files) < 2:
        raise FileNotFoundError(f"need *.py files below {root}, found {len(files)}: give a FILE_OR_FOLDER")
    return root, sorted(files)


def local_files(source: Path) -> tuple[Path, list[Path]]:
    """List a file, or all that a folder holds but hidden and empty files."""
    if source.is_file():
        return source.parent, [source]
    if not source.is_dir():
        raise FileNotFoundError(f"the source must be a file, a folder or a name that --help lists: no {source} here")
    files = [path for path in source.rglob("*") if path.is_file() and path.stat().st_size]
    files = [path for path in files if not any(p.startswith(".") for p in path.relative_to(source).parts)]
    if not files:
        raise FileNotFoundError(f"{source} must hold text, .jsonl or .parquet files, holds none")
    return source, sorted(files)


def fingerprint(root: Path, files: list[Path]) -> str:
    """Hash the names, sizes and times of files: quick, and different once a file has changed."""
    stats = [(path.relative_to(root).as_posix(), path.stat()) for path in files]
    listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def is_readable(path: Path) -> bool:
    """Tell whether a file is parquet, or UTF-8 throughout."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            while path.suffix != ".parquet" and file.read(PIECE_BYTES):
                pass
    except UnicodeDecodeError:
        return False
    return True


def split_files(root: Path, files: list[Path], val_fraction: float) -> dict[str, list[Part]]:
    """Divide files by a hash of their path, which others do not change; one alone into its head and tail."""
    if len(files) == 1:
        cut = tail_start(files[0], val_fraction)
        return {"train": [(files[0], 0, cut)], "val": [(files[0], cut, None)]}

    def place(path: Path) -> float:  # uniform in [0, 1)
        return int(hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest()[:12], 16) / 16**12

    places = sorted(place(path) for path in files)
    bound = min(max(val_fraction, np.nextafter(places[0], 1)), places[-1])  # a file on either side at least
    parts: dict[str, list[Part]] = {"train": [], "val": []}
    for path in files:
        parts["val" if place(path) < bound else "train"].append((path, 0, None))
    return parts


def tail_start(path: Path, val_fraction: float) -> int:
    """Place the cut of a single file: before a document, or in plain text before a character."""
    size = sum(1 for _ in texts(path)) if path.suffix in TABLES else path.stat().st_size
    cut = max(size - max(1, round(size * val_fraction)), 0)
    if path.suffix in TABLES:
        return cut
    with path.open("rb") as file:
        file.seek(cut)
        tail = file.read(3)  # a character has at most three continuation bytes
    return cut + len(tail) - len(tail.lstrip(CONTINUATION_BYTES))


def pieces(part: Part) -> Iterator[tuple[str, bool]]:
    """Read a part of a file: texts, and whether each ends there; long plain text is cut at ends of lines."""
    path, start, stop = part
    if path.suffix in TABLES:
        yield from ((text, True) for text in islice(texts(path), start, stop))
        return
    remaining = (path.stat().st_size if stop is None else stop) - start
    with path.open("rb") as file:
        file.seek(start)
        while remaining:
            text = file.read(min(PIECE_BYTES, remaining))
            text += file.readline(remaining - len(text))
            remaining -= len(text)
            yield text.decode(), not remaining
