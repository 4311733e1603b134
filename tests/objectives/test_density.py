"""Density loss: the soft count by hand, its gradient, which activations it hears, and what it adds."""

from __future__ import annotations

import pytest
import torch

from formwright.kit.errors import DataError, SpecError
from formwright.models.batch import Batch, pad
from formwright.models.build import build
from formwright.objectives.base import Gen
from formwright.objectives.causal_lm import CausalLM
from formwright.objectives.density import Density, activation_density, soft

ROWS = [[1, 2, 3, 4], [5, 6]]


def model(layers=None, activation: str = "relu"):
    mlp = {"part": "mlp", "hidden": 6, "activation": activation}
    layers = [{"part": "attention", "heads": 2, "causal": True}, mlp, mlp] if layers is None else layers
    stem = {"part": "token-embedding", "vocab": 9, "width": 8, "std": 0.5}
    return build({"stem": stem, "layers": layers, "head": {"part": "lm", "tied": True}}, seed=0)


def batch(rows=ROWS) -> Batch:
    tokens, lengths = pad(rows)
    return Batch(
        inputs={"tokens": tokens},
        lengths={"tokens": lengths},
        targets={"tokens": pad([[*row[1:], -100] for row in rows], -100)[0]},
    )


def by_hand(m, row: list[int], measured) -> float:
    """Mean over the two layers of the mean over tokens and units, for one row alone."""
    layers = []
    x, ctx = m.embed(torch.tensor([row]))
    for item in m.items():
        if hasattr(item.part, "up"):
            normed = x if item.norm is None else item.norm(x)
            layers.append(float(measured(item.part.activation(item.part.up(normed, ctx))).mean().detach()))
        x, ctx = item(x, ctx)
    assert len(layers) == 2
    return sum(layers) / 2


def test_soft_count_of_exact_zeros_and_its_gradient():
    a = torch.zeros(1000)
    a[:300] = torch.linspace(0.1, 2.0, 300)
    assert float(soft(a).mean()) == pytest.approx(0.3, abs=1e-4)
    assert float(soft(torch.tensor(1e-4), 1e-8)) == pytest.approx(0.5, rel=1e-5)
    x = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: soft(a, 1e-2), (x,))
    assert soft(torch.tensor(1e-4, dtype=torch.float16)).dtype == torch.float32
    assert float(soft(torch.tensor(3e-4, dtype=torch.float16))) > 0.4


def test_rows_weigh_as_their_items():
    m, whole = model(), batch()
    plain = CausalLM().loss({"model": m}, whole, Gen())["model"]
    loss = Density(weight=2.0, eps=1e-3).loss({"model": m}, whole, Gen())["model"]
    rows = [by_hand(m, row, lambda a: soft(a, 1e-3)) for row in ROWS]
    density = 3 * rows[0] + 1 * rows[1]
    assert float(loss.parts["density"]) == pytest.approx(density, rel=1e-5)
    assert float(loss.total.detach()) == pytest.approx(float(plain.total.detach()) + 2 * density, rel=1e-5)
    assert int(loss.count) == 4


def test_exact_density_counts_real_tokens_only():
    m = model()
    wanted = sum(by_hand(m, row, lambda a: (a != 0).float()) for row in ROWS) / 2
    assert activation_density(m, batch()) == pytest.approx(wanted, rel=1e-6)
    assert activation_density(m, batch(), tolerance=1e9) == 0.0


def test_weight_0_is_the_other_objective():
    m, whole = model(), batch()
    one = Density(weight=0.0).loss({"model": m}, whole, Gen())["model"]
    two = CausalLM().loss({"model": m}, whole, Gen())["model"]
    assert torch.equal(one.total, two.total) and set(one.parts) == set(two.parts)


def test_refusals():
    with pytest.raises(SpecError, match="eps=0"):
        Density(eps=0)
    with pytest.raises(SpecError, match="objective"):
        Density(objective="causal-ml")
    bare = model([{"part": "attention", "heads": 2, "causal": True}])
    with pytest.raises(SpecError, match="no part that declares its hidden activations"):
        Density().loss({"model": bare}, batch(), Gen())
    with pytest.raises(DataError, match="a row has no tokens"):
        Density().loss({"model": model()}, batch([[1, 2], []]), Gen())
