"""Evidence: what a candidate keeps, how sure that is, and what the data could certify at all.

``kept`` is candidate over original (inverted where lower is better, above chance where there is a chance level). The
*select* split chooses; the *test* split is touched once, for the printed front, and gives the estimate and its
one-sided 95 % bound by a paired bootstrap over the items.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from formwright.kit import statistics
from formwright.models.batch import Score


def record(score: Score) -> dict[str, Any]:
    """A score as plain data, with what a bootstrap needs."""
    return {
        "value": float(score.value),
        "per_item": None if score.per_item is None else [round(float(v), 6) for v in score.per_item],
        "curves": {name: curve.tolist() for name, curve in score.curves.items()},
        "extra": {name: float(value) for name, value in score.extra.items()},
    }


def score_from(data: Mapping[str, Any]) -> Score:
    """The score of :func:`record`."""
    per_item = data["per_item"]
    return Score(
        data["value"],
        None if per_item is None else torch.tensor(per_item, dtype=torch.float64),
        {name: torch.tensor(curve) for name, curve in data["curves"].items()},
        data["extra"],
    )


def kept(task: Any, candidate: float, original: float) -> float:
    """The share of the original's quality that a candidate's value keeps."""
    return statistics.kept(candidate, original, task.higher_is_better, task.chance)


def bound(task: Any, candidate: Score, original: Score, seed: int = 0) -> float | None:
    """The one-sided 95 % lower bound of what is kept; None where the metric has no items."""
    if candidate.per_item is None or original.per_item is None:
        return None
    return statistics.paired_bootstrap(
        task.resampled, candidate, original, higher_is_better=task.higher_is_better, chance=task.chance, seed=seed
    )


def certifiable(task: Any, original: Score, items: int | None = None) -> float | None:
    """The smallest loss that a test split of ``items`` can certify, before searching; None where it cannot be known."""
    if original.per_item is None:
        return None
    return statistics.smallest_certifiable_loss(
        original, items, resampled=task.resampled, higher_is_better=task.higher_is_better, chance=task.chance
    )
