"""DoRA: LoRA for the directions of a weight's rows, and their lengths trained apart.

    W' = m / n (W + s B A) row by row,   n = |W + s B A| of each row, taken as fixed by the gradient

Liu et al., 2024 (2402.09353). m starts at the lengths of W's own rows and B at zero, so an adapter begins as nothing at
all: what is added is ``(m/n - 1) W x + (m/n) s B A x``, zero to the last bit. n comes from |W|^2, W A^T and A A^T, so
W + s B A is never formed. Cost: LoRA's, out parameters more, and r (out in + r in + r out) products a call.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.parts.base import Cost, LinearLike, Shape
from formwright.parts.context import Context
from formwright.parts.linears.adapted import Change, cut
from formwright.registry import Paper, register
from formwright.surgery.adapt.lora import LoRA, LowRank


@register("change", "dora", paper=Paper("Liu et al.", 2024, "2402.09353"), summary="directions by LoRA, lengths apart")
class DoRA(LoRA):
    """``A`` (rank, in), ``B`` (out, rank), ``m`` (out,): the lengths of the rows."""

    def __init__(self, in_features: int, out_features: int, **own: Any) -> None:
        super().__init__(in_features, out_features, **own)
        self.m = nn.Parameter(torch.empty(out_features))

    def start(self, base: LinearLike) -> None:
        self.m.copy_(self.lengths(base.dense_weight()))

    def lengths(self, weight: Tensor) -> Tensor:
        """(out,): |W + s B A| of each row, without gradient."""
        w, a, b = weight.detach().to(self.A.dtype), self.A.detach(), self.B.detach()
        crossed, squared = (b * (w @ a.t())).sum(1), (b * (b @ (a @ a.t()))).sum(1)
        total = w.square().sum(1) + 2 * self.scaling * crossed + self.scaling**2 * squared
        return total.clamp(min=torch.finfo(w.dtype).tiny).sqrt()

    def forward(self, x: Tensor, y: Tensor, base: LinearLike, ctx: Context | None, mask: Tensor | None) -> Tensor:
        weight, bias, seen = base.dense_weight(), base.dense_bias(), self.dropped(x, ctx)
        ratio = self.m / self.lengths(weight)
        if seen is not x:
            plain = F.linear(seen.to(weight.dtype), weight)
        else:
            plain = y if bias is None else y - bias
        more = (ratio - 1) * plain + ratio * self.product(seen, None)
        more = more if mask is None else torch.where(mask, more, 0.0)
        return y + more.to(y.dtype)

    def alone(self, x: Tensor, base: LinearLike, ctx: Context | None) -> Tensor:
        return Change.alone(self, x, base, ctx)

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        whole = weight.to(self.A.dtype) + self.weight()
        return ((self.m / self.lengths(weight))[:, None] * whole).to(weight.dtype), bias

    def take(self, base: LinearLike, out: Tensor | None, inn: Tensor | None) -> DoRA:
        taken = copy.deepcopy(self)
        taken.A = cut(self.A, 1, inn)
        if inn is not None:
            # The rows are shorter now, and what is left of them has to come out as before.
            cut_weight = base.dense_weight().detach().index_select(1, inn)
            taken.m.data *= taken.lengths(cut_weight) / self.lengths(base.dense_weight())
        taken.m, taken.B = cut(taken.m, 0, out), cut(taken.B, 0, out)
        return taken

    def scale_in(self, s: float) -> None:
        super().scale_in(s)
        self.m.mul_(abs(s))

    def cost(self, shape: Shape) -> Cost:
        (rank, inn), out = self.A.shape, self.m.numel()
        own = super().cost(shape)
        return Cost(own.parameters + out, own.macs + rank * (out * inn + rank * inn + rank * out))


@register("surgery", "dora", paper=Paper("Liu et al.", 2024, "2402.09353"), summary="LoRA with row lengths apart")
class Dora(LowRank):
    __doc__ = LowRank.__doc__

    examples = ({"rank": 2},)
