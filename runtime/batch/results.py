"""What has been drawn: OUT/ab/<id>.png, and a row for each in OUT/results (parquet)."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from runtime.errors import InputError, first_line
from runtime.machine.files import clear_partials, reason_of, replacing
from runtime.machine.lock import owned

TABLE = "results"  # the folder of the rows
TEXT = ("id", "file", "error", "source")
SCHEMA = pa.schema([(name, pa.string()) for name in TEXT] + [("seed", pa.int64()), ("seconds", pa.float64())])
START, END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"  # of every PNG
ROWS, SECONDS = 200, 5.0  # a file of the table has at most so many rows, or those of so many seconds


@dataclass(frozen=True)
class Row:
    """A picture, or why there is none. file: from OUT. seconds: at work. source: the request that named it first."""

    id: str
    file: str | None
    seed: int | None
    seconds: float | None
    error: str | None
    source: str


class Results:
    """A folder of pictures and their rows. What is there is whole; what was lost with a process is drawn again."""

    def __init__(self, folder: Path):
        """Raises InputError where the folder cannot be used."""
        self.folder, self.table = folder, folder / TABLE
        self._rows: list[Row] = []
        self._since = time.monotonic()
        try:
            self.table.mkdir(parents=True, exist_ok=True)
            self.known = {row["id"]: row["error"] for row in self.read()}
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"{folder}: {first_line(error)}; expected a folder of this program, or none"
            ) from error

    def read(self) -> list[dict]:
        """Return the rows that are on the disk, one for each id: a picture's before an error's."""
        found: dict[str, dict] = {}
        for path in sorted(self.table.glob("*.parquet")):
            for row in parquet.read_table(path, schema=SCHEMA).to_pylist():
                if row["id"] is None:
                    raise InputError(f"{path}: no table of this program; expected another OUT")
                if row["id"] not in found or found[row["id"]]["error"]:
                    found[row["id"]] = row
        drawn = {row["source"] for row in found.values() if not row["error"]}
        # what was refused once, and has been drawn since
        return [row for row in found.values() if not (row["error"] and row["source"] in drawn)]

    def path(self, id: str) -> Path:
        return self.folder / id[:2] / f"{id}.png"

    def has(self, id: str, source: str) -> bool:
        """Return whether a picture is there, whole; one whose row was lost gets it again."""
        if not _is_whole(self.path(id)):
            return False
        if self.known.get(id, "lost") is not None:
            try:
                with Image.open(self.path(id)) as image:
                    image.load()
                    seed = image.info.get("seed")
            except OSError:
                return False  # it is drawn again
            self.add(Row(id, self._file(id), int(seed) if seed else None, None, None, source))
        return True

    def refused(self, id: str) -> bool:
        """Return whether a request was refused before: it would be again."""
        return self.known.get(id) is not None

    def save(self, id: str, png: bytes, seed: int, seconds: float, source: str) -> None:
        """Keep a picture, whole or not at all, and then its row."""
        try:
            self.path(id).parent.mkdir(exist_ok=True)
            with replacing(self.path(id)) as partial:
                partial.write_bytes(png)
        except OSError as error:
            raise InputError(f"{self.path(id)}: {reason_of(error)}; make room, and run it again") from error
        self.add(Row(id, self._file(id), seed, round(seconds, 4), None, source))

    def add(self, row: Row) -> None:
        self.known[row.id] = row.error
        self._rows.append(row)
        if len(self._rows) >= ROWS or time.monotonic() - self._since > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are not on the disk yet."""
        self._since = time.monotonic()
        if not self._rows:
            return
        columns = {name: [_plain(asdict(row)[name]) for row in self._rows] for name in SCHEMA.names}
        try:
            with replacing(self.table / f"{time.time_ns()}-{secrets.token_hex(4)}.parquet") as partial:
                parquet.write_table(pa.table(columns, schema=SCHEMA), partial)
        except OSError as error:
            raise InputError(f"{self.table}: {reason_of(error)}; make room, and run it again") from error
        self._rows = []

    def _file(self, id: str) -> str:
        return self.path(id).relative_to(self.folder).as_posix()


@contextmanager
def opened(folder: Path) -> Iterator[Results]:
    """Yield the results of a folder that is this process' own for as long. Raises InputError where it cannot be."""
    with owned(folder, "OUT"):
        clear_partials(folder / TABLE, *folder.glob("[0-9a-f][0-9a-f]"))
        results = Results(folder)
        try:
            yield results
        finally:
            results.flush()


def _is_whole(path: Path) -> bool:
    """Return whether a file begins and ends as a PNG does. A disk that was full, or a copy, may have cut it short."""
    try:
        with path.open("rb") as file:
            start = file.read(len(START))
            file.seek(-min(len(END), file.seek(0, os.SEEK_END)), os.SEEK_END)
            return (start, file.read()) == (START, END)
    except OSError:
        return False


def _plain(value):
    """Return text that can be written: a file's name may be no text."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value
