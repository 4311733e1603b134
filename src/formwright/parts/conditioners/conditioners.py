"""Conditioners run once per forward, after the stem, and fill the context for the layers that read them.

``relative-bias``: T5's learned table of distances (Raffel et al., 2019, 1910.10683), shared by all layers that name it.
``label``: an embedding of a class for adaptive norms. ``length-projection``: one table for all Linformer layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError
from formwright.parts.base import Cost, Shape, cost_sum, costed, own_parameters
from formwright.parts.context import Context
from formwright.parts.linears.dense import Table
from formwright.parts.positions import distance_buckets
from formwright.registry import Paper, register


class Conditioner(nn.Module):
    """forward(x, ctx) -> the context with what it writes added; ``name`` is its key in the spec."""

    examples: tuple[dict, ...] = ({},)

    def forward(self, x: Tensor, ctx: Context, name: str) -> Context:
        raise NotImplementedError

    def cost(self, shape: Shape) -> Cost:
        return cost_sum([child.cost(shape) for _, child in costed(self)]) + own_parameters(self)


@register("conditioner", "relative-bias", paper=Paper("Raffel et al.", 2019, "1910.10683"))
class RelativeBias(Conditioner):
    """Writes (heads, 2R-1): the bias of each distance -R+1 .. R-1, R the longest reach of this call.

    Args: ``heads``; ``buckets`` of distances; ``longest`` distance told apart; ``bidirectional`` or causal.
    """

    examples = ({"heads": 4}, {"heads": 2, "bidirectional": False, "buckets": 8, "longest": 16})

    def __init__(
        self, width: int, *, heads: int, buckets: int = 32, longest: int = 128, bidirectional: bool = True
    ) -> None:
        super().__init__()
        self.longest, self.bidirectional = longest, bidirectional
        self.table = Table(buckets, heads)

    def forward(self, x: Tensor, ctx: Context, name: str) -> Context:
        if ctx.offsets is not None:
            reach = max((stop - start for start, stop in ctx.spans()), default=1)
        else:
            reach = x.shape[1]
            if ctx.positions is not None and ctx.positions.numel():
                reach = max(reach, int(ctx.positions.max()) + 1)
            elif ctx.state is not None:
                reach += int(ctx.state.seen.max())
        distance = torch.arange(1 - max(reach, 1), max(reach, 1), device=x.device)
        bucket = distance_buckets(distance, self.bidirectional, self.table.rows, self.longest)
        bias = self.table(bucket).t()
        return ctx.replace(condition={**ctx.condition, name: bias})


@register("conditioner", "label", paper=Paper("Peebles and Xie", 2022, "2212.09748"), summary="an embedding of a class")
class Label(Conditioner):
    """Adds the embedding of ``ctx.condition[source]`` (B,) int64 under its own name, (B, condition_width)."""

    examples = ({"classes": 5, "condition_width": 12, "source": "label"},)

    def __init__(self, width: int, *, classes: int, condition_width: int, source: str = "label") -> None:
        super().__init__()
        self.source = source
        self.table = Table(classes, condition_width)

    def forward(self, x: Tensor, ctx: Context, name: str) -> Context:
        if self.source not in ctx.condition:
            raise SpecError(f"conditioner {name!r} reads condition {self.source!r}, which this call does not carry")
        return ctx.replace(condition={**ctx.condition, name: self.table(ctx.condition[self.source])})


@register(
    "conditioner",
    "length-projection",
    paper=Paper("Wang et al.", 2020, "2006.04768"),
    summary="one projection of the length for all linformer layers",
)
class LengthProjection(Conditioner):
    """Writes its parameter ``e`` (rank, length), the E of every ``linformer`` with share="layerwise" that names it."""

    examples = ({"length": 20, "rank": 4},)

    def __init__(self, width: int, *, length: int, rank: int) -> None:
        super().__init__()
        if length < 1 or rank < 1:
            raise SpecError(f"length={length} and rank={rank} must be at least 1")
        self.e = nn.Parameter(torch.empty(rank, length))

    def reset(self, generator: torch.Generator) -> None:
        self.e.copy_(torch.randn(self.e.shape, generator=generator) * self.e.shape[0] ** -0.5)

    def forward(self, x: Tensor, ctx: Context, name: str) -> Context:
        return ctx.replace(condition={**ctx.condition, name: self.e})
