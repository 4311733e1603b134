"""PCGrad: of each task's gradient, what opposes another task's is taken away (Yu et al., 2020, 2001.06782).

    for every other task j, in random order: if g_i . g_j < 0:   g_i <- g_i - (g_i . g_j / |g_j|^2) g_j

with g_j as it was computed. Products are taken over the parameters that both tasks reach. Cost: one gradient a task,
and (tasks)^2 products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Gradient = Sequence[Tensor | None]


def projected(gradients: Sequence[Gradient], generator: torch.Generator) -> tuple[list[list[Tensor | None]], float]:
    """The changed gradient of each task, and the share of ordered pairs of tasks that were in conflict.

    Each gradient is a list with an entry a parameter, None where the task does not reach it.
    """
    changed = [list(gradient) for gradient in gradients]
    conflicts = 0
    for i, mine in enumerate(changed):
        others = [j for j in torch.randperm(len(gradients), generator=generator).tolist() if j != i]
        for j in others:
            both = [k for k, (a, b) in enumerate(zip(mine, gradients[j])) if a is not None and b is not None]
            dot = _dot([mine[k] for k in both], [gradients[j][k] for k in both])
            if dot >= 0:
                continue
            conflicts += 1
            size = _dot([gradients[j][k] for k in both], [gradients[j][k] for k in both])
            for k in both:
                mine[k] = mine[k] - (dot / size) * gradients[j][k]  # type: ignore[operator]
    pairs = len(gradients) * (len(gradients) - 1)
    return changed, conflicts / pairs if pairs else 0.0


def shared(gradients: Sequence[Gradient]) -> tuple[list[int], list[Tensor]]:
    """The parameters (by place) that any task reaches, and the sum of the tasks' gradients of each."""
    reached: dict[int, Tensor] = {}
    for gradient in gradients:
        for place, part in enumerate(gradient):
            if part is not None:
                reached[place] = part if place not in reached else reached[place] + part
    return list(reached), list(reached.values())


def _dot(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    """The product over all parameters, added up in float64."""
    pairs = [(x.double(), y.double()) for x, y in zip(a, b) if x is not None and y is not None]
    return sum(float((x * y).sum()) for x, y in pairs)
