"""Reshapes change length, width or grid between runs of layers.

``shorten``: mean of every ``by`` neighbouring tokens, never across a border, padding left out. ``resize``: a linear to
another width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError
from formwright.parts.base import Cost, Shape, Traits, cost_sum, costed
from formwright.parts.context import Context
from formwright.parts.linears.dense import Dense
from formwright.registry import register


class Reshaper(nn.Module):
    """forward(x, ctx) -> (x, ctx) of another shape; ``out_width`` of the stream; ``shape_after`` for costs."""

    out_width: int
    traits: Traits = Traits()
    examples: tuple[dict, ...] = ({},)

    def shape_after(self, shape: Shape) -> Shape:
        return shape

    def cost(self, shape: Shape) -> Cost:
        return cost_sum([child.cost(shape) for _, child in costed(self)])


@register("reshape", "shorten", summary="mean of every few neighbouring tokens")
class Shorten(Reshaper):
    """(B, L, W) -> (B, ceil(L / by), W); lengths, offsets and positions follow. Not for streams."""

    examples = ({"by": 2}, {"by": 3})

    def __init__(self, width: int, *, by: int = 2) -> None:
        super().__init__()
        if by < 1:
            raise SpecError(f"by={by} must be at least 1")
        self.by, self.out_width = by, width

    def shape_after(self, shape: Shape) -> Shape:
        return Shape(tuple(-(-length // self.by) for length in shape.lengths), shape.past, shape.memory)

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        if ctx.state is not None:
            raise SpecError(f"{ctx.path}: shorten needs whole sequences, so this model does not stream")
        if ctx.offsets is not None:
            sizes = ctx.offsets.diff()
            new_sizes = (sizes + self.by - 1) // self.by
            offsets = torch.cat((sizes.new_zeros(1), new_sizes.cumsum(0)))
            document = torch.repeat_interleave(torch.arange(len(sizes), device=x.device), sizes)
            inside = torch.arange(x.shape[1], device=x.device) - ctx.offsets[document]
            group = offsets[document] + inside // self.by
            total = int(offsets[-1])
            count = torch.zeros(total, dtype=x.dtype, device=x.device).index_add(0, group, x.new_ones(x.shape[1]))
            pooled = x.new_zeros(total, x.shape[2]).index_add(0, group, x[0]) / count[:, None]
            return pooled[None], ctx.replace(offsets=offsets, borders=None, positions=None, origin=None, grid=None)
        spare = -x.shape[1] % self.by
        valid = ctx.valid(x).to(x.dtype)[..., None]
        x, valid = (nn.functional.pad(t, (0, 0, 0, spare)) for t in (ctx.clear(x), valid))
        total = x.unflatten(1, (-1, self.by)).sum(2)
        count = valid.unflatten(1, (-1, self.by)).sum(2).clamp(min=1)
        lengths = None if ctx.lengths is None else (ctx.lengths + self.by - 1) // self.by
        return total / count, ctx.replace(lengths=lengths, positions=None, origin=None, grid=None)


@register("reshape", "resize", summary="a linear to another width")
class Resize(Reshaper):
    """(B, L, W) -> (B, L, to); slot ``resize`` (to, W)."""

    traits = Traits(causal=True, streams=True)
    examples = ({"to": 24},)

    def __init__(self, width: int, *, to: int, bias: bool = True) -> None:
        super().__init__()
        self.out_width = to
        self.resize = Dense(width, to, bias, "resize")

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        return self.resize(x, ctx), ctx
