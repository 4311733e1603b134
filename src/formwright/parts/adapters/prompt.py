"""Prompt: learned vectors that stand before the embeddings of every text.

Lester et al., 2021 (2104.08691). They are more rows of the token table: ids from its end on name them, so positions,
types, norm and whatever else the stem adds come to them as to tokens, and a text's own positions follow theirs. Cost:
length x table width parameters, and a longer sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.kit.errors import Refusal, SpecError
from formwright.parts.base import Cost, Shape, TableLike
from formwright.parts.context import Context
from formwright.registry import Paper, register


@register(
    "adapter", "prompt", paper=Paper("Lester et al.", 2021, "2104.08691"), summary="learned vectors before a text"
)
class Prompt(nn.Module):
    """``rows`` (length, table width), which start N(0, 0.02)."""

    number: int = 0
    examples: tuple[dict[str, Any], ...] = ({"length": 3},)

    def __init__(self, width: int, *, length: int) -> None:
        super().__init__()
        if length < 1:
            raise SpecError(f"length={length} must be at least 1")
        self.rows = nn.Parameter(torch.empty(length, width))

    def reset(self, generator: torch.Generator) -> None:
        self.rows.copy_(0.02 * torch.randn(self.rows.shape, generator=generator))


class Prompted(TableLike):
    """``base``, the token table, and ``adapters``: prompts by name, whose rows are ids from ``base.rows`` on.

    ``active`` is the number of the prompt of calls that name none; it is not saved.
    """

    def __init__(self, base: TableLike) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active = 0

    @property
    def rows(self) -> int:  # type: ignore[override]
        return self.base.rows

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.base.width

    def held(self) -> Iterator[Prompt]:
        yield from self.adapters.values()  # type: ignore[misc]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.rows) for prompt in self.held())

    def forward(self, ids: Tensor) -> Tensor:
        learned = torch.cat([prompt.rows for prompt in self.held()])
        x = self.base(ids.clamp(max=self.base.rows - 1))
        place = ids - self.base.rows
        return torch.where(place[..., None] < 0, x, F.embedding(place.clamp(min=0), learned).to(x.dtype))

    def firsts(self, rows: int, ctx: Context) -> tuple[Tensor, Tensor]:
        """For each of ``rows`` rows (documents, when packed): the id of its prompt's first vector, and how many."""
        chosen = torch.full((rows,), self.active) if ctx.adapters is None else ctx.adapters
        if len(chosen) != rows:
            what = "rows" if ctx.offsets is None else "documents"
            raise SpecError(f"{len(chosen)} adapters were chosen for {rows} {what}")
        first, count = torch.zeros_like(chosen), torch.zeros_like(chosen)
        begin = self.base.rows
        for prompt in self.held():
            mine = chosen == prompt.number
            first, count = first.masked_fill(mine, begin), count.masked_fill(mine, len(prompt.rows))
            begin += len(prompt.rows)
        return first, count

    def dense_weight(self) -> Tensor:
        raise Refusal("prompts stand before every text, which no token table says; undo them first")

    def logits(self, x: Tensor) -> Tensor:
        return self.base.logits(x)

    def cost(self, shape: Shape) -> Cost:
        return self.base.cost(shape) + Cost(sum(prompt.rows.numel() for prompt in self.held()))
