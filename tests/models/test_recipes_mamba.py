"""The Mamba recipes have the published numbers of parameters."""

from __future__ import annotations

import pytest

from formwright.models.build import build
from formwright.models.recipes import recipe


def count(spec: dict) -> int:
    return sum(p.numel() for p in build(spec, device="meta").parameters())


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("mamba-130m", 129_135_360),
        ("mamba-370m", 371_516_416),
        ("mamba-790m", 793_204_224),
        ("mamba-1.4b", 1_372_178_432),
        ("mamba-2.8b", 2_768_345_600),
        ("bimamba-s", 752_788_992),
    ],
)
def test_published_counts(name: str, published: int) -> None:
    assert count(recipe(name)) == published


def test_sharing_the_projections_saves_nearly_half() -> None:
    spec = recipe("bimamba-s")
    for width, layers, parameters in ((768, 24, 96_283_392), (1024, 48, 338_281_472), (2048, 48, 1_330_874_368)):
        assert count(recipe("bimamba-s", width=width, layers=layers)) == parameters
    mixer = {"part": "bidirectional", "mixer": {"part": "mamba", "depth": 48}}
    assert count({**spec, "layers": [{"repeat": 48, "layers": [mixer]}]}) == 1_432_266_240


def test_a_mamba_is_a_causal_stream() -> None:
    model = build(recipe("mamba-130m", vocab=50, width=32, layers=2, state=4), device="meta")
    assert model.causal and model.streams
    assert not build(recipe("bimamba-s", width=32, layers=2, state=4), device="meta").causal
