"""AdaLoRA's budget and diff pruning's projection, carried out by training itself and resumed to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import formwright as fw
from formwright.kit.errors import SpecError
from formwright.surgery.adapt._changes import held
from formwright.surgery.adapt.adalora import Budget
from formwright.surgery.base import Plan
from formwright.training.companions import companions

SPEC: dict[str, Any] = {
    "stem": {"part": "token-embedding", "vocab": 5, "width": 16},
    "layers": [{"repeat": 2, "layers": [{"part": "attention", "heads": 2}, {"part": "mlp", "hidden": 24}]}],
    "head": {"part": "sequence-classifier", "classes": 2, "pool": "mean"},
}


@fw.task.generated("parity-of-first", vocabulary=5, classes=2)
def first(rng: np.random.Generator, length: int) -> tuple[np.ndarray, int]:
    tokens = rng.integers(1, 5, length)
    return tokens, int(tokens[0] > 2)


def trained(model: Any, steps: int = 30, **more: Any) -> Any:
    task = first(length=6, size=64)
    fw.train(model, task, objective="classification", steps=steps, lr=1e-2, show=False, **more)
    return model


def plan_of(model: Any) -> Plan:
    return Plan.from_dict(next(entry.data for entry in model.history if entry.kind == "surgery"))


def test_adalora_ends_with_exactly_its_budget() -> None:
    model = fw.apply(fw.build(SPEC), "adalora", rank=6, target=2, every=2, train="heads.*")
    changes = held(model, plan_of(model))
    assert all(not change.E.any() for change in changes.values())  # type: ignore[union-attr]
    trained(model)
    alive = [int((change.E != 0).sum()) for change in changes.values()]  # type: ignore[union-attr]
    assert sum(alive) == 2 * len(changes) and set(alive) != {2}, "ranks are given where they are needed"


def test_the_budget_falls_along_a_cube() -> None:
    model = fw.apply(fw.build(SPEC), "adalora", rank=6, target=2, begin=0.2, end=0.3)
    budget = Budget(model, plan_of(model))
    whole, least = 6 * len(budget.changes), 2 * len(budget.changes)
    assert [budget.wanted(p) for p in (0.0, 0.2, 0.7, 1.0)] == [whole, whole, least, least]
    assert budget.wanted(0.45) == least + (whole - least) // 8


def test_orthogonality_is_part_of_the_loss() -> None:
    model = fw.apply(fw.build(SPEC), "adalora", rank=3, target=2, orthogonality=0.5).train()
    from formwright.parts.context import Notes

    notes = Notes()
    model(torch.tensor([[1, 2, 3]]), notes=notes, seed=0)
    changes: Any = held(model, plan_of(model)).values()
    eye = torch.eye(3)
    wanted = [(c.A @ c.A.T - eye).norm() + (c.B.T @ c.B - eye).norm() for c in changes]
    torch.testing.assert_close(sum(notes.losses), 0.5 * sum(wanted) / (2 * len(wanted)))


@pytest.mark.parametrize("keep", [0.01, 0.2])
def test_diff_pruning_ends_with_exactly_its_share(keep: float) -> None:
    model = fw.apply(fw.build(SPEC), "diff-pruning", keep=keep, where=["q", "up"])
    changes: Any = held(model, plan_of(model)).values()
    trained(model, dropout=False)
    entries = sum(change.w.numel() for change in changes)
    left = sum(int((change.difference() != 0).sum()) for change in changes)
    assert left == int(keep * entries)
    assert sum(int((change.w != 0).sum()) for change in changes) == left


@pytest.mark.parametrize("name", ["adalora", "diff-pruning"])
def test_killed_and_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rank": 3, "target": 1, "every": 3} if name == "adalora" else {"keep": 0.05}

    def made() -> Any:
        return fw.apply(fw.build(SPEC), name, **options)

    whole = trained(made(), 12)

    class Stop(fw.training.hooks.Hook):  # type: ignore[name-defined]
        def stepped(self, run: Any) -> None:
            if run.step == 7 and not self.resumed:
                raise KeyboardInterrupt

    stop = Stop()
    stop.resumed = False  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        trained(made(), 12, out=tmp_path / "run", save_every=3, hooks=[stop])
    stop.resumed = True  # type: ignore[attr-defined]
    again = trained(made(), 12, out=tmp_path / "run", save_every=3, hooks=[stop], resume=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_what_a_schedule_cannot_be_is_said_at_once() -> None:
    model = fw.build(SPEC)
    for options, words in (
        ({"begin": 0.6, "end": 0.4}, "leave no time in which the budget could fall"),
        ({"rank": 4, "target": 5}, "target=5 is more than rank=4"),
        ({"every": 0}, "every=0 must be a whole number"),
        ({"target": 0}, "target=0 must be a whole number"),
    ):
        with pytest.raises(SpecError, match=words):
            fw.plan(model, "adalora", **options)
    with pytest.raises(SpecError, match="is a share, at most 1"):
        fw.plan(model, "diff-pruning", keep=2)


def test_a_merged_or_dropped_adapter_asks_for_nothing_more() -> None:
    model = fw.apply(fw.build(SPEC), "adalora", rank=3, target=1)
    assert companions(model)
    fw.apply(model, "merge")
    assert not companions(model)
    trained(model, 2)
