"""Multi-task learning: weights by hand, uncertainties that settle, averages of windows, and PCGrad on toy gradients."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from formwright.kit.errors import DataError, SpecError
from formwright.models.batch import Batch, pad
from formwright.models.build import build
from formwright.objectives._balance import Average
from formwright.objectives._rows import take
from formwright.objectives._surgery import projected, shared
from formwright.objectives.base import Gen
from formwright.objectives.causal_lm import CausalLM
from formwright.objectives.classification import Classification
from formwright.objectives.multi_task import MultiTask, uncertainties
from formwright.training import train

ROWS = [[1, 2, 3, 4], [5, 6], [7, 1, 2]]
TASKS = {"next": {"name": "causal-lm", "head": "next"}, "sort": {"name": "classification", "head": "sort"}}


def model():
    heads = {
        "next": {"part": "lm", "tied": True},
        "sort": {"part": "sequence-classifier", "classes": 3, "pool": "last"},
    }
    layers = [{"part": "attention", "heads": 2, "causal": True}, {"part": "mlp", "hidden": 12}]
    stem = {"part": "token-embedding", "vocab": 9, "width": 8, "std": 0.5}
    return build({"stem": stem, "layers": layers, "head": heads}, seed=0)


def batch(names=("next", "sort", "next")) -> Batch:
    tokens, lengths = pad(ROWS)
    return Batch(
        inputs={"tokens": tokens},
        lengths={"tokens": lengths},
        targets={
            "next.tokens": pad([[*row[1:], -100] for row in ROWS], -100)[0],
            "sort.label": torch.tensor([0, 2, 1]),
        },
        meta=tuple({"task": name} for name in names),
    )


def apart(m, whole: Batch) -> tuple[float, float]:
    """The two tasks' own sums."""
    rows = take(whole, [0, 2])
    one = CausalLM(head="next").loss({"model": m}, rows.replace(targets={"tokens": rows.targets["next.tokens"]}), Gen())
    row = take(whole, [1])
    two = Classification(head="sort").loss(
        {"model": m}, row.replace(targets={"label": row.targets["sort.label"]}), Gen()
    )
    return float(one["model"].total.detach()), float(two["model"].total.detach())


def test_each_row_is_lost_by_its_own_task():
    m, whole = model(), batch()
    first, second = apart(m, whole)
    loss = MultiTask(TASKS, weights={"sort": 3.0}, per={"next": 2.0}).loss({"model": m}, whole, Gen())["model"]
    assert float(loss.total.detach()) == pytest.approx(first / 2 + 3 * second, rel=1e-6)
    assert float(loss.count) == pytest.approx((3 + 2) / 2 + 1)
    only = MultiTask(TASKS).loss({"model": m}, batch(("sort",) * 3), Gen())["model"]
    assert set(only.parts) == {"sort"} and float(only.count) == 3


def test_uncertainty_by_hand_and_where_it_settles():
    m, whole, weights = model(), batch(), uncertainties(list(TASKS))
    first, second = apart(m, whole)
    with torch.no_grad():
        weights.scales.copy_(torch.tensor([0.4, -1.0]))
    objective = MultiTask(TASKS, balance="uncertainty")
    loss = objective.loss({"model": m, "weights": weights}, whole, Gen())["model"]
    wanted = (math.exp(-0.4) * first + 0.4 * 5 + math.exp(1.0) * second - 1.0 * 1) / 2
    assert float(loss.total.detach()) == pytest.approx(wanted, rel=1e-5)
    # On constant losses exp(s) settles at the mean loss, so the weights exp(-s) stand as the inverse of the losses.
    scales = uncertainties(["a", "b"], rate=5.0)
    moved = torch.optim.Adam(scales.parameters(), lr=0.02)
    for _ in range(300):
        moved.zero_grad()
        sum(0.5 * (torch.exp(-scales.s(n)) * mean + scales.s(n)) for n, mean in (("a", 4.0), ("b", 0.5))).backward()
        moved.step()
    assert float(torch.exp(scales.s("b") - scales.s("a")).detach()) == pytest.approx(0.125, rel=1e-2)


def test_averages_follow_how_fast_tasks_improve_and_resume():
    one, zero = torch.tensor(1.0), {"model": None}
    average = Average(["a", "b"], window=2, temperature=2.0)
    losses = {"a": [4.0, 4.0, 2.0, 2.0, 1.0], "b": [4.0, 4.0, 4.0, 4.0, 1.0]}
    found = {}
    for step in range(5):
        for name in "ab":
            found[step, name] = float(average(name, torch.tensor(losses[name][step]), one, zero, step))
    assert found[3, "a"] == 2.0 and found[3, "b"] == 4.0  # two windows must be over
    shares = [math.exp(0.5 / 2), math.exp(1.0 / 2)]
    assert found[4, "a"] == pytest.approx(2 * shares[0] / sum(shares), rel=1e-6)
    assert found[4, "b"] == pytest.approx(2 * shares[1] / sum(shares), rel=1e-6)
    again = Average(["a", "b"], 2, 2.0)
    again.load_state_dict(average.state_dict())
    assert again.weights(2) == average.weights(2) and again.weights(3) == average.weights(3)
    assert average.weights(9) == {"a": 1.0, "b": 1.0}


def test_pcgrad_by_hand():
    draw = torch.Generator().manual_seed(0)
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    own = torch.tensor([3.0])
    (first, second), share = projected([[one, own], [two, None]], draw)
    torch.testing.assert_close(first[0], torch.tensor([0.5, 0.5]))  # (1, 0) + (1 / 2) (-1, 1)
    torch.testing.assert_close(second[0], torch.tensor([0.0, 1.0]))
    assert float(first[0] @ two) >= 0 and float(second[0] @ one) >= 0
    assert share == 1.0 and first[1] is own and second[1] is None
    places, summed = shared([first, second])
    assert places == [0, 1] and torch.equal(summed[0], first[0] + second[0]) and summed[1] is own
    kept, none = projected([[one], [torch.tensor([2.0, 5.0])]], draw)
    assert none == 0.0 and torch.equal(kept[0][0], one)
    assert projected([[one]], draw) == ([[one]], 0.0)


def test_pcgrad_changes_gradients_of_opposed_tasks_only():
    m, whole = model(), batch()
    for names, changes in ((("next", "sort", "next"), True), (("sort",) * 3, False)):
        gradients = []
        for surgery in (None, "pcgrad"):
            m.zero_grad()
            objective = MultiTask(TASKS, surgery=surgery)
            given = whole.replace(meta=batch(names).meta)
            losses = objective.backward({"model": m}, given, Gen(1), lambda found: found["model"].total.backward())
            gradients.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
            assert objective.additive == (surgery is None)
        conflict = float(losses["model"].parts["conflicts"])
        same = all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients))
        assert same == (conflict == 0.0)
        assert changes or same


def test_a_run_trains_the_weights_and_keeps_them(tmp_path):
    weights = uncertainties(list(TASKS))
    out = tmp_path / "run"
    objective = MultiTask(TASKS, balance="uncertainty")
    train(model(), [batch()], objective=objective, others={"weights": weights}, steps=2, lr=1e-2, show=False, out=out)
    assert bool((weights.scales.detach().abs() > 0).all())
    kept = load_file(out / "steps" / "000002" / "models.safetensors")
    assert torch.equal(kept["weights.scales"], weights.scales)


def test_refusals():
    for options in (
        {"tasks": {}},
        {"tasks": TASKS, "balance": "even"},
        {"tasks": TASKS, "surgery": "cagrad"},
        {"tasks": TASKS, "weights": {"sorts": 1.0}},
        {"tasks": TASKS, "per": {"sort": 0.0}},
        {"tasks": {"a": "causal-ml"}},
        {"tasks": TASKS, "balance": "average", "window": 0},
    ):
        with pytest.raises(SpecError):
            MultiTask(**options)
    with pytest.raises(DataError, match="row 1 is of task 'sorted'"):
        MultiTask(TASKS).loss({"model": model()}, batch(("next", "sorted", "next")), Gen())
    with pytest.raises(DataError, match="does not say which task"):
        MultiTask(TASKS).loss({"model": model()}, batch().replace(meta=()), Gen())
    with pytest.raises(DataError, match="others="):
        MultiTask(TASKS, balance="uncertainty").bind({"model": model()})
