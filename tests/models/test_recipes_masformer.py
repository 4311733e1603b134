"""MASFormer's recipe: published parameters, the layers asked for, and weights that fit a plain decoder's names."""

from __future__ import annotations

import pytest
import torch

from formwright.kit.errors import SpecError
from formwright.models.build import build
from formwright.models.recipes import recipe


def parameters(**sizes) -> int:
    return sum(p.numel() for p in build(recipe("masformer", **sizes), device="meta").parameters())


def test_published_count() -> None:
    assert parameters(positions=2048) == 1_315_575_808
    assert parameters() == 1_315_575_808 + 6144 * 2048
    assert parameters(positions=2048, full=24) == 1_315_575_808


def kinds(full: int | list[int]) -> list[str]:
    spec = recipe("masformer", vocab=20, width=16, layers=5, heads=2, positions=None, full=full, block=4)
    model = build(spec, seed=0)
    return [type(part).__name__ for name, part in model.parts() if name.endswith("attention")]


def test_layers_are_where_they_are_asked_for() -> None:
    near, every = "Local", "Attention"
    assert kinds(2) == [every, every, near, near, near]
    assert kinds([1, 4]) == [near, every, near, near, every]
    assert kinds(0) == [near] * 5 and kinds(5) == [every] * 5


def test_a_full_decoder_s_weights_load_and_short_texts_read_alike() -> None:
    sizes = {"vocab": 20, "width": 16, "layers": 3, "heads": 2, "positions": 40, "block": 8}
    full, mixed = (build(recipe("masformer", full=number, **sizes), seed=0) for number in (3, 1))
    mixed.load_state_dict(full.state_dict())
    ids = torch.randint(0, 20, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(mixed(ids[:, :8]), full(ids[:, :8]))
        assert not torch.allclose(mixed(ids), full(ids))


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(SpecError, match=r"full=\[1, 30\] names layer 30"):
        recipe("masformer", full=[1, 30])
    with pytest.raises(SpecError, match=r"local: block=0 must be at least 1"):
        build(recipe("masformer", block=0), device="meta")
