"""Layer normalisation (Ba et al., 2016) and its root-mean-square form (Zhang and Sennrich, 2019).

``layernorm``: y = (x - mean) / sqrt(var + eps) * weight + bias.  ``rmsnorm``: y = x / sqrt(mean(x^2) + eps) * weight,
computed in float32 like the models that use it. Cost: one pass over the activations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.parts.base import Cost, Shape
from formwright.registry import Paper, register


@register("norm", "layernorm", paper=Paper("Ba, Kiros and Hinton", 2016, "1607.06450"))
class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, with weight and (unless ``bias`` is False) bias."""

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def reset(self, generator: torch.Generator) -> None:
        self.weight.fill_(1.0)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def cost(self, shape: Shape) -> Cost:
        return Cost(sum(p.numel() for p in self.parameters()))


@register("norm", "rmsnorm", paper=Paper("Zhang and Sennrich", 2019, "1910.07467"))
class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, with weight only."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def reset(self, generator: torch.Generator) -> None:
        self.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

    def cost(self, shape: Shape) -> Cost:
        return Cost(self.weight.numel())
