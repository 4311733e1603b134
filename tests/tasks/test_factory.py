"""Finding tasks by name, options refused by name, and the base class's promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formwright import registry
from formwright.kit.errors import SpecError
from formwright.tasks import Task, task
from formwright.tasks._splits import deal
from formwright.tasks.base import SPLITS, digest, epochs, lines_listed


def test_all_five_are_registered_with_a_summary() -> None:
    assert {"classification", "lm", "lm/stdlib", "retrieval", "retrieval/stdlib"} <= set(registry.names("task"))
    assert all(registry.find("task", name).summary for name in registry.names("task"))


def test_unknown_names_and_options() -> None:
    with pytest.raises(SpecError, match=r"unknown task 'retrieval/stdib'; did you mean 'retrieval/stdlib'\?"):
        task("retrieval/stdib")
    with pytest.raises(SpecError, match=r"has no option 'pol'; did you mean 'pool'\? \(options: pool, seed"):
        task("retrieval/stdlib", pol=3)
    with pytest.raises(SpecError) as caught:
        task("classification", texd="body")
    assert str(caught.value).splitlines()[0].startswith("task 'classification' has no option 'texd'; did you mean")
    assert str(caught.value).splitlines()[1] == "task 'classification' needs data=…"


PLUGIN = """
from formwright.tasks import Task

class Mine(Task):
    name = "mine"
    metric = "luck"
    def __init__(self, size: int = 3):
        self.size = size
    def fingerprint(self):
        return "f" * 64

made = Mine(7)
def maker(size=1):
    return Mine(size)
def liar():
    return 3
number = 3
"""


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN, encoding="utf-8")
    assert task(f"{file}:Mine", size=5).size == 5  # type: ignore[attr-defined]
    assert task(f"{file}:maker").size == 1  # type: ignore[attr-defined]
    assert task(f"{file}:made").size == 7  # type: ignore[attr-defined]
    assert task(task(f"{file}:made")) is task(f"{file}:made")
    with pytest.raises(SpecError, match="task 'mine' takes no options, so size cannot be set"):
        task(f"{file}:made", size=2)
    with pytest.raises(SpecError, match="gives a int, not a task"):
        task(f"{file}:liar")
    with pytest.raises(SpecError, match="is a int, not a task"):
        task(f"{file}:number")
    with pytest.raises(SpecError, match=r"has no 'makr'; did you mean 'maker'\?"):
        task(f"{file}:makr")


def test_base_class_defaults() -> None:
    class Empty(Task):
        name, metric = "empty", "none"

        def fingerprint(self) -> str:
            return "0" * 64

    made = Empty()
    assert made.texts("test") == [] and made.baselines("select") == {} and made.splits == SPLITS
    assert made.describe() == ["metric: none", "fingerprint 000000000000"]
    with pytest.raises(SpecError, match=r"unknown split 'tset'; did you mean 'test'\?"):
        made.texts("tset")


@given(st.dictionaries(st.text(), st.integers(), max_size=6))
def test_digest_does_not_see_dict_order(data: dict[str, int]) -> None:
    assert digest(data) == digest(dict(reversed(list(data.items()))))
    assert digest(data, 1) != digest(data)


def test_fingerprint_is_the_same_in_another_process_and_locale(tmp_path: Path) -> None:
    """Hash seeds, the locale and the working folder differ; the fingerprint must not."""
    rows = "".join(f"{i},some wörds of text {i},{'ja' if i % 3 else 'nein'}\n" for i in range(60))
    (tmp_path / "t.csv").write_text("id,text,label\n" + rows, encoding="utf-8")
    code = (
        "import sys; from formwright.tasks import task;"
        "t = task('classification', data=sys.argv[1], text='text', label='label'); print(t.fingerprint())"
    )
    here = task("classification", data=tmp_path / "t.csv", text="text", label="label").fingerprint()
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "7",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONPATH": ":".join(sys.path),
    }
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "t.csv")],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == here


@given(st.dictionaries(st.text(max_size=5), st.integers(1, 9), max_size=60), st.integers(0, 99))
def test_dealing_depends_on_names_only(sizes: dict[str, int], seed: int) -> None:
    dealt = deal(sizes, (0.3, 0.3, 0.4), seed)
    assert set(dealt) == set(sizes)
    assert len(sizes) < 3 or set(dealt.values()) == set(SPLITS)
    assert dealt == deal(dict(reversed(list(sizes.items()))), (0.3, 0.3, 0.4), seed)


@given(st.integers(3, 500), st.integers(0, 9))
def test_dealing_keeps_the_shares(count: int, seed: int) -> None:
    dealt = list(deal({str(i): 1 for i in range(count)}, (0.3, 0.3, 0.4), seed).values())
    for split, share in zip(SPLITS, (0.3, 0.3, 0.4)):
        assert abs(dealt.count(split) - share * count) <= 1


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 30), st.integers(0, 5))
def test_epochs(count: int, size: int, budget: int, seed: int) -> None:
    batches = list(epochs(range(count), size, seed=seed, budget=budget))
    assert len(batches) == budget and batches == list(epochs(range(count), size, seed=seed, budget=budget))
    whole = -(-count // size)
    if budget >= whole:
        assert sorted(i for batch in batches[:whole] for i in batch) == list(range(count))


def test_lines_listed() -> None:
    assert lines_listed([18]) == "line 18"
    assert lines_listed([18, 307]) == "lines 18, 307"
    assert lines_listed(list(range(20)), 2) == "lines 0, 1, … (20 in all)"


def test_default_resampling_is_the_mean_of_the_items(make: Any) -> None:
    import torch

    from formwright.models.batch import Score

    score = Score(0.5, torch.tensor([0.0, 1.0, 0.5]))
    assert Task().resampled(score, np.array([1, 1, 2])) == pytest.approx(2.5 / 3)
    assert Task().resampled(score, torch.tensor([0])) == 0.0
