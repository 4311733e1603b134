"""Ranking, pools, splits and BM25, by hand-made cases and against brute force."""

from __future__ import annotations

import json
from itertools import pairwise
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formwright.kit.errors import DataError, SpecError
from formwright.tasks import task
from formwright.tasks._bm25 import BM25, words
from formwright.tasks._retrieval import (
    Pair,
    draw_pool,
    merge,
    random_reciprocal_rank,
    rank_scores,
    split_pairs,
)
from formwright.tasks.base import SPLITS


def test_metrics_by_hand() -> None:
    similarity = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.1, 0.2, 0.9, 0.8], [0.4, 0.3, 0.2, 0.1]])
    got = rank_scores(similarity, [[0], [0], [1, 3]])
    assert got["mrr@10"].tolist() == [1.0, 0.25, 0.5]
    assert got["recall@1"].tolist() == [1.0, 0.0, 0.0]
    assert got["recall@10"].tolist() == [1.0, 1.0, 1.0]
    third = (1 / log2(3) + 1 / log2(5)) / (1 + 1 / log2(3))
    assert got["ndcg@10"].tolist() == pytest.approx([1.0, 1 / log2(5), third])


def test_beyond_rank_ten_counts_nothing() -> None:
    similarity = torch.arange(12.0).flip(0)[None]
    assert [rank_scores(similarity, [[at]])["mrr@10"].item() for at in (9, 10, 11)] == pytest.approx([0.1, 0, 0])


@pytest.mark.parametrize("value", [0.0, float("nan"), -float("inf")])
def test_a_model_that_tells_nothing_apart_scores_zero(value: float) -> None:
    got = rank_scores(torch.full((3, 20), value), [[0], [5, 6], [19]])
    assert all(float(values.sum()) == 0 for values in got.values())


@given(st.integers(0, 2**31), st.integers(2, 30), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_ranks_equal_a_sort(seed: int, documents: int, queries: int) -> None:
    """Few distinct similarities, so that ties are everywhere; sorted with wrong documents before right ones."""
    rng = np.random.default_rng(seed)
    similarity = rng.integers(0, 6, (queries, documents)).astype(float)
    answers = [sorted(rng.choice(documents, rng.integers(1, documents), replace=False)) for _ in range(queries)]
    got = rank_scores(torch.tensor(similarity), answers)
    for row in range(queries):
        right = set(answers[row])
        order = sorted(range(documents), key=lambda d: (-similarity[row, d], d in right))
        hits = [document in right for document in order[:10]]
        first = next((1 / (rank + 1) for rank, hit in enumerate(hits) if hit), 0.0)
        gain = sum(hit / log2(rank + 2) for rank, hit in enumerate(hits))
        ideal = sum(1 / log2(rank + 2) for rank in range(min(10, len(right))))
        assert got["mrr@10"][row].item() == pytest.approx(first)
        assert got["ndcg@10"][row].item() == pytest.approx(gain / ideal)
        assert got["recall@10"][row].item() == pytest.approx(sum(hits) / min(10, len(right)))


@given(st.integers(2, 40), st.data())
@settings(max_examples=30, deadline=None)
def test_random_expectation(size: int, data: Any) -> None:
    right = data.draw(st.integers(1, size))
    rng = np.random.default_rng(size * 41 + right)
    drawn = []
    for _ in range(400):
        first = int(rng.permutation(size)[:right].min()) + 1
        drawn.append(1 / first if first <= 10 else 0.0)
    expected = random_reciprocal_rank(size, right)
    assert np.mean(drawn) == pytest.approx(expected, abs=5 * np.std(drawn) / 20 + 1e-6)
    assert 0 < expected <= 1


def test_random_expectation_of_one_answer_is_the_harmonic_sum() -> None:
    assert random_reciprocal_rank(1500, 1) == pytest.approx(sum(1 / r for r in range(1, 11)) / 1500)


@pytest.mark.parametrize(
    "text,expected",
    [
        ("readCSV_file", ["read", "csv", "file"]),
        ("HTMLParser.feed(self, data2)", ["html", "parser", "feed", "self", "data", "2"]),
        ("Größe ÄNDERN", ["grösse", "ändern"]),
        ("__init__", ["init"]),
        ("", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_bm25_equals_its_formula() -> None:
    documents = ["the cat sat on the mat", "a dog", "cat cat dog"]
    tokens = [words(document) for document in documents]
    mean = np.mean([len(t) for t in tokens])
    got = BM25(documents).scores(["cat the", "absent", "cat cat"])
    for row, query in enumerate((["cat", "the"], ["absent"], ["cat", "cat"])):
        for column, content in enumerate(tokens):
            expected = 0.0
            for term in query:
                df = sum(term in other for other in tokens)
                tf = content.count(term)
                idf = np.log(1 + (3 - df + 0.5) / (df + 0.5))
                expected += idf * tf * 2.5 / (tf + 1.5 * (0.25 + 0.75 * len(content) / mean))
            assert got[row, column] == pytest.approx(expected)


def some_pairs(rng: np.random.Generator, count: int) -> list[Pair]:
    return [
        Pair(f"q{rng.integers(count)}", f"d{rng.integers(count)}", f"m{rng.integers(max(2, count // 8))}")
        for _ in range(count)
    ]


@given(st.integers(0, 2**31), st.integers(30, 200))
@settings(max_examples=30, deadline=None)
def test_nothing_crosses_the_splits(seed: int, count: int) -> None:
    pairs = some_pairs(np.random.default_rng(seed), count)
    parts, dropped = split_pairs(pairs, (0.3, 0.3, 0.4), seed=1)
    for side in ("queries", "documents"):
        held = [set(getattr(parts[split], side)) for split in SPLITS]
        assert sum(map(len, held)) == len(set().union(*held))
    assert dropped <= count
    shuffled = [pairs[i] for i in np.random.default_rng(0).permutation(count)]
    assert {name: set(part.queries) for name, part in split_pairs(shuffled, (0.3, 0.3, 0.4), 1)[0].items()} == {
        name: set(part.queries) for name, part in parts.items()
    }


@given(st.integers(0, 2**31), st.integers(10, 120), st.integers(2, 140))
@settings(max_examples=40, deadline=None)
def test_a_pool_holds_all_answers_and_its_exact_size(seed: int, count: int, size: int) -> None:
    part = merge(some_pairs(np.random.default_rng(seed), count))
    pool = draw_pool(part, size, seed=0)
    assert len(pool.documents) == len(set(pool.documents)) == min(size, len(part.documents))
    truth = {query: {part.documents[i] for i in places} for query, places in zip(part.queries, part.answers)}
    for query, places in zip(pool.queries, pool.answers):
        assert {pool.documents[i] for i in places} == truth[query]


# --- the standard library -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stdlib() -> Any:
    return task("retrieval/stdlib")


def test_stdlib_has_thousands_of_pairs_and_full_pools(stdlib: Any) -> None:
    assert 4500 < stdlib.pairs < 7500
    assert stdlib.metric == "mrr@10/1500"
    assert len(stdlib.pools["test"].documents) == 1500
    assert len(stdlib.pools["select"].documents) >= 1000
    assert all(part.queries for part in stdlib.parts.values())
    assert stdlib.describe()[0].startswith("standard library of Python 3.")


def test_stdlib_documents_are_source_without_docstrings(stdlib: Any) -> None:
    import ast
    import textwrap

    from formwright.tasks._stdlib import functions

    held = dict.fromkeys(document for _, _, document in functions())
    compiled = 0
    for document in list(held)[::40]:
        assert document.lstrip().startswith(("def ", "async def "))
        try:
            node = ast.parse(textwrap.dedent(document)).body[0]
        except SyntaxError:
            # A function whose only statement was its docstring is left as its head.
            continue
        compiled += 1
        assert ast.get_docstring(node) is None
    assert compiled > 100


def test_stdlib_splits_share_nothing(stdlib: Any) -> None:
    for side in ("queries", "documents"):
        held = [set(getattr(stdlib.parts[split], side)) for split in SPLITS]
        assert sum(map(len, held)) == len(set().union(*held))


def test_stdlib_fingerprint_is_of_the_content_and_the_rule(stdlib: Any) -> None:
    assert task("retrieval/stdlib").fingerprint() == stdlib.fingerprint()
    assert task("retrieval/stdlib", seed=1).fingerprint() != stdlib.fingerprint()
    assert task("retrieval/stdlib", pool=500).fingerprint() != stdlib.fingerprint()
    stdlib.load_state_dict(json.loads(json.dumps(stdlib.state_dict())))
    with pytest.raises(DataError, match="metric mrr@10/1500, this task has metric mrr@10/500"):
        task("retrieval/stdlib", pool=500).load_state_dict(stdlib.state_dict())


def test_bm25_beats_random_by_far() -> None:
    small = task("retrieval/stdlib", pool=500)
    assert small.metric == "mrr@10/500"
    got = small.baselines("test")
    assert 0.3 < got["BM25"].value < 0.7
    assert got["random"].value < 0.02
    assert got["BM25"].per_item is not None and len(got["BM25"].per_item) == len(small.pools["test"].queries)
    index = np.arange(len(got["BM25"].per_item))
    assert small.resampled(got["BM25"], index) == pytest.approx(got["BM25"].value)


def test_scoring_runs_in_sorted_batches_and_finds_what_is_there(make: Any, stdlib: Any) -> None:
    """Random vectors score like random; a view that knows the right answer scores 1."""
    small = task("retrieval/stdlib", pool=500)
    with pytest.raises(DataError, match=r"not bound to a model: call task.bind"):
        small.score(make.hash_view(), "test")
    small.bind(make.model(max_length=64))
    view = make.hash_view()
    assert small.score(view, "test").value < 0.03
    assert max(rows for rows, _ in view.shapes) == 32
    lengths = [length for _, length in view.shapes]
    # Queries, then documents, each from short to long.
    assert sum(later < earlier for earlier, later in pairwise(lengths)) == 1
    assert max(lengths) == 64

    pool = small.pools["test"]
    single = {q: pool.documents[places[0]] for q, places in zip(pool.queries, pool.answers)}
    ids = make.tokenizer().encode
    answer = {tuple(ids([q], max_length=64)[0]): tuple(ids([d], max_length=64)[0]) for q, d in single.items()}
    knowing = make.hash_view(lambda row: make.hash_view.hashed(answer.get(row, row)))
    assert small.score(knowing, "test").value > 0.95


def test_training_batches_are_pairs(make: Any) -> None:
    small = task("retrieval/stdlib", pool=500, rows=4)
    small.bind(make.model(max_length=32))
    batches = list(small.batches("calibrate", seed=0, budget=3))
    again = list(small.batches("calibrate", seed=0, budget=3))
    other = list(small.batches("calibrate", seed=1, budget=3))
    assert len(batches) == 3
    assert set(batches[0].inputs) == {"query.tokens", "document.tokens"}
    assert batches[0].lengths["document.tokens"].shape == (4,)
    assert all(torch.equal(a.inputs["query.tokens"], b.inputs["query.tokens"]) for a, b in zip(batches, again))
    assert not torch.equal(batches[0].inputs["query.tokens"], other[0].inputs["query.tokens"])
    own = [*small.parts["calibrate"].queries, *small.parts["calibrate"].documents]
    texts = small.texts("calibrate")
    assert set(own) <= set(texts) and len(texts) > len(own)  # and functions without a summary, to heal on
    assert not set(texts) & {d for split in ("select", "test") for d in small.parts[split].documents}


# --- the user's own pairs -------------------------------------------------------------------------------------------


def write_pairs(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_own_pairs(tmp_path: Path, make: Any) -> None:
    rows = [{"question": f"how do I {i}?", "passage": f"do {i} like this {i}", "n": str(i)} for i in range(60)]
    rows += [{"question": "how do I 3?", "passage": "do 3 another way", "n": "3"}, {"question": " ", "passage": "x"}]
    made = task("retrieval", data=write_pairs(tmp_path / "pairs.jsonl", rows))
    assert made.name == "pairs.jsonl"
    assert made.pairs == 61
    said = "\n".join(made.describe())
    assert 'query: column "question" (guessed by its name; --query says another)' in said
    assert "1 rows skipped: empty query or document (line 62)" in said
    assert made.dropped == 0
    assert made.metric == f"mrr@10/{len(made.parts['test'].documents)}"
    both = [part for part in made.parts.values() if "how do I 3?" in part.queries]
    assert len(both) == 1 and len(both[0].answers[both[0].queries.index("how do I 3?")]) == 2
    made.bind(make.model())
    assert 0 <= made.score(make.hash_view(), "select").value <= 1
    backwards = task("retrieval", data=write_pairs(tmp_path / "again.jsonl", rows[::-1]))
    assert {s: set(p.queries) for s, p in backwards.parts.items()} == {s: set(p.queries) for s, p in made.parts.items()}


def test_own_pairs_complaints(tmp_path: Path, make: Any) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", [{"question": "a", "passage": "b"}, {"question": "", "passage": "c"}])
    with pytest.raises(DataError, match="1 pairs are too few for three splits"):
        task("retrieval", data=path)
    with pytest.raises(DataError, match=r"pairs.jsonl: empty query or document in line 2"):
        task("retrieval", data=path, strict=True)
    with pytest.raises(
        DataError, match=r'has no column "pasage"; did you mean "passage"\? \(columns: question, passage\)'
    ):
        task("retrieval", data=path, document="pasage")
    with pytest.raises(DataError, match="query and document are the same column"):
        task("retrieval", data=path, query="passage", document="passage")
    with pytest.raises(SpecError, match="similarity is 'cosine' or 'dot', not 'l2'"):
        task("retrieval/stdlib", similarity="l2")
    with pytest.raises(DataError, match=r"task retrieval/stdlib reads text, and toy has no tokenizer"):
        task("retrieval/stdlib").bind(make.model(tokenizer=None))
