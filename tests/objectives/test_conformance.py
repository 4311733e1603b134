"""Every registered objective: sums that do not depend on how a batch is cut, true gradients, layouts that agree.

``CASES`` has a small case in float64 for every name of the registry; a new objective without one fails.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from formwright import registry
from formwright.models.batch import Batch, pad
from formwright.models.build import build
from formwright.models.text import to_packed
from formwright.objectives._hidden import projections
from formwright.objectives._rows import take
from formwright.objectives.base import Gen, Objective, make
from formwright.objectives.multi_task import uncertainties
from formwright.training.recipe import make_objective

VOCAB = 13
ROWS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10], [11, 2]]


def model(head: Any = None, causal: bool = True, seed: int = 0, width: int = 8, heads: dict[str, Any] | None = None):
    spec = {
        "stem": {"part": "token-embedding", "vocab": VOCAB, "width": width, "std": 0.7},
        "layers": [{"part": "attention", "heads": 2, "causal": causal}, {"part": "mlp", "hidden": 12}],
        "final_norm": "layernorm",
        "head": heads or head or {"part": "lm", "tied": True},
    }
    return build(spec, seed=seed).double()


def pairs_of_towers():
    stem = {"part": "token-embedding", "vocab": VOCAB, "width": 8, "std": 0.7}
    block = {"defaults": {"norm": "rmsnorm"}, "final_norm": "rmsnorm"}
    mlp = {"part": "mlp", "hidden": 12}
    encoder = {"stem": stem, "layers": [{"part": "attention", "heads": 2}, mlp], "head": {"part": "states"}, **block}
    attention = {"part": "attention", "heads": 2, "causal": True}
    cross = {"part": "attention", "heads": 2, "memory": "encoder", "id": "cross"}
    decoder = {
        "stem": {"use": "encoder.stem", "width": 8},
        "layers": [attention, cross, mlp],
        "head": {"part": "lm", "tied": True},
        "memory": ["encoder"],
        **block,
    }
    return build({"towers": {"encoder": encoder, "decoder": decoder}}, seed=0).double()


def batch(rows=ROWS, **targets: Any) -> Batch:
    tokens, lengths = pad(rows)
    return Batch(inputs={"tokens": tokens}, lengths={"tokens": lengths}, targets=targets)


def following() -> Batch:
    return batch(tokens=pad([[*row[1:], -100] for row in ROWS], -100)[0])


def covered() -> Batch:
    """Rows with some tokens hidden already, so that no noise is drawn."""
    hidden = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)
    whole = batch()
    wanted = whole.inputs["tokens"].masked_fill(~hidden, -100)
    return whole.replace(inputs={"tokens": whole.inputs["tokens"].masked_fill(hidden, 12)}, targets={"tokens": wanted})


def translated() -> Batch:
    source, lengths = pad(ROWS)
    wanted, _ = pad([row[::-1] for row in ROWS], -100)
    return Batch(inputs={"encoder.tokens": source}, lengths={"encoder.tokens": lengths}, targets={"tokens": wanted})


def tagged() -> Batch:
    said = tuple({"task": name} for name in ("next", "sort", "next", "sort"))
    return following().replace(
        targets={"next.tokens": following().targets["tokens"], "sort.label": torch.tensor([-100, 2, -100, 0])},
        meta=said,
    )


SORT = {"name": "classification", "head": "sort"}
TASKS = {"next": {"name": "causal-lm", "head": "next"}, "sort": SORT}


def two_headed():
    return model(heads={"next": {"part": "lm", "tied": True}, "sort": {"part": "sequence-classifier", "classes": 3}})


@dataclass
class Case:
    """options: of the objective; models, batch: what it is called with; packs: whether it takes the packed layout."""

    options: dict[str, Any]
    models: Callable[[], dict[str, Any]]
    batch: Callable[[], Batch]
    packs: bool = True
    name: str = field(default="")


def one(**how: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"model": model(**how)}


def taught() -> dict[str, Any]:
    student, teacher = model(), model(seed=1, width=12)
    hidden = {"b0.attention": "b1.mlp"}
    return {"model": student, "teacher": teacher, "projection": projections(student, teacher, hidden).double()}


def balanced() -> dict[str, Any]:
    weights = uncertainties(list(TASKS)).double()
    torch.nn.init.normal_(weights.scales, generator=torch.Generator().manual_seed(0))
    return {"model": two_headed(), "weights": weights}


PROJECTED = {"hidden": {"b0.attention": "b1.mlp"}, "project": True, "temperature": 2.0, "hard": 0.3}
CASES = {
    "causal-lm": [Case({"smoothing": 0.1}, one(), following)],
    "classification": [
        Case(
            {"smoothing": 0.1},
            one(head={"part": "sequence-classifier", "classes": 3}, causal=False),
            lambda: batch(label=torch.tensor([0, 2, -100, 1])),
        ),
        Case(
            {"weights": [1.0, 2.0, 3.0]},
            one(head={"part": "token-classifier", "classes": 3}, causal=False),
            lambda: batch(label=pad([[t % 3 for t in row] for row in ROWS], -100)[0]),
        ),
    ],
    "contrastive": [Case({"temperature": 0.5}, one(head={"part": "mean-pool"}, causal=False), batch)],
    "density": [
        Case({"weight": 0.5, "eps": 1e-3}, one(), following),
        Case({"objective": {"name": "masked-lm", "mask": 12}, "eps": 1e-3}, one(causal=False), covered),
    ],
    "distillation": [
        Case({**PROJECTED, "hidden_kind": kind}, taught, following) for kind in ("relative", "mse", "cosine")
    ],
    "masked-lm": [Case({"mask": 12}, one(causal=False), covered)],
    "multi-task": [
        Case({"tasks": TASKS, "per": {"next": 3.0}, "weights": {"sort": 2.0}}, lambda: {"model": two_headed()}, tagged),
        Case({"tasks": TASKS, "balance": "uncertainty"}, balanced, tagged),
    ],
    "seq2seq": [Case({"smoothing": 0.1}, lambda: {"model": pairs_of_towers()}, translated, packs=False)],
}
EVERY = [pytest.param(name, case, id=f"{name}-{i}") for name, cases in CASES.items() for i, case in enumerate(cases)]


def made(name: str, case: Case) -> tuple[Objective, dict[str, Any], Batch]:
    objective, models, whole = make({"name": name, **case.options}), case.models(), case.batch()
    objective.bind(models)
    return objective, models, whole


def parameters(models: dict[str, Any], objective: Objective) -> list[Tensor]:
    moved = ["model", *(name for name, kind in objective.others.items() if kind == "trained")]
    return [p for name in moved for p in models[name].parameters()]


def carried(objective: Objective, models: dict[str, Any], pieces: list[Batch], gen: Gen) -> tuple[float, float, list]:
    """Summed total and count, and gradients, of backward passes over pieces."""
    held = parameters(models, objective)
    for p in held:
        p.grad = None
    sums = [0.0, 0.0]

    def back(losses: Any) -> None:
        losses["model"].total.backward()
        sums[0] += float(losses["model"].total.detach())
        sums[1] += float(losses["model"].count)

    for piece in pieces:
        objective.backward(models, piece, gen, back)
    return sums[0], sums[1], [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in held]


def close(one: tuple[float, float, list], two: tuple[float, float, list], tolerance: float = 2e-6) -> None:
    assert one[0] == pytest.approx(two[0], rel=tolerance) and one[1] == pytest.approx(two[1], rel=1e-9)
    for a, b in zip(one[2], two[2]):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_every_objective_has_a_case() -> None:
    assert set(CASES) == set(registry.names("objective"))


@pytest.mark.parametrize(("name", "case"), EVERY)
def test_cutting_a_batch_changes_nothing(name: str, case: Case) -> None:
    objective, models, whole = made(name, case)
    if not objective.additive:
        cut = [take(whole, [0, 1]), take(whole, [2, 3])]
        other = carried(objective, models, cut, Gen(3))
        assert other[0] != pytest.approx(carried(objective, models, [whole], Gen(3))[0], rel=1e-3)
        return
    wanted = carried(objective, models, [whole], Gen(3))
    for cut in ([[0, 1], [2, 3]], [[3], [0, 2], [1]]):
        close(carried(objective, models, [take(whole, rows) for rows in cut], Gen(3)), wanted)


@pytest.mark.parametrize(("name", "case"), [param for param in EVERY if param.values[1].packs])
def test_packed_rows_are_the_same_rows(name: str, case: Case) -> None:
    objective, models, whole = made(name, case)
    valid = torch.arange(5)[None] < whole.lengths["tokens"][:, None]
    flat = {key: v[valid][None] if v.shape == valid.shape else v for key, v in whole.targets.items()}
    packed = to_packed(whole).replace(targets=flat)
    close(carried(objective, models, [packed], Gen(3)), carried(objective, models, [whole], Gen(3)))
    if objective.additive:
        cut = [take(packed, [2, 0]), take(packed, [1, 3])]
        close(carried(objective, models, cut, Gen(3)), carried(objective, models, [whole], Gen(3)))


@pytest.mark.parametrize(("name", "case"), EVERY)
def test_gradients_are_those_of_the_loss(name: str, case: Case) -> None:
    """Along a random direction, in float64, against a central difference."""
    objective, models, whole = made(name, case)
    _, _, gradients = carried(objective, models, [whole], Gen(3))
    held, draw = parameters(models, objective), torch.Generator().manual_seed(1)
    way = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in held]
    size = sum(float((w * w).sum()) for w in way) ** 0.5
    step, ends = 1e-2, []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            moved = [p.clone() for p in held]
            for p, w in zip(held, way):
                p.add_(w, alpha=sign * step / size)
            ends.append(float(objective.loss(models, whole, Gen(3))["model"].total))
            for p, before in zip(held, moved):
                p.copy_(before)
    slope = (ends[0] - ends[1]) / (2 * step)
    stated = sum(float((w * g).sum()) for w, g in zip(way, gradients)) / size
    # Logits are summed in float32 somewhere: its last bit of a loss near 40 is 4e-6, over a step of 1e-2 that is 4e-4.
    assert slope == pytest.approx(stated, rel=2e-3, abs=1e-3)


@pytest.mark.parametrize(("name", "case"), EVERY)
def test_the_items_of_rows_sum_to_the_count(name: str, case: Case) -> None:
    objective, models, whole = made(name, case)
    if getattr(objective, "weights", None) and name == "classification":
        return  # weighed classes count as their weights, which no row carries
    count = objective.loss(models, whole, Gen(3))["model"].count
    assert float(objective.items(models, whole, Gen(3)).sum()) == pytest.approx(float(count))


@pytest.mark.parametrize(("name", "case"), EVERY)
def test_the_same_step_gives_the_same_bits_and_state_is_plain(name: str, case: Case) -> None:
    objective, models, whole = made(name, case)
    one, two = (objective.loss(models, whole, Gen(5))["model"].total for _ in range(2))
    assert torch.equal(one, two)
    assert set(make_objective(objective)[1]) <= {"name", *inspect.signature(type(objective)).parameters}
    state = json.loads(json.dumps(objective.state_dict()))
    again = make({"name": name, **json.loads(json.dumps(case.options))})
    again.load_state_dict(state)
    assert again.state_dict() == objective.state_dict()
