"""Tasks written in a user's own file: samples that depend on (seed, split, index) only, and the check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formwright.kit.errors import DataError, SpecError
from formwright.tasks import task

ECHO = '''
"""Does the last token equal the first?"""
import formwright as fw

@fw.task.generated("echo", vocabulary=3, classes=2, metric="accuracy")
def echo(rng, length):
    tokens = rng.integers(1, 3, length)
    return tokens, int(tokens[0] == tokens[-1])

@fw.task.from_files("lines", metric="accuracy")
def lines(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        yield tuple(line.split("|"))
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_task.py"
    path.write_text(ECHO, encoding="utf-8")
    return path


@task.generated("first", vocabulary=5, classes=4, metric="accuracy")
def first(rng: np.random.Generator, length: int) -> tuple[np.ndarray, int]:
    tokens = rng.integers(1, 5, length)
    return tokens, int(tokens[0]) - 1


def test_echo_from_a_file(file: Path, make: Any) -> None:
    made = task(f"{file}:echo", length=32)
    assert made.metric == "accuracy" and made.chance == pytest.approx(0.5, abs=0.05)
    line, collisions = made.check()
    assert line.startswith("task check: 64 samples drawn twice with seed 0: equal · labels ")
    assert "majority 0." in line and "one-token shortcut 0." in line
    assert float(line.rsplit(" ", 1)[1]) < 0.6
    assert collisions == "splits: 0 of 2000 select and test samples also stand in another split"
    made.bind(make.model(tokenizer=None))

    def right(batch: Any) -> torch.Tensor:
        tokens, lengths = batch.inputs["tokens"], batch.lengths["tokens"]
        last = tokens[torch.arange(len(tokens)), lengths - 1]
        return torch.nn.functional.one_hot((tokens[:, 0] == last).long(), 2).float()

    assert made.score(make.logit_view(right), "test").value == 1.0
    assert made.baselines("test")["majority"].value == pytest.approx(0.5, abs=0.06)
    batches = list(made.batches("calibrate", seed=0, budget=3))
    assert batches[0].inputs["tokens"].shape == (32, 32) and batches[0].targets["label"].shape == (32,)
    with pytest.raises(SpecError, match=r"has no option 'lenght'; did you mean 'length'\?"):
        task(f"{file}:echo", lenght=3)
    with pytest.raises(DataError, match="task echo has 2 classes, toy 3 labels"):
        made.bind(make.model(labels=["a", "b", "c"]))


@given(st.integers(0, 10**9), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_a_sample_depends_on_seed_split_and_index_only(index: int, seed: int) -> None:
    one, other = first(length=16, seed=seed, size=5), first(length=16, seed=seed, size=9)
    for split in one.splits:
        a, b = one.draw(split, index), other.draw(split, index)
        assert np.array_equal(a[0], b[0]) and a[1] == b[1]
    assert not np.array_equal(one.draw("calibrate", index)[0], one.draw("test", index)[0])
    assert not np.array_equal(
        one.draw("test", index)[0], first(length=16, seed=seed + 1, size=5).draw("test", index)[0]
    )


def test_the_check_finds_a_shortcut_and_collisions() -> None:
    made = first(length=3, size=200)
    line, collisions = made.check()
    assert line.endswith("one-token shortcut 1.00")
    assert made.baselines("test")["one-token shortcut"].value == 1.0
    # 64 possible sequences of three tokens: nearly every sample stands in another split too.
    assert int(collisions.split()[1]) > 350


def test_training_batches_are_fresh_and_seeded() -> None:
    made = first(length=24, rows=8)
    one, two, other = (list(made.batches("calibrate", seed=seed, budget=4)) for seed in (0, 0, 1))
    assert all(torch.equal(a.inputs["tokens"], b.inputs["tokens"]) for a, b in zip(one, two))
    assert not torch.equal(one[0].inputs["tokens"], other[0].inputs["tokens"])
    assert not torch.equal(one[0].inputs["tokens"], one[1].inputs["tokens"])
    # None of them is a sample on which the calibrate split is scored.
    scored = {tokens.tobytes() for tokens, _ in (made.draw("calibrate", i) for i in range(200))}
    assert not any(row.numpy().tobytes() in scored for batch in one for row in batch.inputs["tokens"])


def test_a_changed_generator_changes_the_fingerprint() -> None:
    @task.generated("first", vocabulary=5, classes=4, metric="accuracy")
    def changed(rng: np.random.Generator, length: int) -> tuple[np.ndarray, int]:
        tokens = rng.integers(1, 5, length)
        return tokens, 4 - int(tokens[0])

    assert first(size=50).fingerprint() == first(size=50).fingerprint() != changed(size=50).fingerprint()
    assert first(size=50, length=7).fingerprint() != first(size=50).fingerprint()


@pytest.mark.parametrize(
    "sample,sentence",
    [
        (lambda rng, length: rng.integers(1, 3, length), "a sample is \\(tokens, label\\)"),
        (lambda rng, length: (rng.random(length), 0), "tokens are a one-dimensional array of integers, not float64"),
        (lambda rng, length: (np.full(length, 9), 0), r"tokens 9 … 9 are outside 0 … 4"),
        (lambda rng, length: (rng.integers(1, 3, length), 2), "label 2 is not one of 0 … 1"),
        (lambda rng, length: (rng.integers(1, 3, length), 0), "100 samples all have the label 0; check the generator"),
    ],
)
def test_samples_that_are_not_as_declared(sample: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        task.generated("bad", vocabulary=5, classes=2)(sample)(size=100)


def test_a_generator_that_ignores_its_rng_is_caught() -> None:
    hidden = np.random.default_rng(0)

    @task.generated("leaky", vocabulary=5, classes=2)
    def leaky(rng: np.random.Generator, length: int) -> tuple[np.ndarray, int]:
        return hidden.integers(1, 5, length), int(hidden.integers(2))

    with pytest.raises(DataError, match="drawn twice with seed 0 differs: draw everything from the rng"):
        leaky(size=64).check()


def test_rows_from_files(file: Path, tmp_path: Path, make: Any) -> None:
    data = tmp_path / "lines.txt"
    data.write_text("".join(f"text number {i}|{'odd' if i % 2 else 'even'}\n" for i in range(60)), encoding="utf-8")
    made = task(f"{file}:lines", data=data)
    assert made.name == "lines" and made.labels == ["even", "odd"]
    made.bind(make.model(labels=["even", "odd"]))
    assert made.score(make.logit_view(lambda b: torch.eye(2)[[0] * len(b.inputs["tokens"])]), "test").value == 0.5
    with pytest.raises(SpecError, match="task lines reads files: say data=PATH"):
        task(f"{file}:lines")
    data.write_text("one|two|three|four\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"task lines, row 0: \(text, label\) or \(text, second text, label\)"):
        task(f"{file}:lines", data=data)
    data.write_text(" |odd\n", encoding="utf-8")
    with pytest.raises(DataError, match="row 0: an empty text or label"):
        task(f"{file}:lines", data=data)
