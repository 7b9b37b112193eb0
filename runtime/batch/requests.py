"""What is to be drawn: requests from JSON lines, a parquet table, or a folder of regions.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import InputError, first_line
from runtime.machine.files import reason_of, unique

EXPECTED = "expected JSON lines (.jsonl), a table (.parquet), or a folder with files named regions.json"
REGIONS, PROJECT = "regions.json", "project.json"
OF_PROJECT = (  # what the settings of a project that the server's page has saved are called here too
    "prompt", "negative_prompt", "height", "width", "steps", "guidance", "scheduler", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A request as it was written.

    source: the file, and the line or row in it. base: the folder that its pictures' paths start from. body: its fields;
    None, and the error, where it cannot be read.
    """

    source: str
    base: Path
    body: dict[str, Any] | None
    error: str | None = None


def read(path: Path) -> tuple[int, Callable[[], Iterator[Line]]]:
    """Return how many requests there are, and what yields them. Raises InputError where the file cannot be read."""
    if path.is_dir():
        files = sorted(path.rglob(REGIONS))
        if not files:
            raise InputError(f"{path}: no {REGIONS} in it; {EXPECTED}")
        return len(files), lambda: map(_of_folder, files)
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _table}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: unknown kind of file; {EXPECTED}")
    try:
        return readers[path.suffix.lower()](path)
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}; {EXPECTED}") from error


def _json_lines(path: Path) -> tuple[int, Callable[[], Iterator[Line]]]:
    def lines() -> Iterator[Line]:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield _parsed(f"{path.name}:{number}", path.parent, text)

    with path.open("rb") as file:
        count = sum(bool(text.strip()) for text in file)
    return count, lines


def _table(path: Path) -> tuple[int, Callable[[], Iterator[Line]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: {first_line(error)}; {EXPECTED}") from error

    def rows() -> Iterator[Line]:
        number = 0
        try:
            for batch in table.iter_batches(1024):
                for row in batch.to_pylist():
                    yield _row(f"{path.name}:{number}", path.parent, _given(row))
                    number += 1
        except (OSError, pyarrow.ArrowException) as error:  # its end was whole, and so was what came before
            raise InputError(
                f"{path}: damaged after row {number}: {first_line(error)}; {EXPECTED}"
            ) from error

    return table.metadata.num_rows, rows


def _row(source: str, base: Path, body: dict[str, Any]) -> Line:
    """Return the request of a table's row, whose cells may be of types that no request has: bytes, dates ..."""
    for name, value in body.items():
        try:
            json.dumps(value)
        except TypeError as error:
            said = f"{source}: {name}: {first_line(error)}; expected text, a number, a list or an object"
            return Line(source, base, None, said)
    return Line(source, base, body)


def _given(value: Any) -> Any:
    """Return a value of a table without its empty cells: a column that other rows have is no field of this one.

    A whole number is one, also in a column that pandas has made floats of for its gaps.
    """
    if isinstance(value, dict):
        return {name: _given(each) for name, each in value.items() if each is not None and each == each}
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return [_given(each) for each in value] if isinstance(value, list) else value


def _of_folder(path: Path) -> Line:
    """Return the request of a regions.json: an object, or a list of regions beside a project's settings."""
    line = _of_file(path, (dict, list))
    if not isinstance(line.body, list):
        return line
    project = path.with_name(PROJECT)
    if not project.is_file():
        error = f"{path}: regions alone; expected an object with a prompt and regions, or {PROJECT} beside it"
        return Line(line.source, line.base, None, error)
    said = _of_file(project)
    if said.body is None:
        return Line(line.source, line.base, None, said.error)
    settings = said.body.get("settings")
    if not isinstance(settings, dict):
        return Line(
            line.source, line.base, None, f"{project}: no settings; expected a project of the server's page"
        )
    body = {name: settings[name] for name in OF_PROJECT if settings.get(name) not in (None, "")}
    if (path.with_name("start.png")).is_file():
        body |= {"image": "start.png", "strength": settings.get("strength")}
    held = {"outside": "held"} if settings.get("held") and line.body else {}
    return Line(line.source, line.base, {"prompt": "", **body, **held, "regions": line.body})


def _of_file(path: Path, kinds: type | tuple[type, ...] = dict) -> Line:
    try:
        return _parsed(str(path), path.parent, path.read_bytes(), kinds)
    except OSError as error:
        return Line(str(path), path.parent, None, f"{path}: {reason_of(error)}")


def _parsed(source: str, base: Path, text: bytes, kinds: type | tuple[type, ...] = dict) -> Line:
    try:
        body = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        return Line(source, base, None, f"{source}: not JSON: {first_line(error)}")
    if not isinstance(body, kinds):
        return Line(
            source, base, None, f"{source}: {type(body).__name__}; expected an object with a request's fields"
        )
    return Line(source, base, body)
