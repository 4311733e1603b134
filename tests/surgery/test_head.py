"""Heads come and go: beside the others or in their place, and what they replaced comes back."""

from __future__ import annotations

import pytest
import torch

import formwright as fw
from formwright.kit.errors import FormwrightError, SpecError
from formwright.surgery.samples import decoder, encoder, equal, reloaded, said, state, tokens


def test_a_named_head_stands_beside_the_others() -> None:
    model = encoder()
    before = said(model)
    fw.apply(model, "head", kind="sequence-classifier", labels=["yes", "no"], name="topic")
    found = said(model)
    assert list(found) == ["out", "topic"] and found["topic"].shape == (4, 2)
    assert torch.equal(found["out"], before["out"])
    assert model.heads["topic"].labels == ["yes", "no"]
    assert torch.equal(model(tokens(seed=5), head="topic"), found["topic"])
    assert equal(found, said(reloaded(model)))


def test_a_head_without_a_name_replaces_the_only_one() -> None:
    model = encoder()
    before, values = said(model), state(model)
    fw.apply(model, "head", kind="token-classifier", classes=5, keep_undo=True)
    assert list(model.heads) == ["out"] and said(model)["out"].shape == (4, 12, 5)
    fw.undo(model)
    assert equal(before, said(model)) and equal(values, state(model))


def test_a_causal_model_is_read_at_its_last_token() -> None:
    plan = fw.plan(decoder(), "head", kind="sequence-classifier", classes=2, name="topic")
    assert plan.decisions["head"]["pool"] == "last"
    given = fw.plan(decoder(), "head", kind="sequence-classifier", classes=2, name="topic", pool="mean")
    assert given.decisions["head"]["pool"] == "mean"
    assert "pool" not in fw.plan(encoder(), "head", kind="sequence-classifier", classes=2).decisions["head"]


def test_parameters_follow_from_seed_and_name() -> None:
    drawn = {}
    for name, seed in (("a", 0), ("a", 1), ("b", 0)):
        model = fw.apply(encoder(), "head", kind="sequence-classifier", classes=2, name=name, seed=seed)
        again = fw.apply(encoder(), "head", kind="sequence-classifier", classes=2, name=name, seed=seed)
        assert equal(state(model), state(again))
        drawn[name, seed] = model.slot(f"head.{name}:out").weight
    assert not torch.equal(drawn["a", 0], drawn["a", 1]) and not torch.equal(drawn["a", 0], drawn["b", 0])


def test_a_tied_head_shares_the_table() -> None:
    model = fw.apply(encoder(), "head", kind="lm", tied=True, name="words")
    assert said(model)["words"].shape == (4, 12, 40)
    with torch.no_grad():
        before = said(model)["words"]
        model.stem.tokens.weight.mul_(2.0)
    assert not torch.equal(said(model)["words"], before)
    assert sum(parameter.shape == (40, 32) for parameter in model.parameters()) == 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "say which kind: .*sequence-classifier"),
        ({"kind": "sequence-classifer", "classes": 2}, "did you mean 'sequence-classifier'"),
        ({"kind": "sequence-classifier", "classes": 2, "name": "a.b"}, "name"),
        ({"kind": "sequence-classifier", "clases": 2}, "did you mean 'classes'"),
    ],
)
def test_heads_that_make_no_sense(options: dict, words: str) -> None:
    model = encoder()
    before = state(model)
    with pytest.raises(FormwrightError, match=words):
        fw.apply(model, "head", **options)
    assert equal(before, state(model)) and not model.history


def test_which_of_several_heads_is_meant_must_be_said() -> None:
    model = fw.apply(encoder(), "head", kind="sequence-classifier", classes=2, name="topic")
    with pytest.raises(SpecError, match="heads out, topic: name the one to replace"):
        fw.apply(model, "head", kind="sequence-classifier", classes=3)
    fw.apply(model, "head", kind="sequence-classifier", classes=3, name="topic")
    assert said(model)["topic"].shape == (4, 3)
