"""Reading tables: round trips, line numbers and refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formwright.kit.errors import DataError
from formwright.tasks.tables import read_table

cell = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=12)
fixture_ok = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.lists(st.tuples(cell, cell), min_size=1, max_size=8))
@fixture_ok
def test_csv_round_trip_with_starting_lines(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    path = tmp_path / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(["left", "right"])
        writer.writerows(rows)
    table = read_table(path)
    assert [(row["left"], row["right"]) for row in table.rows] == rows
    line = 2
    for row, found in zip(rows, table.lines):
        assert found == line
        line += 1 + "".join(row).count("\n")


@given(st.lists(st.dictionaries(st.sampled_from("abc"), cell, min_size=1), min_size=1, max_size=6))
@fixture_ok
def test_jsonl_round_trip(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline="")
    table = read_table(path)
    assert [{k: v for k, v in row.items() if v} for row in table.rows] == [
        {k: v for k, v in row.items() if v} for row in rows
    ]
    assert list(table.lines) == list(range(1, len(rows) + 1))


def test_values_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1, "b": null}\n\n{"a": true, "b": ["x"]}\n', encoding="utf-8")
    table = read_table(path)
    assert table.rows == ({"a": "1", "b": ""}, {"a": "true", "b": '["x"]'})
    assert table.lines == (1, 3)


def test_byte_order_mark_semicolon_and_tab(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("\ufeffa;b\nx, y;z\n".encode())
    table = read_table(path)
    assert table.columns == ("a", "b") and table.rows[0] == {"a": "x, y", "b": "z"}
    assert table.notes == ("t.csv: columns are separated by ';'",)
    path = tmp_path / "t.tsv"
    path.write_text("a\tb\nx, y\tz\n", encoding="utf-8")
    assert read_table(path).rows[0] == {"a": "x, y", "b": "z"}


def test_a_long_text_is_read_and_the_limit_restored(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "x" * 300_000 + ",y\n", encoding="utf-8")
    assert len(read_table(path).rows[0]["a"]) == 300_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    "name,content,sentence",
    [
        ("t.csv", b"a,b\nx\ny,z\nq\n", r"t.csv: lines 2, 4 have not the 2 fields of the header \(a, b\)"),
        ("t.csv", b"a,a\nx,y\n", r"t.csv has the column 'a' more than once"),
        ("t.csv", b'a,b\nx,"y\n', r"t.csv, line 2: unexpected end of data; is a quotation mark unclosed\?"),
        ("t.csv", b"a,b\n", r"t.csv has no rows"),
        ("t.csv", b"", r"t.csv has no rows"),
        ("t.csv", b"\xef\xbb\xbfa,b\n\xff,y\n", r"t.csv is not UTF-8: byte 7 \(line 2\) is 0xff"),
        ("t.jsonl", b'{"a": 1}\n{"a": }\n', r"t.jsonl, line 2, column 7: not JSON: Expecting value"),
        ("t.jsonl", b"[1]\n", r"t.jsonl, line 1: a line must be an object with named fields"),
        ("t.xlsx", b"PK", r"t.xlsx: a table ends in .csv, .tsv, .jsonl, .ndjson, .parquet; this one in '.xlsx'"),
    ],
)
def test_refusals(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_table(tmp_path / name)


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(DataError, match="is a folder; a file is needed"):
        read_table(tmp_path / "d.csv")


def test_columns_are_found_without_case(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("Body,Queue\nx,y\n", encoding="utf-8")
    table: Any = read_table(path)
    assert table.column("Body") == "Body"
    with pytest.raises(DataError, match='no column "body"; did you mean "Body"'):
        table.column("body")
