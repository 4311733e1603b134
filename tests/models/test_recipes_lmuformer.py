"""LMUFormer's recipes: the published parameter counts and products, and models that run."""

from __future__ import annotations

import pytest
import torch

from formwright.models.build import build
from formwright.models.recipes import recipe
from formwright.parts.base import Shape


@pytest.mark.parametrize(
    ("name", "count"),
    (
        ("lmuformer", 1_621_796),
        ("spiking-lmuformer", 1_689_894),
        ("lmu-psmnist", 166_798),
        ("spiking-lmu-psmnist", 166_092),
    ),
)
def test_published_counts(name: str, count: int) -> None:
    made = build(recipe(name), device="meta")
    assert sum(p.numel() for p in made.parameters()) == count == made.cost(Shape.full(1, 8)).parameters


@pytest.mark.parametrize("name", ("lmuformer", "spiking-lmuformer"))
def test_products_of_the_convolutions(name: str) -> None:
    made = build(recipe(name), device="meta")
    convolutions = [
        slot for address, slot in made.slots().items() if ":cell." not in address and not address.startswith("head")
    ]
    assert sum(slot.cost(Shape.full(1, 128)).macs for slot in convolutions) == 188_743_680


def test_pixels_run_and_stream() -> None:
    from formwright.engine.state import State

    for name in ("lmu-psmnist", "spiking-lmu-psmnist"):
        made, values = build(recipe(name, width=12, memory=10, theta=20)).double(), torch.rand(2, 30, 1).double()
        whole, state = made(values), State(2)
        made(values[:, :17], state=state)
        torch.testing.assert_close(made(values[:, 17:], state=state), whole)
