"""The routed perceptron: whole when all blocks are taken, and a sum over the taken ones otherwise."""

from __future__ import annotations

import pytest
import torch

from formwright import build
from formwright.kit.errors import SpecError
from formwright.parts.base import initialise
from formwright.parts.channels.mlp import MLP, GatedMLP
from formwright.parts.channels.routed_mlp import RoutedMLP
from formwright.parts.context import Context, Notes
from formwright.surgery import apply


def model(kind: str, slot: str | None = None):
    made = build(
        {
            "stem": {"part": "linear", "features": 8, "width": 16},
            "defaults": {"norm": "layernorm", "order": "pre"},
            "layers": [{"part": kind, "hidden": 32, "bias": True}],
        },
        seed=0,
    ).double()
    with torch.no_grad():
        made.item("b0." + kind).part.down.bias.normal_(generator=torch.Generator().manual_seed(1))
    if slot == "lora":
        apply(made, "lora", rank=2, where=["up", "down"])
    return made


def settled(made, value: float):
    """The router says ``value`` for every block and token."""
    part = next(part for _, part in made.parts())
    with torch.no_grad():
        part.router.weight.zero_()
        part.router.bias.fill_(torch.logit(torch.tensor(value)))
    return part


@pytest.mark.parametrize("kind", ["mlp", "gated-mlp"])
@pytest.mark.parametrize("slot", [None, "lora"])
def test_all_blocks_at_one_half_are_the_perceptron(kind, slot):
    made = model(kind, slot)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    before = made(x)
    apply(made, "spt", blocks=4, top=4)
    settled(made, 0.5)
    assert torch.allclose(made(x), before, atol=1e-12)


def test_a_token_gets_its_blocks_and_no_other():
    part = RoutedMLP(8, hidden=12, blocks=3, top=2, activation="relu")
    with torch.no_grad():
        initialise(part.double(), 0)
        for parameter in part.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    share = torch.sigmoid(part.router(x[0]))
    wanted = torch.zeros(5, 8, dtype=torch.float64)
    for token in range(5):
        for block in share[token].argsort(descending=True)[:2].tolist():
            c = 2 * share[token, block]
            hidden = torch.relu(c * part.up[block](x[0, token]))
            wanted[token] += part.down[block](c * hidden)
    assert torch.allclose(part(x, Context())[0], wanted, atol=1e-12)


def test_the_router_learns():
    part = RoutedMLP(8, hidden=12)
    initialise(part, 0)
    part(torch.randn(1, 50, 8), Context()).square().sum().backward()
    assert part.router.weight.grad.abs().min() > 0


def test_balance_is_least_where_blocks_are_taken_equally():
    part = RoutedMLP(4, hidden=8, blocks=2, top=1, balance=1.0).train()
    initialise(part, 0)

    def said(weight) -> float:
        with torch.no_grad():
            part.router.weight.copy_(torch.tensor(weight))
        notes = Notes()
        x = torch.tensor([[[5.0, 0, 0, 0], [-5.0, 0, 0, 0]]])
        part(x, Context(notes=notes))
        return float(notes.losses[0].detach())

    even, uneven = said([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]), said([[0.0, 0, 0, 0], [0, 0, 0, 0]])
    assert even == pytest.approx(1.0)
    assert said([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]) <= uneven


@pytest.mark.parametrize(
    ("options", "says"), [({"blocks": 5}, "blocks=5"), ({"top": 9}, "top=9"), ({"top": 0}, "top=0")]
)
def test_bad_options(options, says):
    with pytest.raises(SpecError, match=says):
        RoutedMLP(8, hidden=12, **options)


def test_activations_need_a_perceptron():
    assert MLP(8, hidden=8, activation="relu").activation_name == "relu"
    assert GatedMLP(8, hidden=8, activation="gelu").activation_name == "gelu"
