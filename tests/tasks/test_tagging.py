"""Labels of pieces: the kinds of Python tokens, pieces to labels by hand, and the score."""

from __future__ import annotations

import pytest
import torch

from formwright.kit.errors import DataError, SpecError
from formwright.models.build import build
from formwright.surgery import apply
from formwright.tasks._tagging import TaggingTask
from formwright.tasks.tagging_stdlib import KINDS, kinds
from formwright.training.start import with_head
from formwright.training.tokenizer import train_tokenizer

SOURCE = '''"""What it is."""
def f(x):  # a remark
    """Says."""
    y = [
        # between brackets
        "no docstring",
    ]
    return y[0] + f"{x}" if x else 12
'''


def test_kinds_of_python_tokens():
    found = [(SOURCE[a:b], kind) for a, b, kind in kinds(SOURCE)]
    assert found[:3] == [('"""What it is."""', "docstring"), ("def", "keyword"), ("f", "name")]
    assert ("# a remark", "comment") in found and ('"""Says."""', "docstring") in found
    assert ('"no docstring"', "string") in found and ("12", "number") in found and ("+", "operator") in found
    assert {kind for _, kind in found} == set(KINDS)
    assert [kind for _, _, kind in kinds("x = (1,\n")] == ["name", "operator", "operator", "number", "operator"]
    assert list(kinds("")) == [] and [(a, b) for a, b, _ in kinds("é = \x0c1\n")] == [(0, 1), (2, 3), (5, 6)]


class Pieces:
    """Pieces of two characters."""

    pad_id = 0
    size = 20

    def offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        spans = [(at, min(at + 2, len(text))) for at in range(0, len(text), 2)]
        return [1 + at % 19 for at in range(len(spans))], spans


def words(text: str):
    """Spans of letters, labelled by their case."""
    at = 0
    for word in text.split(" "):
        if word:
            yield at, at + len(word), "upper" if word.isupper() else "lower"
        at += len(word) + 1


def toy(**options) -> TaggingTask:
    parts = {split: ["ab CD  e", "FG"] for split in ("calibrate", "select", "test")}
    return TaggingTask("toy", parts, ["lower", "upper"], words, length=3, rows=2, **options)


def model(labels=("upper", "lower")):
    stem = {"part": "token-embedding", "vocab": 20, "width": 8}
    head = {"part": "token-classifier", "classes": 2, "labels": list(labels)}
    made = build({"stem": stem, "layers": [], "head": head}, seed=0)
    made.tokenizer = Pieces()
    return made


def test_a_piece_has_the_label_of_its_first_letter():
    made = toy()
    made.bind(model())
    # "ab", " C", "D ", " e": the model's classes are upper 0, lower 1
    (first, second) = made.tagged("ab CD  e")
    assert first.labels == [1, 0, 0] and second.labels == [1] and first.tokens == [1, 2, 3]
    assert made.tagged("a   ")[0].labels == [1, -100]
    assert made.chance == pytest.approx(3 / 5)


def test_score_and_batches():
    made, tagger = toy(), model()
    made.bind(tagger)
    with torch.no_grad():
        tagger.head().out.weight.zero_()
        tagger.head().out.bias.copy_(torch.tensor([1.0, 0.0]))
    score = made.score(tagger, "test")
    assert score.value == pytest.approx(3 / 5) and len(score.per_item) == 5
    assert made.baselines("test")["majority"].value == pytest.approx(3 / 5)
    drawn = list(made.batches("calibrate", seed=0, budget=4))
    assert [len(batch.inputs["tokens"]) for batch in drawn] == [2, 1, 2, 1]
    assert sorted(int((b.targets["label"] != -100).sum()) for b in drawn[:2]) != [0, 0]
    again = list(made.batches("calibrate", seed=0, budget=4))
    assert all(torch.equal(a.inputs["tokens"], b.inputs["tokens"]) for a, b in zip(drawn, again))


def test_training_gives_a_language_model_the_head():
    made, start = toy(), {"part": "token-embedding", "vocab": 300, "width": 8}
    language = build({"stem": start, "layers": [], "head": {"part": "lm", "tied": True}}, seed=0)
    language.tokenizer = train_tokenizer(["ab CD"], 300)
    with pytest.raises(DataError, match="token-classifier"):
        made.bind(language)
    headed = with_head(language, made)
    made.bind(headed)
    assert headed.labels == ["lower", "upper"] and with_head(headed, made) is headed
    pooled = apply(language, "head", kind="sequence-classifier", labels=["a", "b"])
    assert with_head(pooled, made).labels == ["lower", "upper"]


def test_refusals():
    with pytest.raises(SpecError, match="at least 1"):
        toy(limit=0)
    with pytest.raises(DataError, match='does not know the label "upper"'):
        toy().bind(model(("lower", "other")))
    with pytest.raises(DataError, match="no texts in test"):
        TaggingTask("toy", {"calibrate": ["a"], "select": ["a"], "test": []}, ["a"], words)
    with pytest.raises(DataError, match="not bound"):
        toy().tagged("a")
