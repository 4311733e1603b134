"""Tables of the user's own: CSV, TSV and JSON lines read strictly, every complaint with file, line and column.

Nothing is repaired silently: bytes that are not UTF-8, rows of the wrong width and misspelt columns are errors; a
semicolon as separator is recognised by the header and said. Line numbers are those an editor shows, 1 for the header.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formwright.kit.errors import DataError
from formwright.tasks.base import lines_listed

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class Table:
    """``rows[i][column]`` is text, ``lines[i]`` the line where row i starts."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    lines: tuple[int, ...]
    notes: tuple[str, ...] = ()

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
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if path.is_dir():
        raise DataError(f"{path} is a folder; a file is needed")
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The decoder counts after the byte-order mark that it has taken off.
        offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        line = data[:offset].count(b"\n") + 1
        raise DataError(
            f"{path.name} is not UTF-8: byte {offset} (line {line}) is 0x{data[offset]:02x}; "
            f"convert it, e.g. iconv -f cp1252 -t utf-8 {path.name} > utf8-{path.name}"
        ) from None


def read_table(path: str | Path) -> Table:
    """Read a table by its suffix: .csv, .tsv, .jsonl or .ndjson; ``~`` is expanded."""
    path = Path(path).expanduser()
    suffix = path.suffix.lower()
    if path.exists() and suffix not in SUFFIXES:
        raise DataError(f"{path.name}: a table ends in {', '.join(SUFFIXES)}; this one in {suffix or 'nothing'!r}")
    text = read_text(path)
    table = _read_lines(path.name, text) if suffix in (".jsonl", ".ndjson") else _read_csv(path.name, text, suffix)
    if not table.rows:
        raise DataError(f"{path.name} has no rows")
    return table


def _read_csv(name: str, text: str, suffix: str) -> Table:
    first = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = "\t" if suffix == ".tsv" else ","
    notes: tuple[str, ...] = ()
    if suffix == ".csv" and "," not in first and ";" in first:
        delimiter, notes = ";", (f"{name}: columns are separated by ';'",)
    # Texts longer than csv's default of 131,072 characters are ordinary documents here.
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        return _collect_csv(name, reader, notes)
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num}: {error}; is a quotation mark unclosed?") from None
    finally:
        csv.field_size_limit(before)


def _collect_csv(name: str, reader: Any, notes: tuple[str, ...]) -> Table:
    columns: tuple[str, ...] = ()
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    wrong: list[int] = []
    passed = 0
    for fields in reader:
        line, passed = passed + 1, reader.line_num
        if not fields:
            continue
        if not columns:
            columns = tuple(field.strip() for field in fields)
            repeated = sorted({column for column in columns if columns.count(column) > 1})
            if repeated:
                raise DataError(f"{name} has the column {', '.join(repr(c) for c in repeated)} more than once")
        elif len(fields) != len(columns):
            wrong.append(line)
        else:
            rows.append(dict(zip(columns, fields)))
            lines.append(line)
    if wrong:
        raise DataError(
            f"{name}: {lines_listed(wrong)} {'have' if len(wrong) > 1 else 'has'} not the {len(columns)} fields of the "
            f"header ({', '.join(columns)}); a text that holds the separator needs quotation marks"
        )
    return Table(name, columns, tuple(rows), tuple(lines), notes)


def _read_lines(name: str, text: str) -> Table:
    columns: dict[str, None] = {}
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    # Only \n ends a line here: a text may hold U+2028 and its like unescaped.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}, line {line}, column {error.colno}: not JSON: {error.msg}") from None
        if not isinstance(record, dict):
            raise DataError(f"{name}, line {line}: a line must be an object with named fields, not {content[:30]!r}")
        columns.update(dict.fromkeys(record))
        rows.append({key: _as_text(value) for key, value in record.items()})
        lines.append(line)
    filled = tuple({column: row.get(column, "") for column in columns} for row in rows)
    return Table(name, tuple(columns), filled, tuple(lines))


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
