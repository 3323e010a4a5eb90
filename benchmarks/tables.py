"""Measured rows in CSV files, and the tables that documents make of them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

Row = dict[str, str]


def append(rows: Iterable[Mapping[str, object]], path: Path, columns: Sequence[str]) -> None:
    """Add rows to a CSV file, with a head when it is new."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    """All rows of a CSV file; none where there is no such file yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def latest(rows: Iterable[Row], *keys: str) -> list[Row]:
    """The last row of each combination of keys, in order of first appearance."""
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def nearest(rows: Iterable[Row], row: Row) -> Row | None:
    """Of some rows the one that was measured nearest in time to a row, the later of two as near; None of none."""
    return min(reversed(list(rows)), key=lambda other: abs(_time(other) - _time(row)), default=None)


def _time(row: Row) -> datetime:
    return datetime.strptime(row["time"], "%Y-%m-%dT%H:%MZ")


def between(text: str, begin: str, end: str, content: str) -> str:
    """``text`` with ``content`` on lines of its own between two marks. Raises ``ValueError`` where a mark is missing."""
    start = text.index(begin) + len(begin)
    return f"{text[:start]}\n{content}\n{text[text.index(end, start) :]}"
