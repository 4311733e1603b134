"""Masked tokens of held-out text: what is hidden is fixed, scores and baselines by hand."""

from __future__ import annotations

from math import log2
from typing import Any

import numpy as np
import pytest
import torch

from formwright.kit.errors import DataError, SpecError
from formwright.models.build import build
from formwright.tasks._mlm import MaskedTask
from formwright.tasks._ngrams import WEIGHT, Bigram
from formwright.training.tokenizer import train_tokenizer

DOCUMENTS = [(f"d{i}", f"def f{i}(x):\n    return x + {i}\n" * 3) for i in range(12)]


def bound(**options: Any) -> tuple[MaskedTask, Any]:
    made = MaskedTask("toy", DOCUMENTS, length=16, rows=4, **options)
    tokenizer = train_tokenizer([text for _, text in DOCUMENTS], 280, mask=True)
    stem = {"part": "token-embedding", "vocab": tokenizer.size, "width": 8}
    model = build({"stem": stem, "layers": [], "head": {"part": "lm", "tied": True}}, seed=0)
    model.tokenizer = tokenizer
    made.bind(model)
    return made, model


def test_windows_cover_the_text_and_hide_the_same_tokens_always():
    made, model = bound()
    again, _ = bound()
    text = made.parts["test"][0]
    cut = made._cut(text)
    assert [token for window in cut for token in window.tokens] == model.tokenizer.offsets(text)[0]
    assert sum(window.bytes for window in cut) == sum(sum(w.targets) for w in cut) == len(text.encode())
    for (window, hidden), (other, same) in zip(made.hidden("test"), again.hidden("test")):
        assert window == other and np.array_equal(hidden, same)
        assert hidden.sum() == max(1, round(0.15 * len(window.tokens)))
    assert made.fingerprint() == again.fingerprint() != bound(rate=0.3)[0].fingerprint()


def test_a_model_that_knows_nothing_pays_for_the_whole_vocabulary():
    made, model = bound()
    with torch.no_grad():
        model.stem.tokens.weight.zero_()
    score = made.score(model, "test")
    tokens = score.curves["tokens"].sum()
    assert score.value == pytest.approx(log2(model.tokenizer.size), rel=1e-5)
    assert score.extra["bits/byte"] == pytest.approx(score.value * float(tokens / score.curves["bytes"].sum()))
    assert made.resampled(score, np.arange(len(score.per_item))) == pytest.approx(score.value)
    assert made.resampled(score, np.array([0, 0])) == pytest.approx(score.value, rel=1e-5)


def test_hidden_tokens_are_behind_the_mask_and_training_batches_are_whole():
    made, model = bound()
    batch, wanted = made._covered(made.hidden("test")[:3])
    hidden = wanted != -100
    assert (batch.inputs["tokens"][hidden] == model.tokenizer.mask_id).all() and hidden.any(1).all()
    whole = next(made.batches("calibrate", seed=0, budget=1))
    assert not whole.targets and (whole.inputs["tokens"] != model.tokenizer.mask_id).all()


def test_counting_by_hand():
    counts = Bigram([[2, 3, 2, 3, 2, 4], []], 5)
    unigram = np.array([1, 1, 4, 3, 2]) / 11
    assert np.allclose(np.exp(-counts.nats(np.array([-1, -1]), np.array([2, 0]))), unigram[[2, 0]])
    after = [(2 + WEIGHT * unigram[3]) / (3 + WEIGHT), WEIGHT * unigram[2] / (0 + WEIGHT)]
    assert np.allclose(np.exp(-counts.nats(np.array([2, 4]), np.array([3, 2]))), after)
    assert counts.best(np.array([-1, 2, 3, 4])).tolist() == [2, 3, 2, 2]
    assert np.exp(-counts.nats(np.full(5, 2), np.arange(5))).sum() == pytest.approx(1.0)


def test_baselines_need_the_tokenizer_and_pairs_beat_single_tokens():
    assert MaskedTask("toy", DOCUMENTS, length=16).baselines("test") == {}
    found = bound()[0].baselines("test")
    assert found["bigram"].value < found["unigram"].value < log2(280)
    assert found["bigram"].extra["accuracy"] > found["unigram"].extra["accuracy"]


def test_refusals():
    made, model = bound()
    model.tokenizer = train_tokenizer(["abc"], 280)
    with pytest.raises(DataError, match="mask=ID"):
        made.bind(model)
    with pytest.raises(SpecError, match="rate=0"):
        bound(rate=0.0)
