"""The rows of a run as tables to read."""

from __future__ import annotations

import csv
from pathlib import Path


def print_summary(folder: Path) -> None:
    """Print what <folder>'s CSV files say: kernels, then stages."""
    for row in rows_of(folder / "kernels.csv"):
        share = f"{float(row['share_of_copy']):6.0%}" if row["share_of_copy"] else ""
        line = f"{row['case']:72} {row['p50_us']:>10} us {row['host_us']:>8} host {share} {row['note']}"
        print(f"{line} ({row['commit']})")
    for row in rows_of(folder / "stages.csv"):
        floor = f"{float(row['floor_ms']) / float(row['p50_ms']):4.0%} of floor" if _both(row) else ""
        memory = f"{row['memory_gib']} GiB" if row["memory_gib"] else ""
        print(f"{row['case']:60} {row['p50_ms']:>10} ms {floor} {memory} {row['note']} ({row['commit']})")


def _both(row: dict[str, str]) -> bool:
    return bool(row["floor_ms"] and row["p50_ms"])


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return a CSV file's rows; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
