"""DeltaNet recipes: published counts, where hybrids attend, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from formwright.kit.errors import SpecError
from formwright.models.build import build
from formwright.models.recipes import recipe


def parameters(name: str, **sizes) -> int:
    return sum(p.numel() for p in build(recipe(name, **sizes), device="meta").parameters())


def attending(spec: dict) -> list[int]:
    return [index for index, block in enumerate(spec["layers"]) if block["layers"][0]["part"] == "attention"]


def test_published_counts() -> None:
    assert parameters("deltanet-340m") == 341_594_112
    assert parameters("deltanet-1.3b") == 1_365_677_056


def test_a_layer_of_attention_has_4_width_squared() -> None:
    delta = 4 * 1024**2 + 1024 * 8 + 12 * 1024 + 128
    for name, count in (("deltanet-window", 12), ("deltanet-global", 2)):
        assert parameters(name) == 341_594_112 - count * (delta - 4 * 1024**2)


def test_where_hybrids_attend() -> None:
    assert attending(recipe("deltanet-window")) == list(range(1, 24, 2))
    assert attending(recipe("deltanet-global")) == [1, 11]
    assert attending(recipe("deltanet-global", attention=[1, 12])) == [1, 12]
    assert attending(recipe("deltanet-global", layers=2)) == [0, 1]
    assert attending(recipe("deltanet-global", layers=1)) == [0]
    node = recipe("deltanet-window", attention=[0], kv_heads=2, window=7, theta=5.0)["layers"][0]["layers"][0]
    assert node["window"] == 7 and node["kv_heads"] == 2 and node["rotary"] == {"theta": 5.0}


def test_small_ones_run_and_stream() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    for name in ("deltanet-340m", "deltanet-window", "deltanet-global"):
        model = build(recipe(name, vocab=20, width=32, layers=2, heads=2, hidden=40))
        assert model.causal and model.streams
        assert model(ids).shape == (1, 5, 20)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(SpecError, match="must divide width"):
        recipe("deltanet-340m", heads=3)
    with pytest.raises(SpecError, match=r"no layer 9 among 4"):
        recipe("deltanet-global", layers=4, attention=[1, 9])
    with pytest.raises(SpecError, match=r"layer 1 stands twice"):
        recipe("deltanet-window", layers=4, attention=[1, 1])
