"""Files of rows, read a row at a time and never held: CSV, TSV, JSON lines, Parquet, and directories of ``datasets``.

Every reader is strict and names file, line and column. Values become text: a missing one is empty, a class number of
a Hugging Face data set is the name of its class, and what is neither text nor number is JSON. Parquet needs pyarrow
and data sets need datasets, both imported here alone. Cost: one pass over the file a reading, in constant memory.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from formwright.kit.errors import DataError
from formwright.tasks.base import lines_listed

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
#: What ``save_to_disk`` writes for one data set, and for several splits of one.
DATASET, SPLITS = "state.json", "dataset_dict.json"
#: Rows handed over at once by the readers of columns.
BLOCK = 1024

Row = tuple[int, dict[str, str]]


@dataclass(frozen=True)
class Rows:
    """``read()`` -> (line or row number, {column: text}) of each row, from the start every time."""

    name: str
    read: Callable[[], Iterator[Row]]
    unit: str = "line"
    notes: list[str] = field(default_factory=list)


def is_dataset(path: Path) -> bool:
    """Whether a directory was written by the ``save_to_disk`` of a data set."""
    return path.is_dir() and ((path / DATASET).is_file() or (path / SPLITS).is_file())


def is_rows(path: Path) -> bool:
    """Whether a path is that of a table rather than of text, by its suffix or by what lies in the directory."""
    return is_dataset(path) or (path.suffix.lower() in SUFFIXES and not path.is_dir())


def open_rows(path: str | Path) -> Rows:
    """The rows of a table by its suffix; ``~`` is expanded. DataError where there is no such table."""
    path = Path(path).expanduser()
    if is_dataset(path):
        return _dataset(path)
    suffix = path.suffix.lower()
    if path.exists() and not path.is_dir() and suffix not in SUFFIXES:
        raise DataError(f"{path.name}: a table ends in {', '.join(SUFFIXES)}; this one in {suffix or 'nothing'!r}")
    if suffix == ".parquet":
        return _parquet(present(path))
    if suffix in (".jsonl", ".ndjson"):
        return Rows(path.name, lambda: _json_lines(path))
    delimiter, notes = _delimiter(path, suffix)
    return Rows(path.name, lambda: _csv(path, delimiter), notes=notes)


def present(path: str | Path) -> Path:
    """The path of a file that is there; DataError where nothing or a folder is."""
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if path.is_dir():
        raise DataError(f"{path} is a folder; a file is needed")
    return path


def lines_of(path: str | Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, without its byte-order mark. DataError names byte offset and line."""
    path = present(path)
    with path.open("rb") as file:
        offset = 0
        for number, data in enumerate(file, 1):
            mark = 3 if number == 1 and data.startswith(b"\xef\xbb\xbf") else 0
            try:
                yield data[mark:].decode("utf-8")
            except UnicodeDecodeError as error:
                at = mark + error.start
                raise DataError(
                    f"{path.name} is not UTF-8: byte {offset + at} (line {number}) is 0x{data[at]:02x}; "
                    f"convert it, e.g. iconv -f cp1252 -t utf-8 {path.name} > utf8-{path.name}"
                ) from None
            offset += len(data)


def _delimiter(path: Path, suffix: str) -> tuple[str, list[str]]:
    """What separates the columns, told by the suffix and the header."""
    if suffix == ".tsv":
        return "\t", []
    header = next((line for line in lines_of(path) if line.strip("\r\n")), "")
    if "," not in header and ";" in header:
        return ";", [f"{path.name}: columns are separated by ';'"]
    return ",", []


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Texts longer than csv's default of 131,072 characters are ordinary documents here."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv(path: Path, delimiter: str) -> Iterator[Row]:
    # A lone carriage return ends a line too, as old files have it.
    lines = (line for block in lines_of(path) for line in io.StringIO(block, newline=""))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    columns: tuple[str, ...] = ()
    wrong: list[int] = []
    while True:
        line = reader.line_num + 1
        try:
            with _long_fields():  # only while csv is at work: the limit is everybody's
                fields = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path.name}, line {reader.line_num}: {error}; is a quotation mark unclosed?") from None
        if fields is None:
            break
        if not fields:
            continue
        if not columns:
            columns = _header(path.name, fields)
        elif len(fields) != len(columns):
            wrong.append(line)
        elif not wrong:
            yield line, dict(zip(columns, fields))
    if wrong:
        raise DataError(
            f"{path.name}: {lines_listed(wrong)} {'have' if len(wrong) > 1 else 'has'} not the {len(columns)} fields "
            f"of the header ({', '.join(columns)}); a text that holds the separator needs quotation marks"
        )


def _header(name: str, fields: list[str]) -> tuple[str, ...]:
    columns = tuple(column.strip() for column in fields)
    repeated = sorted({column for column in columns if columns.count(column) > 1})
    if repeated:
        raise DataError(f"{name} has the column {', '.join(repr(c) for c in repeated)} more than once")
    return columns


def _json_lines(path: Path) -> Iterator[Row]:
    # Only \n ends a line here: a text may hold U+2028 and its like unescaped.
    for line, content in enumerate(lines_of(path), 1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except json.JSONDecodeError as error:
            raise DataError(f"{path.name}, line {line}, column {error.colno}: not JSON: {error.msg}") from None
        if not isinstance(record, dict):
            raise DataError(
                f"{path.name}, line {line}: a line must be an object with named fields, not {content[:30]!r}"
            )
        yield line, {key: as_text(value) for key, value in record.items()}


def as_text(value: Any) -> str:
    """A value as text: nothing is empty, text is itself, all else is JSON (and what JSON cannot say, Python's word)."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f'{path.name}: Parquet files need pyarrow: pip install "formwright[data]"') from None
    try:
        with parquet.ParquetFile(path) as file:
            named = _class_names(file.schema_arrow.metadata or {})
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{path.name} is no Parquet file: {reason}; was it cut off, or is it of another format?"
        ) from None

    def read() -> Iterator[Row]:
        try:
            with parquet.ParquetFile(path) as file:
                yield from _numbered((block.to_pylist() for block in file.iter_batches(BLOCK)), named)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path.name} is damaged: {str(error).partition(chr(10))[0]}") from None

    return Rows(path.name, read, "row")


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Column -> names of its classes, where a Hugging Face data set left them in the file."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {column: kind["names"] for column, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _dataset(path: Path) -> Rows:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f'{path.name} was saved by datasets, which is not installed: pip install "formwright[data]"'
        ) from None
    try:
        held = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path.name} is no data set that datasets can read: {error}") from None
    name, notes = path.name, []
    if isinstance(held, datasets.DatasetDict):
        splits = list(held)
        chosen = "train" if "train" in splits else splits[0] if len(splits) == 1 else None
        if chosen is None:
            raise DataError(f"{name} holds the splits {', '.join(splits)}: give one, such as {path / splits[0]}")
        notes = [f"{name}: its split {chosen} is read (of {', '.join(splits)}), and dealt out anew"]
        held = held[chosen]
    named = {column: kind.names for column, kind in held.features.items() if isinstance(kind, datasets.ClassLabel)}
    plain = held.with_format("arrow")
    return Rows(name, lambda: _numbered((block.to_pylist() for block in plain.iter(BLOCK)), named), "row", notes)


def _numbered(blocks: Iterator[list[dict[str, Any]]], named: dict[str, list[str]]) -> Iterator[Row]:
    """Rows of blocks of raw values, counted from 1, with class numbers as names."""
    number = 0
    for block in blocks:
        for record in block:
            number += 1
            for column, names in named.items():
                value = record.get(column)
                if isinstance(value, int) and 0 <= value < len(names):
                    record[column] = names[value]
            yield number, {column: as_text(value) for column, value in record.items()}
