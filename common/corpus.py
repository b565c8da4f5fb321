"""Training text: source files, and their split into training and validation."""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from common.text_rows import texts

# Tests are atypical code; pydoc_data is generated prose, longer than the rest of the validation set.
NOT_LIBRARY = {"test", "tests", "idle_test", "pydoc_data", "site-packages", "dist-packages"}
TABLES = (".jsonl", ".parquet")  # files of many documents, one per row
PIECE_BYTES = 2**22  # longer texts are read in pieces: bounded memory, and work for every thread
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # UTF-8: all bytes of a character but the first

FileSpan = tuple[Path, int, int | None]  # a file and a range of its documents (of its bytes, for plain text)


def library_files() -> tuple[Path, list[Path]]:
    """List this Python's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in root.rglob("*.py") if not NOT_LIBRARY & set(path.relative_to(root).parts)]
    if len(files) < 2:
        raise FileNotFoundError(f"need *.py files below {root}, found {len(files)}: give a FILE_OR_FOLDER")
    return root, sorted(files)


def local_files(source: Path) -> tuple[Path, list[Path]]:
    """List a single file, or a folder's files except hidden and empty ones."""
    if source.is_file():
        return source.parent, [source]
    if not source.is_dir():
        raise FileNotFoundError(f"the source must be a file, a folder or a name that --help lists, got {source}")
    files = [path for path in source.rglob("*") if path.is_file() and path.stat().st_size]
    files = [path for path in files if not any(p.startswith(".") for p in path.relative_to(source).parts)]
    if not files:
        raise FileNotFoundError(f"{source} must hold text, .jsonl or .parquet files, holds none")
    return source, sorted(files)


def fingerprint(root: Path, files: list[Path]) -> str:
    """Hash the names, sizes and modification times of files, to detect changes without reading them."""
    stats = [(path.relative_to(root).as_posix(), path.stat()) for path in files]
    listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def is_readable(path: Path) -> bool:
    """Return whether a file is named .parquet or holds valid UTF-8."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            while path.suffix != ".parquet" and file.read(PIECE_BYTES):
                pass
    except UnicodeDecodeError:
        return False
    return True


def split_files(root: Path, files: list[Path], val_fraction: float) -> dict[str, list[FileSpan]]:
    """Split files by a hash of each path, so that added files do not move others; a single file into head and tail."""
    if len(files) == 1:
        cut = tail_start(files[0], val_fraction)
        return {"train": [(files[0], 0, cut)], "val": [(files[0], cut, None)]}

    def hash_fraction(path: Path) -> float:  # uniform in [0, 1)
        return int(hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest()[:12], 16) / 16**12

    fractions = sorted(hash_fraction(path) for path in files)
    bound = min(max(val_fraction, np.nextafter(fractions[0], 1)), fractions[-1])  # at least one file per split
    parts: dict[str, list[FileSpan]] = {"train": [], "val": []}
    for path in files:
        parts["val" if hash_fraction(path) < bound else "train"].append((path, 0, None))
    return parts


def tail_start(path: Path, val_fraction: float) -> int:
    """Return where a single file's validation tail starts: at a document or, in plain text, at a character."""
    size = sum(1 for _ in texts(path)) if path.suffix in TABLES else path.stat().st_size
    cut = max(size - max(1, round(size * val_fraction)), 0)
    if path.suffix in TABLES:
        return cut
    with path.open("rb") as file:
        file.seek(cut)
        tail = file.read(3)  # a character has at most three continuation bytes
    return cut + len(tail) - len(tail.lstrip(CONTINUATION_BYTES))


def pieces(span: FileSpan) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether its document ends there) of a span; long plain text is cut at line ends."""
    path, start, stop = span
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
