"""Batch normalisation of channels over all real tokens (Ioffe and Szegedy, 2015, 1502.03167).

    y = (x - mean) / sqrt(variance + eps) * weight + bias

``mean`` and ``variance`` are the batch's own while training, padding left out, and running averages otherwise, which
makes a token's output independent of the others: a stream needs ``model.eval()``. It knows the context, so it stands
inside parts and not in the place of a norm. Cost: one pass over the activations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.kit.errors import DataError, SpecError
from formwright.parts.base import Cost, Shape
from formwright.parts.context import Context


class BatchNorm(nn.Module):
    """weight and bias (width,); the running ``mean`` and ``variance`` are buffers, moved by ``momentum`` a batch."""

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.register_buffer("mean", torch.empty(width))
        self.register_buffer("variance", torch.empty(width))

    def reset(self, generator: torch.Generator) -> None:
        for one in (self.weight, self.variance):
            one.fill_(1.0)
        for zero in (self.bias, self.mean):
            zero.zero_()

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x (B, L, width) or packed (1, T, width). SpecError for a stream while training, DataError for one token."""
        if not self.training:
            return self._normalised(x.flatten(0, -2), self.mean, self.variance, False).reshape(x.shape)
        if ctx.state is not None:
            raise SpecError(f"{ctx.path}: batch statistics need whole sequences; call model.eval() before streaming")
        valid = ctx.valid(x)
        everyone = ctx.lengths is None or ctx.offsets is not None
        real = x.flatten(0, -2) if everyone else x[valid]
        if len(real) == 1:
            raise DataError(f"{ctx.path}: one token has no variance; train on more, or call model.eval()")
        if len(real) == 0:
            return x
        # A recomputed span has already moved the averages: it moves copies, so that it does all else as the first time.
        mean, variance = (self.mean.clone(), self.variance.clone()) if ctx.recompute else (self.mean, self.variance)
        y = self._normalised(real, mean, variance, True)
        return y.reshape(x.shape) if everyone else torch.zeros_like(x).masked_scatter(valid[..., None], y)

    def _normalised(self, rows: Tensor, mean: Tensor, variance: Tensor, learns: bool) -> Tensor:
        return F.batch_norm(rows, mean, variance, self.weight, self.bias, learns, self.momentum, self.eps)

    def cost(self, shape: Shape) -> Cost:
        return Cost(self.weight.numel() + self.bias.numel())
