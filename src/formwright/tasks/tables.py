"""Tables of the user's own, read strictly: their columns by name, by nearest name, and by guess.

Nothing is repaired silently: bytes that are not UTF-8, rows of the wrong width and misspelt columns are errors; a
semicolon as separator is recognised by the header and said. Line numbers are those an editor shows, 1 for the header;
formats without lines (see :mod:`formwright.tasks._formats`) count rows from 1. Cost: the whole table is held as text.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from formwright.kit.errors import DataError
from formwright.tasks._formats import is_rows, lines_of, open_rows
from formwright.tasks.base import lines_listed

__all__ = ["Table", "check_text", "guess", "is_rows", "nearest_column", "read_table", "read_text", "running_text"]


@dataclass(frozen=True)
class Table:
    """``rows[i][column]`` is text, ``lines[i]`` the line where row i starts, or its number (``unit`` says)."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    lines: tuple[int, ...]
    notes: tuple[str, ...] = ()
    unit: str = "line"

    def places(self, lines: Sequence[int]) -> str:
        """``"lines 18, 307"``, or rows where the format has no lines."""
        return lines_listed(lines, unit=self.unit)

    def column(self, wanted: str) -> str:
        """``wanted`` if it is a column, or DataError naming the nearest one and all of them."""
        if wanted not in self.columns:
            raise DataError(self.missing(wanted))
        return wanted

    def missing(self, wanted: str) -> str:
        """The sentence for a column that is not there."""
        near = nearest_column(wanted, self.columns)
        hint = f'; did you mean "{near}"?' if near else ""
        return f'{self.name} has no column "{wanted}"{hint} (columns: {", ".join(self.columns)})'


def nearest_column(wanted: str, columns: Iterable[str]) -> str:
    """The column whose name is nearest to ``wanted``, empty where none is near."""
    folded = {column.casefold(): column for column in columns}
    near = difflib.get_close_matches(wanted.casefold(), folded, n=1, cutoff=0.6)
    return folded[near[0]] if near else ""


def read_text(path: str | Path) -> str:
    """A file as text. DataError when it is not there, is a folder, or is not UTF-8 (naming byte offset and line)."""
    return "".join(lines_of(path))


def read_table(path: str | Path) -> Table:
    """All rows of a table: .csv, .tsv, .jsonl, .ndjson, .parquet, or a directory saved by ``datasets``."""
    source = open_rows(path)
    columns: dict[str, None] = {}
    rows, lines = [], []
    for line, row in source.read():
        columns.update(dict.fromkeys(row))
        rows.append(row)
        lines.append(line)
    if not rows:
        raise DataError(f"{source.name} has no rows")
    filled = tuple(row if len(row) == len(columns) else {c: row.get(c, "") for c in columns} for row in rows)
    return Table(source.name, tuple(columns), filled, tuple(lines), tuple(source.notes), source.unit)


def running_text(table: Table, column: str) -> bool:
    """Three words a value on average, and most values their own."""
    values = [row[column] for row in table.rows]
    return sum(len(value.split()) for value in values) >= 3 * len(values) and len(set(values)) * 2 > len(values)


def check_text(table: Table, column: str, option: str = "--text") -> str:
    """``column`` itself; DataError where every value of it is a number, so that it can be no text."""
    values = [row[column].strip() for row in table.rows]
    if any(values) and all(_number(value) for value in values if value):
        raise DataError(
            f'{table.name}: the column "{column}" holds numbers, not texts; say {option} COLUMN '
            f"(columns: {', '.join(table.columns)})"
        )
    return column


def _number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return value in ("true", "false")
    return True


def guess(table: Table, what: str, option: str, names: Sequence[str], fits: Sequence[str]) -> tuple[str, str]:
    """(column, the line that says so) where exactly one column is called like one of ``names``, or else exactly one
    of ``fits`` is left; DataError asking for ``option`` otherwise.
    """
    called = [column for column in table.columns if column.strip().casefold() in names]
    if len(called) == 1:
        return called[0], f'{what}: column "{called[0]}" (guessed by its name; {option} says another)'
    if not called and len(fits) == 1:
        return fits[0], f'{what}: column "{fits[0]}" (guessed: the only one that fits; {option} says another)'
    several = called or list(fits)
    reason = f"{', '.join(several)} could all be it" if several else "no column looks like it"
    raise DataError(
        f"{table.name}: which column is the {what}? {reason}; say {option} COLUMN (columns: {', '.join(table.columns)})"
    )
