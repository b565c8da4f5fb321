"""Rows of .jsonl and .parquet files, and their texts: each row is checked, and an error names its file and row.

    for text in texts(Path("train.jsonl")): ...
    for place, row in read_rows(Path("instructions.jsonl")): ...
    text_of(row.get("text"), "train.jsonl, row 7")    # the same check for rows that another library has read

Nothing is converted: a null, a number or invalid Unicode would silently be trained on.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import UserError, one_line

KEY = "text"
REMEDY = "correct the file, or leave it out"
PARQUET_ROWS = 256  # per read


def read_rows(path: Path, text_alone: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield each row and its place, "FILE, row N"; rows are counted from 1, like the lines of a .jsonl.

    text_alone: read no other column of a .parquet. Raises UserError for a file that cannot be read.
    """
    numbered = _parquet_rows(path, text_alone) if path.suffix == ".parquet" else _jsonl_rows(path)
    for number, row in numbered:
        yield f"{path}, row {number}", row


def texts(path: Path) -> Iterator[str]:
    """Yield the text of each row, in order; raises UserError for a file that cannot be read, or a row without text."""
    for place, row in read_rows(path, text_alone=True):
        if not isinstance(row, dict) or KEY not in row:
            found = f"the keys {', '.join(row) or 'none'}" if isinstance(row, dict) else _shown(row)
            raise UserError(f"{place} must have its text under the key {KEY!r}, has {found}: {REMEDY}")
        yield text_of(row[KEY], place)


def text_of(value: Any, place: str) -> str:
    """Return a row's text; raises UserError, which names the place, for any other value."""
    if not isinstance(value, str):
        raise UserError(f"{place}: the key {KEY!r} must hold text, got {_shown(value)}: {REMEDY}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell one half of a surrogate pair
        half = f"\\u{ord(value[error.start]):04x} at character {error.start}"
        raise UserError(
            f"{place}: the text must be valid Unicode, has half a surrogate pair, {half}: {REMEDY}"
        ) from None
    return value


def require_key(columns: list[str], place: str) -> None:
    """Raise UserError, naming the columns, for a table without a column of text."""
    if KEY not in columns:
        raise UserError(f"{place} must have a column {KEY!r}, has {', '.join(columns) or 'none'}: {REMEDY}")


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except UnicodeDecodeError as error:  # of a block of lines: the row is unknown
        raise UserError(f"{path} must be UTF-8, is not after row {number} ({one_line(error)}): {REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, row {number} must be JSON, is not ({one_line(error)}): {REMEDY}") from error


def _parquet_rows(path: Path, text_alone: bool) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowException, parquet  # only such files need it

    number = 0
    try:
        table = parquet.ParquetFile(path)
        if text_alone:
            require_key(table.schema_arrow.names, str(path))
        for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[KEY] if text_alone else None):
            for cells in zip(*batch.columns, strict=True):
                number += 1
                values = [cell.as_py() for cell in cells]
                yield number, dict(zip(batch.schema.names, values, strict=True))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, row {number}: the text must be UTF-8, is not ({one_line(error)}): {REMEDY}"
        ) from error
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} must be a whole .parquet file, is not ({one_line(error)}): {REMEDY}") from error


def _shown(value: Any) -> str:
    text = f"{type(value).__name__} {value!r}" if value is not None else "null"
    return text if len(text) <= 60 else f"{text[:57]}..."
