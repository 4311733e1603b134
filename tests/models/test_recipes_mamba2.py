"""Mamba-2 and its hybrids: published counts and patterns, and what cannot be spelled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formwright.kit.errors import SpecError
from formwright.models.build import build
from formwright.models.recipes import recipe
from formwright.models.recipes._pattern import allocated, stacked


def parameters(name: str, **sizes) -> int:
    return sum(p.numel() for p in build(recipe(name, **sizes), device="meta").parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    {
        "mamba2-130m": 128_989_632,
        "mamba2-370m": 368_346_624,
        "mamba2-780m": 780_161_280,
        "mamba2-1.3b": 1_343_757_312,
        "mamba2-2.7b": 2_702_599_680,
        "mamba2-hybrid-8b": 8_654_517_248,
        "mamba2-8b": 8_236_999_680,
        "mamba-8b": 8_148_783_104,
        "transformer-8b": 8_540_135_424,
    }.items(),
)
def test_published_counts(name: str, count: int) -> None:
    assert parameters(name) == count


def test_mamba_with_the_smaller_state() -> None:
    assert parameters("mamba-8b", state=16) == 7_994_642_432


def test_each_layer_of_the_hybrid() -> None:
    outside = parameters("mamba2-hybrid-8b", pattern="M") - 109_640_064
    for pattern, layer in {"M": 109_640_064, "*": 41_947_136, "-": 134_221_824}.items():
        assert parameters("mamba2-hybrid-8b", pattern=pattern) == outside + layer
    model = build(recipe("mamba2-hybrid-8b", pattern="M"), device="meta")
    assert model.slots()["b0.mamba2:in_proj"].out_features == 18_560


def test_published_patterns() -> None:
    large = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
    small = "M-M-M--M-*M-M-M-M--*M-M-M-M-*M--M-M-M-*M-M--M-M-"
    assert allocated(56, 0.08, 0.5) == large
    assert allocated(48, 0.08, 0.5) == small
    assert [large.count(letter) for letter in "M*-"] == [24, 4, 28]
    assert [small.count(letter) for letter in "M*-"] == [20, 4, 24]


@given(layers=st.integers(1, 90), attention=st.floats(0, 1), rest=st.floats(0, 1))
def test_shares_are_met(layers: int, attention: float, rest: float) -> None:
    mlp = (1 - attention) * rest
    heads, dense = round(layers * attention), round(layers * mlp)
    if heads + dense > layers:
        return
    pattern = allocated(layers, attention, mlp)
    assert len(pattern) == layers
    assert pattern.count("*") == heads and pattern.count("-") == dense


def test_what_cannot_be_spelled_is_refused() -> None:
    with pytest.raises(SpecError, match="'X' at place 2 is no layer here"):
        recipe("mamba2-hybrid-8b", pattern="M-X*")
    with pytest.raises(SpecError, match="'E' at place 1"):
        recipe("mamba2-hybrid-8b", pattern="ME")
    with pytest.raises(SpecError, match="needs one letter a layer"):
        stacked("", {"M": {"part": "mamba2"}})
    for shares in ((0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)):
        with pytest.raises(SpecError, match="sum to at most 1"):
            allocated(56, *shares)
    for wrong in ({"groups": 3}, {"head_width": 48}, {"state": 0}):
        with pytest.raises(SpecError, match="mamba2: "):
            build(recipe("mamba2-130m", width=64, layers=1, **wrong), device="meta")


def test_a_small_hybrid_generates_what_it_reads() -> None:
    """Fixed and growing slots side by side: token by token as in one pass."""
    from formwright.engine.state import State
    from formwright.models.batch import Batch

    spec = recipe(
        "mamba2-hybrid-8b", vocab=40, width=32, pattern="M-*M", heads=4, kv_heads=2, attention_width=8, state=8,
        head_width=16, groups=2,
    )  # fmt: skip
    model = build(spec, seed=0).double().eval()
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids)
        state = State(2)
        pieces = []
        for first, last in ((0, 4), (4, 5), (5, 9)):
            x, ctx = model.embed(Batch(inputs={"tokens": ids[:, first:last]}))
            x, ctx = model.run(x, ctx.replace(state=state))
            state.advance(None, last - first)
            pieces.append(model.read(x, ctx))
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)
