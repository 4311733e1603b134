"""The small recipes: published sizes of their own, alike tensors, one causal and one not."""

import torch

from formwright.models.build import build
from formwright.models.recipes import recipe


def test_sizes_and_alike_tensors() -> None:
    models = [build(recipe(name), seed=None, device="meta") for name in ("small-causal", "small-masked")]
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in models]
    assert shapes[0] == shapes[1]
    assert all(sum(p.numel() for p in model.parameters()) == 1_066_112 for model in models)
    assert [model.causal for model in models] == [True, False]


def test_the_masked_one_sees_both_sides() -> None:
    for name, sees in (("small-causal", False), ("small-masked", True)):
        model = build(recipe(name, vocab=20, width=16, layers=1, heads=2), seed=0)
        one, two = (model(torch.tensor([[1, 2, last]]))[0, 0] for last in (3, 4))
        assert torch.equal(one, two) != sees
