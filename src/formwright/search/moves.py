"""Moves: what a search may do to a model, what each would save, and what each would cost in quality.

Structural moves drop one sublayer; what they save is measured (the item's own time on the workload) or, where the
target is not time, stated in closed form; what they cost is the distance of the outputs to the original's on the
*calibrate* texts, restarted from the activation before the item (see :mod:`formwright.surgery.compress.finercut`).
Precision moves come last, after healing, since they need no training: each surgery offers its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from formwright.measure.timing import alternate
from formwright.measure.workload import Workload
from formwright.models.batch import Batch
from formwright.models.text import packed
from formwright.surgery import Plan, surgery
from formwright.surgery.compress._search import without
from formwright.surgery.compress.finercut import candidate_distances

#: Tokens of the calibrate texts on which items are timed.
TIMED = 4096


@dataclass(frozen=True)
class Move:
    """Dropping ``item``: ``distance`` of the outputs afterwards, ``gain`` as a share of the original's cost."""

    item: str
    distance: float
    gain: float

    @property
    def price(self) -> float:
        """Distance per share of cost saved: the cheapest move goes first."""
        return self.distance / max(self.gain, 1e-9)


def drop_plan(model: Any, items: list[str]) -> Plan:
    """The plan that drops exactly these items."""
    by = surgery("finercut")
    return by.made(model, {"drop": len(items)}, {"drop": items})


def sparing(precision: list[dict[str, Any]], items: list[str]) -> list[dict[str, Any]]:
    """The same precision moves; those that can leave ``items`` as they are."""
    able = [surgery(step["surgery"]).sparing(step["options"], items) is not None for step in precision]
    return [{**step, "spared": items} if can else step for step, can in zip(precision, able)]


def options_of(step: dict[str, Any], model: Any = None) -> dict[str, Any]:
    """The options of a precision move with what it spares; for a model that may lack some of that, what it has."""
    spared = [id for id in step.get("spared", ()) if model is None or not model.item(id).dropped]
    return (surgery(step["surgery"]).sparing(step["options"], spared) if spared else None) or step["options"]


def price(
    original: Any, current: Any, gains: dict[str, float], texts: list[str], without: set[str], tokens: int = 128
) -> list[Move]:
    """Every drop still possible, the cheapest per share of cost first: one greedy step of FinerCut on ``texts``."""
    distances = candidate_distances(current, [], texts, reference=original, batch=16, max_length=tokens)
    found = [Move(id, far, gains[id]) for id, far in distances.items() if id not in without and gains.get(id, 0.0) > 0]
    return sorted(found, key=lambda move: move.price)


def losses(
    model: Any, items: list[str], score: Callable[[Any], float], kept: Callable[[float, float], float]
) -> dict[str, float]:
    """The share of a score that is lost when each item alone is dropped; below zero where it rises."""
    base = score(model)
    found = {}
    for id in items:
        with without([model.item(id)]):
            found[id] = 1.0 - kept(score(model), base)
    return found


def item_gains(model: Any, target: str, load: Workload, texts: list[str]) -> dict[str, float]:
    """Share of the whole cost that each droppable item stands for."""
    items = model.residuals()
    if target == "macs":
        total = model.cost(load.shape).macs
        return {item.id: item.cost(load.shape).macs / total for item in items}
    if target == "size":
        total = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        return {
            item.id: sum(t.numel() * t.element_size() for t in (*item.parameters(), *item.buffers())) / total
            for item in items
        }
    if target == "memory":
        total_cost = model.cost(load.shape)
        total = total_cost.parameters * 4 + total_cost.state_bytes
        return {
            item.id: (item.cost(load.shape).parameters * 4 + item.cost(load.shape).state_bytes) / total
            for item in items
        }
    return timed_gains(model, load, texts)


def timed_gains(model: Any, load: Workload, texts: list[str], rounds: int = 3) -> dict[str, float]:
    """Each item's own time over the time of the whole pass, in one alternating run.

    A decoding workload is dominated by reading weights, so there the share of bytes stands for the share of time.
    """
    droppable = model.residuals()
    top = list(model.items())
    inside = {item.id for item in droppable} - {item.id for item in top}
    if load.unit == "token" or inside or not texts:
        return item_gains(model, "size", load, texts)
    with torch.inference_mode():
        x, ctx = model.embed(sample(model, texts))
        starts = {}
        runs: dict[str, Any] = {}
        for item in top:
            starts[item.id] = (x, ctx)
            x, ctx = item(x, ctx)
        last = (x, ctx)
        for item in top:
            runs[item.id] = lambda item=item: item(*starts[item.id])
        runs["rest"] = lambda: (model.embed(sample(model, texts)), model.read(*last))
        times = {name: timing.median for name, timing in alternate(runs, rounds=rounds).items()}
    total = sum(times.values())
    return {item.id: times[item.id] / total for item in droppable}


def sample(model: Any, texts: list[str]) -> Batch:
    """Some of the texts as one packed batch of about ``TIMED`` tokens."""
    rows: list[list[int]] = []
    for row in model.tokenizer.encode(texts, max_length=model.limit):
        if rows and sum(map(len, rows)) + len(row) > TIMED:
            break
        rows.append(row)
    return packed(model, sorted(rows, key=len))


def cost(model: Any, target: str, load: Workload) -> float:
    """The figure that the target makes smaller, in closed form; time is measured elsewhere."""
    from formwright.measure.report import model_bytes

    if target == "macs":
        return float(model.cost(load.shape).macs)
    if target == "memory":
        return float(model_bytes(model) + model.cost(load.shape).state_bytes)
    return float(model_bytes(model))
