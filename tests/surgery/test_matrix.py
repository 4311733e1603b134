"""The composition matrix: every cell runs or is a refusal in a sentence, and the ones that must run do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import formwright as fw
from formwright import registry
from formwright.surgery.matrix import REFUSES, RUNS, matrix, pair, table
from formwright.surgery.samples import encoder, tokens

NAMES = registry.names("surgery")


@pytest.mark.parametrize("first", NAMES)
def test_every_ordered_pair_runs_or_says_why_not(first: str, tmp_path: Path) -> None:
    def through_files(model: Any) -> Any:
        return fw.load(fw.save(model, tmp_path / "model"))

    for second in NAMES:
        for model in ("encoder", "decoder"):
            row = pair(model, first, second, through_files)  # anything but a clean refusal raises here
            assert row["outcome"] in (RUNS, REFUSES)
            assert (row["outcome"] == REFUSES) == bool(row["why"])
            if row["why"]:
                assert len(row["why"].split()) > 4 and "\n" not in row["why"]


@pytest.mark.parametrize(
    "first, second",
    [(a, b) for a in ("finercut", "lora", "llm-int8") for b in ("finercut", "lora", "llm-int8") if a != b],
)
def test_dropping_adapting_and_quantising_go_together_in_any_order(first: str, second: str) -> None:
    for model in ("encoder", "decoder"):
        assert pair(model, first, second)["outcome"] == RUNS


def test_table_numbers_its_refusals() -> None:
    rows = matrix(["lora", "merge"], ["encoder"])
    assert [row["outcome"] for row in rows] == [RUNS, RUNS, RUNS, REFUSES]
    text = table(rows)
    assert text.splitlines()[0] == "| first \\ second | lora | merge |"
    assert "| **merge** | runs | refuses (1) |" in text
    assert "1. merge: no slot holds an adapter, so there is nothing to fold in" in text


def test_a_refusal_after_work_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from formwright.kit.errors import Refusal
    from formwright.surgery.adapt.lora import Lora

    def fill(self, model, plan, displaced):
        raise Refusal("too late")

    monkeypatch.setattr(Lora, "fill", fill)
    with pytest.raises(AssertionError, match="after it had begun"):
        pair("encoder", "lora", "lora")
    assert encoder()(tokens()).shape == (4, 32)
