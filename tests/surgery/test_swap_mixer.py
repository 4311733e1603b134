"""Swapping mixers: a window of the whole length changes nothing, projections move, and what cannot be is refused."""

from __future__ import annotations

import pytest
import torch

import formwright as fw
from formwright.kit.errors import Refusal, SpecError
from formwright.surgery.samples import decoder, encoder, equal, reloaded, said, state


def test_attention_with_a_window_of_the_length_changes_nothing() -> None:
    for make in (encoder, decoder):
        before = said(make())
        after = said(fw.apply(make(), "swap-mixer", mixer="attention", options={"window": 64}))
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6)


def test_a_combiner_of_one_block_is_the_attention_it_replaces() -> None:
    model = encoder()
    before, values = said(model), state(model)
    fw.apply(model, "swap-mixer", keep_undo=True, mixer="combiner", options={"block": 64})
    for name, value in before.items():
        torch.testing.assert_close(said(model)[name], value, rtol=1e-5, atol=1e-6)
    assert equal(said(model), said(reloaded(model))) and equal(values, state(model))
    assert equal(before, said(fw.undo(model)))


def test_refusals() -> None:
    with pytest.raises(Refusal, match="grouped heads"):
        fw.plan(decoder(), "swap-mixer", mixer="combiner")
    with pytest.raises(Refusal, match="is causal"):
        fw.plan(decoder(), "swap-mixer", mixer="attention", options={"causal": False})
    with pytest.raises(SpecError, match="did you mean 'combiner'"):
        fw.plan(encoder(), "swap-mixer", mixer="combinr")
    with pytest.raises(SpecError, match="unknown item"):
        fw.plan(encoder(), "swap-mixer", mixer="combiner", where="b9.*")
