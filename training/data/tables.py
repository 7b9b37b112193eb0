"""The tables that lie beside images: metadata.jsonl, .csv or .parquet, as Hugging Face's image folders have them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from runtime.errors import InputError, first_line
from runtime.machine.files import first_repeated, unique
from training.data.sample import decode_text

NAMES = ("metadata", "train")
ENDINGS = (".jsonl", ".csv")


def is_table(path: Path) -> bool:
    """Return whether a file's name is that of a table."""
    return path.name == "metadata.parquet" or (path.stem in NAMES and path.suffix in ENDINGS)


def read_table(path: Path, expected: str) -> Iterator[tuple[str, dict]]:
    """Yield each row with its place, such as "line 3". Raises InputError where it cannot be read.

    expected: what a row should be, for the error's line.
    """
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        text = decode_text(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except InputError:
        text = None  # the line that is to blame is named below
    if path.suffix == ".csv":
        if text is None:
            raise InputError(f"{path}: not UTF-8; save it as UTF-8")
        yield from _csv(path, text)
        return
    # at line feeds only: Unicode has more ends of lines
    lines = path.read_bytes().split(b"\n") if text is None else text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number}: expected {expected}: {first_line(error)}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number}: expected {expected}")
        yield f"line {number}", row


def _csv(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        _check_columns(path, reader.fieldnames or [])
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{path}: line {reader.line_num}: expected {len(reader.fieldnames)} columns")
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        from pyarrow import parquet

        _check_columns(path, parquet.read_schema(path).names)
        rows = parquet.read_table(path).to_pylist()
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{path}: needs the package pyarrow; pip install pyarrow") from error
    except Exception as error:  # whatever pyarrow raises on a damaged file
        raise InputError(f"{path}: not a parquet file: {first_line(error)}") from error
    yield from ((f"row {number}", row) for number, row in enumerate(rows))


def _check_columns(path: Path, names: Sequence[str]) -> None:
    """Raise InputError where two columns have one name: a row keeps the last of them."""
    if twice := first_repeated(filter(None, names)):
        raise InputError(f"{path}: two columns named {twice!r}; expected one")
