"""Rows that are on disk as soon as they are measured: a run that is cut off keeps them, and the next one goes on."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from pathlib import Path


class Table:
    """A CSV file that grows by whole rows. Its first column, "case", names what a row measured."""

    def __init__(self, path: Path, fields: tuple[str, ...]):
        """fields: the columns after "case"; a file of other columns is refused with ValueError."""
        self.path, self.fields = path, ("case", *fields)
        self.rows: dict[str, dict[str, str]] = {}
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or ()) != self.fields:
                    raise ValueError(f"{path}: has other columns; expected {', '.join(self.fields)}")
                self.rows = {row["case"]: row for row in reader}

    def __contains__(self, case: str) -> bool:
        return case in self.rows

    def add(self, case: str, values: Mapping[str, object]) -> None:
        """Write one row; fields that are not given stay empty. Raises ValueError for a field of no column."""
        unknown = values.keys() - set(self.fields)
        if unknown:
            raise ValueError(f"{self.path}: no column {', '.join(sorted(unknown))}")
        row = dict.fromkeys(self.fields, "") | {"case": case} | dict(values)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.fields)
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows[case] = {name: str(value) for name, value in row.items()}


class Budget:
    """Seconds that may be spent, counted from here on."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    def allows(self, seconds: float) -> bool:
        """Return whether something that takes so long would end in time."""
        return self.left() >= seconds
