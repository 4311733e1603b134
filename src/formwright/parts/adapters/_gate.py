"""A gate: how much of an adapter each sequence gets, the mean over its tokens of a sigmoid of a linear.

Mao et al., 2022 (UniPELT, 2110.07577). Cost: width + 1 parameters and width multiply-accumulates a token. It reads
whole sequences, so a stream cannot have it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.kit.errors import SpecError
from formwright.parts.base import Cost, Shape
from formwright.parts.context import Context


class Gate(nn.Module):
    """weight (1, W) and bias (1,), both zero at the start, so that every gate starts at one half."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, width))
        self.bias = nn.Parameter(torch.empty(1))

    def reset(self, generator: torch.Generator) -> None:
        self.weight.zero_()
        self.bias.zero_()

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(rows or documents,) gates in [0, 1]; a sequence without tokens has 0."""
        if ctx.state is not None:
            raise SpecError(f"{ctx.path or 'a gate'} reads whole sequences, so a model with gates cannot stream")
        opened = torch.sigmoid(F.linear(ctx.clear(x).to(self.weight.dtype), self.weight, self.bias))[..., 0]
        if ctx.offsets is None:
            valid = ctx.valid(x)
            return torch.where(valid, opened, 0.0).sum(1) / valid.sum(1).clamp(min=1)
        sizes = ctx.offsets.diff()
        document = torch.repeat_interleave(torch.arange(len(sizes), device=x.device), sizes)
        return opened.new_zeros(len(sizes)).index_add(0, document, opened[0]) / sizes.clamp(min=1)

    def spread(self, x: Tensor, ctx: Context) -> Tensor:
        """The gate of every token of x: (B, 1, 1), or (1, T, 1) when packed."""
        gates = self(x, ctx)
        if ctx.offsets is None:
            return gates[:, None, None]
        return torch.repeat_interleave(gates, ctx.offsets.diff())[None, :, None]

    def cost(self, shape: Shape) -> Cost:
        return Cost(self.weight.numel() + 1, self.weight.numel() * shape.tokens)
