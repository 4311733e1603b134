"""From tokens to one vector a row: mean, first or last token, optionally of length one.

Cost: one pass over the last activations.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.kit.errors import SpecError
from formwright.parts.base import Cost, Shape, cost_sum, costed
from formwright.parts.context import Context
from formwright.registry import Paper, register

Pool = Literal["mean", "first", "last", "max"]


def pool(x: Tensor, ctx: Context, how: str) -> Tensor:
    """(B, L, W) or packed (1, T, W) -> (B, W). An empty row gives zeros."""
    if ctx.offsets is not None and not ctx.single:
        sizes = ctx.offsets.diff()
        filled = (sizes > 0)[:, None]
        if how == "mean":
            return torch.segment_reduce(x[0], "sum", lengths=sizes) / sizes.clamp(min=1)[:, None]
        if how == "max":
            most = torch.segment_reduce(x[0], "max", lengths=sizes)
            return torch.where(filled, most, 0.0)
        if x.shape[1] == 0:
            return x.new_zeros(len(sizes), x.shape[2])
        index = ctx.offsets[:-1] if how == "first" else ctx.offsets[1:] - 1
        return torch.where(filled, x[0, index.clamp(0, x.shape[1] - 1)], 0.0)
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], x.shape[2])
    if ctx.lengths is None:
        if how == "mean":
            return x.mean(1)
        return x.amax(1) if how == "max" else x[:, 0 if how == "first" else -1]
    valid = ctx.valid(x)[..., None]
    filled = (ctx.lengths > 0)[:, None]
    if how == "mean":
        return torch.where(valid, x, 0.0).sum(1) / ctx.lengths.clamp(min=1)[:, None]
    if how == "max":
        return x.masked_fill(~valid, float("-inf")).amax(1).masked_fill(~filled, 0.0)
    index = torch.zeros_like(ctx.lengths) if how == "first" else (ctx.lengths - 1).clamp(min=0)
    return torch.where(filled, x[torch.arange(x.shape[0], device=x.device), index], 0.0)


class Head(nn.Module):
    """forward(x, ctx) -> what the model says. ``kind``: vectors, tokens, sequence, values, pair or states."""

    kind: str = "vectors"
    examples: tuple[dict, ...] = ({},)
    tied: bool = False

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        raise NotImplementedError

    def product(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """States, weight (V, W) and bias (V,) whose plain product the answer is, for losses that make it themselves;
        None where the answer comes about in another way, or somebody watches it do so."""
        return None

    def cost(self, shape: Shape) -> Cost:
        return cost_sum([child.cost(Shape.full(len(shape.lengths), 1)) for _, child in costed(self)])


class _Pooling(Head):
    how: str = "mean"

    def __init__(self, width: int, *, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        y = pool(x, ctx, self.how)
        return F.normalize(y, dim=-1) if self.normalize else y


@register(
    "head", "mean-pool", paper=Paper("Reimers and Gurevych", 2019, "1908.10084"), summary="mean of the real tokens"
)
class MeanPool(_Pooling):
    """(B, W): the mean of each row's real tokens; ``normalize`` to length one."""

    examples = ({}, {"normalize": True})


@register("head", "first-pool", summary="the first token (CLS)")
class FirstPool(_Pooling):
    """(B, W): each row's first token; ``normalize`` to length one."""

    how = "first"


@register("head", "last-pool", summary="the last real token")
class LastPool(_Pooling):
    """(B, W): each row's last real token, the choice for causal models; ``normalize`` to length one."""

    how = "last"


@register("head", "max-pool", summary="the largest value of each channel")
class MaxPool(_Pooling):
    """(B, W): per channel the largest over each row's real tokens; ``normalize`` to length one."""

    how = "max"


def check_pool(how: str) -> str:
    if how not in ("mean", "first", "last", "max"):
        raise SpecError(f"pool {how!r} is none of mean, first, last, max")
    return how
