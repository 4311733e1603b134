"""Choosing a token: the likeliest, or drawn with temperature, top-k and nucleus (Holtzman et al., 2020, 1904.09751).

The draw is an inverse of the cumulative distribution in order of falling probability, with one uniform number a token
from the row's own generator, so what a row becomes does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.parts.context import keyed_generator


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> list[str]:
    """Everything wrong with the options, a sentence each."""
    problems = []
    if not 0.0 <= temperature < float("inf"):
        problems.append(f"temperature={temperature} must be 0 (the likeliest token) or above")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        problems.append(f"top_p={top_p} must be above 0 and at most 1")
    return problems


def row_generators(rows: Sequence[Sequence[int]], seed: int) -> list[torch.Generator]:
    """One generator a row, keyed by the seed, the prompt and how often it came before: rows of one prompt differ."""
    seen: dict[tuple[int, ...], int] = {}
    made = []
    for row in rows:
        key = tuple(row)
        turn = seen.get(key, 0)
        seen[key] = turn + 1
        made.append(keyed_generator(seed, f"sample {turn} {key}"))
    return made


def choose(
    logits: Tensor,
    generator: torch.Generator | None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """An id from logits (V,): the first of the largest at temperature 0, else drawn with ``generator``."""
    if temperature == 0.0:
        return int(logits.argmax())
    if generator is None:
        raise SpecError("a temperature above 0 draws, which needs a seed")
    values, order = (logits.double().cpu() / temperature).sort(descending=True, stable=True)
    if top_k is not None:
        values, order = values[:top_k], order[:top_k]
    mass = values.softmax(0)
    if top_p is not None and top_p < 1.0:
        # The smallest set that reaches top_p; the first always stays.
        kept = int((mass.cumsum(0) - mass < top_p).sum())
        mass, order = mass[: max(1, kept)], order[: max(1, kept)]
    ladder = mass.cumsum(0)
    point = torch.rand((), generator=generator, dtype=torch.float64) * ladder[-1]
    return int(order[min(int(torch.searchsorted(ladder, point, right=True)), len(order) - 1)])
