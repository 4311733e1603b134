"""Recipes: published parameter counts, sizes that are honoured, and errors that name the nearest size."""

from __future__ import annotations

import pytest
import torch

from formwright import registry
from formwright.kit.errors import SpecError
from formwright.models.build import build
from formwright.models.recipes import recipe
from formwright.spec import ModelSpec


def parameters(name: str, **sizes) -> int:
    return sum(p.numel() for p in build(recipe(name, **sizes), device="meta").parameters())


def test_published_counts():
    assert parameters("gpt2-small") == 124_439_808
    body = parameters("bert-base", head={"part": "states"})
    assert body == 108_891_648
    assert body + 768 * 768 + 768 == 109_482_240  # with the pooler, as published
    assert parameters("bert-base") == 109_514_298  # the masked-language model
    assert parameters("gpt2-small", width=1024, layers=24, heads=16) == 354_823_168  # GPT-2 medium
    assert parameters("bert-mini", head={"part": "states"}) + 256 * 256 + 256 == 11_170_560


@pytest.mark.parametrize("name", registry.names("recipe"))
def test_every_recipe_is_plain_data_and_builds(name):
    spec = recipe(name)
    assert ModelSpec.from_json(ModelSpec.from_dict(spec).to_json()).to_dict() == ModelSpec.from_dict(spec).to_dict()
    build(spec, device="meta")


def test_gpt_tiny_counts_as_its_docstring_says_and_runs():
    width, layers, hidden, vocab = 64, 3, 192, 300
    expected = vocab * width + layers * (4 * width**2 + 3 * width * hidden + 2 * width) + width
    assert parameters("gpt-tiny", width=width, layers=layers, heads=4, vocab=vocab) == expected
    model = build(recipe("gpt-tiny", width=32, layers=1, heads=2, kv_heads=1, vocab=50, hidden=40, dropout=0.1))
    assert model.causal and model.streams
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 50)


def test_what_is_wrong_is_said():
    with pytest.raises(SpecError, match=r"unknown size 'widht'; did you mean 'width'"):
        recipe("gpt-tiny", widht=3)
    with pytest.raises(SpecError, match=r"must divide width"):
        recipe("gpt-tiny", width=30, heads=8)
    with pytest.raises(SpecError, match=r"gpt-tiny"):
        recipe("gpt-tinny")
