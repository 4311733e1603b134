"""Contrastive learning: InfoNCE by hand, and a gradient cache that gives the whole batch's gradients."""

from __future__ import annotations

import math

import pytest
import torch

from formwright.kit.errors import DataError, SpecError
from formwright.models.batch import Batch, pad
from formwright.models.build import build
from formwright.models.text import to_packed
from formwright.objectives.base import Gen, carrying
from formwright.objectives.contrastive import Contrastive, info_nce, similarity

ROWS = [[1, 2, 3], [4, 5], [6], [7, 8, 1], [2, 2], [3]]


def model(dropout: float = 0.0, seed: int = 0):
    stem = {"part": "token-embedding", "vocab": 9, "width": 8, "std": 0.5}
    layers = [{"part": "attention", "heads": 2}, {"part": "mlp", "hidden": 12, "dropout": dropout}]
    return build({"stem": stem, "layers": layers, "head": {"part": "mean-pool"}}, seed=seed).double()


def batch(rows=ROWS) -> Batch:
    tokens, lengths = pad(rows)
    return Batch(inputs={"tokens": tokens}, lengths={"tokens": lengths})


def went(objective: Contrastive, m, whole: Batch) -> tuple[float, float, float, list]:
    m.zero_grad()
    sums = [0.0, 0.0, 0.0]

    def back(losses) -> None:
        loss = losses["model"]
        loss.total.backward()
        for place, value in enumerate((loss.total, loss.count, loss.parts.get("accuracy", 0.0))):
            sums[place] += float(torch.as_tensor(value).detach())

    objective.backward({"model": m}, whole, Gen(1), back)
    return (*sums, [p.grad.clone() for p in m.parameters()])


def test_by_hand():
    u = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    v = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    scores = similarity(u, v) / 0.5
    torch.testing.assert_close(scores, torch.tensor([[2.0, 1.2], [0.0, 1.6]]))
    rows = math.log(1 + math.exp(1.2 - 2.0)) + math.log(1 + math.exp(0.0 - 1.6))
    columns = math.log(1 + math.exp(0.0 - 2.0)) + math.log(1 + math.exp(1.2 - 1.6))
    assert float(info_nce(scores, False)) == pytest.approx(rows, rel=1e-6)
    assert float(info_nce(scores, True)) == pytest.approx((rows + columns) / 2, rel=1e-6)
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: info_nce(similarity(x, x.roll(1, 1)) / 0.3, True), (x,))
    assert float(info_nce(similarity(u[:1], v[:1]), True)) == 0.0  # one pair has nothing to be told from
    assert similarity(torch.zeros(1, 2), v).tolist() == [[0.0, 0.0]]


def test_rows_are_pairs_of_neighbours():
    m, whole = model(), batch()
    vectors = m(whole)
    wanted = info_nce(similarity(vectors[0::2], vectors[1::2]) / 0.5, True)
    loss = Contrastive(0.5).loss({"model": m}, whole, Gen())["model"]
    assert float(loss.total.detach()) == pytest.approx(float(wanted.detach())) and int(loss.count) == 3


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("layout", [lambda b: b, to_packed])
def test_the_gradient_cache_gives_the_gradients_of_the_whole_batch(chunk, layout):
    m, whole = model(), layout(batch())
    one, two = went(Contrastive(0.5), m, whole), went(Contrastive(0.5, chunk=chunk), m, whole)
    assert one[:3] == pytest.approx(two[:3])
    for a, b in zip(one[3], two[3]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_chunks_draw_the_same_noise_in_both_passes():
    m = model(dropout=0.5).train()
    one, two = (went(Contrastive(0.5, chunk=1), m, batch()) for _ in range(2))
    assert one[0] == two[0] and all(torch.equal(a, b) for a, b in zip(one[3], two[3]))


def test_two_towers():
    tower = {
        "stem": {"part": "token-embedding", "vocab": 9, "width": 8, "std": 0.5},
        "layers": [{"part": "mlp", "hidden": 12}],
        "head": {"part": "mean-pool"},
    }
    system = build({"towers": {"query": tower, "document": tower}}, seed=0).double()
    sides = [pad(ROWS[side::2]) for side in (0, 1)]
    names = ("query", "document")
    whole = Batch(
        inputs={f"{name}.tokens": tokens for name, (tokens, _) in zip(names, sides)},
        lengths={f"{name}.tokens": lengths for name, (_, lengths) in zip(names, sides)},
    )
    objective = Contrastive(0.5, towers=names)
    objective.bind({"model": system})
    one, two = went(objective, system, whole), went(Contrastive(0.5, towers=names, chunk=2), system, whole)
    assert one[:3] == pytest.approx(two[:3]) and one[1] == 3
    for a, b in zip(one[3], two[3]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_carrying_hands_gradients_on():
    x, g = torch.ones(3, requires_grad=True), torch.tensor([1.0, -2.0, 0.5])
    total = carrying(torch.tensor(7.0), [x], [g])
    total.backward()
    assert float(total.detach()) == 7.0 and torch.equal(x.grad, g)


def test_refusals():
    for options in ({"temperature": 0.0}, {"chunk": 0}, {"towers": ["query"]}):
        with pytest.raises(SpecError):
            Contrastive(**options)
    with pytest.raises(DataError, match="odd number"):
        Contrastive().loss({"model": model()}, batch(ROWS[:3]), Gen())
    with pytest.raises(DataError, match="head of kind vectors"):
        Contrastive().bind(
            {"model": build({"stem": {"part": "token-embedding", "vocab": 9, "width": 8}, "layers": []})}
        )
    with pytest.raises(DataError, match="those of a system"):
        Contrastive(towers=["a", "b"]).loss({"model": model()}, batch(), Gen())
