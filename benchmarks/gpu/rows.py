"""Rows that are on disk as soon as they are measured: a run that is cut off keeps them, and the next one goes on.

Those of another commit, device or version stay until they are measured again.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.measure import write_rows
from runtime.errors import InputError


class Table:
    """A CSV file that grows by whole rows. Its first column, "case", names what a row measured."""

    def __init__(self, path: Path, fields: tuple[str, ...], now: Mapping[str, object] | None = None):
        """fields: the columns after "case"; a file of other columns is refused with InputError.

        now: the values by which a row is known to be of what runs now; rows that have others are there, and not `in`.
        """
        self.path, self.fields = path, ("case", *fields)
        self.now = {name: str(value) for name, value in (now or {}).items()}
        self.rows = self._read()

    def _read(self) -> dict[str, dict[str, str]]:
        if not self.path.exists():
            return {}
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != self.fields:
                raise InputError(
                    f"{self.path}: its columns are not those that are written; expected another --out"
                )
            return {row["case"]: row for row in reader}

    def __contains__(self, case: str) -> bool:
        row = self.rows.get(case)
        return row is not None and all(row[name] == value for name, value in self.now.items())

    def add(self, case: str, values: Mapping[str, object]) -> None:
        """Write one row; fields that are not given stay empty. Raises ValueError for a field of no column."""
        unknown = values.keys() - set(self.fields)
        if unknown:
            raise ValueError(f"{self.path}: no column {', '.join(sorted(unknown))}")
        row = dict.fromkeys(self.fields, "") | {"case": case} | dict(values)
        # read again: another process may have written its own since
        self.rows = self._read() | {case: {name: str(value) for name, value in row.items()}}
        write_rows(self.path, list(self.rows.values()))


class Budget:
    """Seconds that may be spent, counted from here on."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    def allows(self, seconds: float) -> bool:
        """Return whether something that takes so long would end in time."""
        return self.left() >= seconds
