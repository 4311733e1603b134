"""Parquet files and saved data sets are read like tables, a row at a time; every complaint is one sentence."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from formwright.kit.errors import DataError
from formwright.tasks import task
from formwright.tasks._formats import open_rows
from formwright.tasks.tables import read_table

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

COLUMNS = {
    "number": list(range(60)),
    "body": [f"my invoice number {i} is wrong again" for i in range(60)],
    "queue": [("billing", "bug", "other")[i % 3] for i in range(60)],
}


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """The same rows as .csv, .jsonl, .parquet, a data set, and a data set of splits with class numbers."""
    made = datasets.Dataset.from_dict(COLUMNS)
    rows = [dict(zip(COLUMNS, row)) for row in zip(*COLUMNS.values())]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = [",".join(COLUMNS), *(",".join(map(str, row.values())) for row in rows)]
    (tmp_path / "t.csv").write_text("\n".join(lines), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table(COLUMNS), tmp_path / "t.parquet")
    made.save_to_disk(tmp_path / "set")
    numbered = made.class_encode_column("queue")
    datasets.DatasetDict(train=numbered, test=numbered.select([0])).save_to_disk(tmp_path / "splits")
    with (tmp_path / "classes.parquet").open("wb") as file:
        numbered.to_parquet(file)
    return tmp_path


def test_every_format_gives_the_same_rows(saved: Path) -> None:
    wanted = read_table(saved / "t.csv")
    assert wanted.rows[59] == {"number": "59", "body": COLUMNS["body"][59], "queue": "other"}
    for name in ("t.jsonl", "t.parquet", "set", "splits", "splits/test", "classes.parquet"):
        found = read_table(saved / name)
        assert found.columns == wanted.columns
        assert found.rows == (wanted.rows[:1] if name == "splits/test" else wanted.rows)
    assert found.unit == "row" and found.lines[:2] == (1, 2)
    assert read_table(saved / "splits").notes == (
        "splits: its split train is read (of train, test), and dealt out anew",
    )


def test_tasks_take_every_format(saved: Path) -> None:
    prints = set()
    for name in ("t.csv", "t.jsonl", "t.parquet", "set", "splits"):
        made = task("classification", data=saved / name, text="body", label="queue")
        assert made.labels == ["billing", "bug", "other"]
        prints.add(json.dumps([sorted(row.text for row in made.parts[split]) for split in made.parts]))
        lm = task("lm", data=saved / name)
        assert 'text: column "body" (guessed by its name; --text says another)' in lm.describe()
        assert lm.documents == 60
        prints.add(lm.fingerprint())
    assert len(prints) == 2


def test_what_cannot_be_read_is_said(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved / "none.parquet").write_bytes(b"a,b\n1,2\n")
    with pytest.raises(DataError, match=r"none.parquet is no Parquet file: .*; was it cut off"):
        open_rows(saved / "none.parquet")
    whole = (saved / "t.parquet").read_bytes()
    (saved / "half.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"half.parquet is no Parquet file"):
        read_table(saved / "half.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), saved / "empty.parquet")
    for name in ("empty.parquet", "empty.jsonl", "empty.csv"):
        (saved / name).touch()
        with pytest.raises(DataError, match=f"{name} has no rows"):
            task("lm", data=saved / name)
        with pytest.raises(DataError, match=f"{name} has no rows"):
            task("classification", data=saved / name)
    (saved / "set" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="set is no data set that datasets can read"):
        read_table(saved / "set")
    both = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict(left=both, right=both).save_to_disk(saved / "sides")
    with pytest.raises(DataError, match=r"sides holds the splits left, right: give one, such as .*sides/left"):
        read_table(saved / "sides")


def test_columns_that_are_missing_or_no_text(saved: Path) -> None:
    for name in ("t.csv", "t.jsonl", "t.parquet", "splits"):
        for kind in ("classification", "lm"):
            with pytest.raises(DataError, match=r'no column "boddy"; did you mean "body"\? \(columns: number, body'):
                task(kind, data=saved / name, text="boddy")
            with pytest.raises(DataError, match='the column "number" holds numbers, not texts; say --text COLUMN'):
                task(kind, data=saved / name, text="number")
        with pytest.raises(DataError, match='the column "number" holds numbers, not texts; say --query COLUMN'):
            task("retrieval", data=saved / name, query="number", document="body")


def test_a_missing_package_is_one_sentence(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] in ("pyarrow", "datasets"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    for name, package in (("t.parquet", "pyarrow"), ("set", "datasets")):
        with pytest.raises(DataError, match=package) as caught:
            open_rows(saved / name)
        assert 'pip install "formwright[data]"' in str(caught.value)
