"""The printed table: every column, no line too wide, plain without colour, and the order of the front."""

from __future__ import annotations

import re

import pytest
from rich.cells import cell_len

from formwright.report import table

from .sample import sample

WIDTHS = [60, 80, 100, 120, 160]
RESUME = "again: formwright slim --resume minilm-slim.run"


@pytest.mark.parametrize("width", WIDTHS)
def test_everything_is_said_and_fits(width: int) -> None:
    text = table(sample(), width)
    assert "\x1b" not in text and "\t" not in text
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert all(line == line.rstrip() for line in text.splitlines())
    flat = " ".join(text.split())
    for word in ["kept [95 % bound]", "ms/text", "speed", "MB", "BM25 0.4108", "0.994 [0.987]", "~0.562", "3.1x"]:
        assert word in flat
    for word in ["smallest loss this data can certify: 0.6 %", "wrote minilm-slim/", RESUME, "random 0.0021"]:
        assert word in flat
    for step in ["drop b2.mlp, b4.mlp", "heal 900 steps", "low-rank 160 on up, down", "int4 groups of 32"]:
        assert step in flat
    names = re.findall(r"^  (original|front \d|also \d)", text, re.M)
    assert names == ["original", "front 1", "front 2", "front 3", "front 4", "also 1"]


def test_wide_and_narrow_layouts() -> None:
    row = next(line for line in table(sample(), 120).splitlines() if "front 1" in line)
    assert row.split() == ["front", "1", "0.6119", "0.999", "[0.995]", "1.24", "1.9x", "57.3", "int8"]
    lines = table(sample(), 80).splitlines()
    at = next(i for i, line in enumerate(lines) if "front 1" in line)
    assert lines[at].endswith("57.3") and lines[at + 1] == "      int8"
    assert table(sample(), 120).splitlines()[-1].endswith(RESUME)


def test_colour_changes_no_letter() -> None:
    for width in WIDTHS:
        colored = table(sample(), width, color=True)
        assert "\x1b[" in colored
        assert re.sub(r"\x1b\[[\d;]*m", "", colored) == table(sample(), width)


def test_what_is_missing_is_a_dash() -> None:
    data = sample(keep=None, certifiable=None, seed=None, out=None, resume=None, baselines={"BM25": float("nan")})
    data["points"] = [{"name": "original"}, {"name": "x", "kept": float("inf")}]
    text = table(data, 100)
    assert "nan" not in text and "inf" not in text and "None" not in text
    assert re.search(r"^  x +– +– \[–\] +– +– +–", text, re.M)
    assert "baselines: BM25 –" in text and "again:" not in text
    assert "Nothing cheaper was found; nothing was written" in text


def test_long_and_wide_names() -> None:
    data = sample(model="模型" * 40)
    data["points"][1]["name"] = "front " + "x" * 80
    data["points"][2]["history"] = ["y" * 200, "z\nz"]
    data["task"]["metric"] = "a metric with a very long name@100/12345"
    for width in WIDTHS:
        assert max(cell_len(line) for line in table(data, width).splitlines()) <= width


def test_markup_is_not_read() -> None:
    assert "[bold]x[/bold] :smile:" in table(sample(model="[bold]x[/bold] :smile:"), 120)


def test_lower_is_better_is_marked() -> None:
    data = sample()
    data["task"].update(higher_is_better=False, metric="bits/byte")
    assert "bits/byte ↓" in table(data, 100)
