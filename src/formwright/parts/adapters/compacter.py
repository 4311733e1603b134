"""Compacter: a bottleneck adapter whose maps are sums of Kronecker products.

    W = sum_i A_i (x) s_i t_i^T,   A_i (n, n) shared by all layers,   s_i (in / n),   t_i (out / n)

Karimi Mahabadi et al., 2021 (2106.04647). W is never made: x is read by the s_i in n runs of in / n entries, mixed by
the A_i, and written by the t_i. A starts N(0, 0.01); with ``start`` "zero" the t_i of the map up are zero, so that the
model's function is unchanged; "glorot" draws them as all others. Cost of a map: in + 2 out parameters, and n
(in + out) + n^3 multiply-accumulates a token; n^3 parameters for the whole model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError, unknown
from formwright.parts.adapters.bottleneck import Narrow, check_hidden
from formwright.parts.base import Cost, Shape
from formwright.registry import Paper, register

STARTS = ("zero", "glorot")


class Rule(nn.Module):
    """A (n, n, n): the n small matrices that all maps of an adapter share."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(n, n, n))

    def reset(self, generator: torch.Generator) -> None:
        self.A.copy_(0.01 * torch.randn(self.A.shape, generator=generator))

    def cost(self, shape: Shape) -> Cost:
        return Cost(self.A.numel())


class Kronecker(nn.Module):
    """s (n, in / n), t (n, out / n) and bias (out,); ``rule`` is given by the model."""

    def __init__(self, inner: int, outer: int, n: int, zero: bool) -> None:
        super().__init__()
        self.zero = zero
        self.s = nn.Parameter(torch.empty(n, inner // n))
        self.t = nn.Parameter(torch.empty(n, outer // n))
        self.bias = nn.Parameter(torch.empty(outer))
        self._rule: list[Rule] = []

    def reset(self, generator: torch.Generator) -> None:
        for factor in (self.s, self.t):
            std = (2.0 / (1 + factor.shape[1])) ** 0.5
            factor.copy_(std * torch.randn(factor.shape, generator=generator))
        if self.zero:
            self.t.zero_()
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        runs = x.to(self.s.dtype).unflatten(-1, (len(self.s), -1))
        read = (runs @ self.s.T).transpose(-1, -2)  # (..., i, a): run a by s_i
        mixed = torch.einsum("...ia,iab->...ib", read, self._rule[0].A)
        return (mixed.transpose(-1, -2) @ self.t).flatten(-2) + self.bias

    def cost(self, shape: Shape) -> Cost:
        n, own = len(self.s), self.s.numel() + self.t.numel()
        return Cost(own + self.bias.numel(), (n * own + n**3) * shape.tokens)


@register("adapter", "compacter", paper=Paper("Karimi Mahabadi et al.", 2021, "2106.04647"))
class Compacter(Narrow):
    """A bottleneck of Kronecker sums. ``n``: terms of each sum, and side of the shared matrices; divides the width and
    ``hidden``. Other options as in ``bottleneck``, except ``start``: "zero" or "glorot"."""

    examples = ({"hidden": 4, "n": 2}, {"hidden": 8, "n": 4, "start": "glorot"})

    def __init__(
        self, width: int, *, hidden: int, n: int = 4, activation: str = "gelu", start: str = "zero", scale: float = 1.0
    ) -> None:
        check_hidden(hidden, width)
        if n < 1 or width % n or hidden % n:
            raise SpecError(f"n={n} must divide the width, {width}, and hidden={hidden}")
        if start not in STARTS:
            raise SpecError(unknown("start", start, STARTS))
        super().__init__(activation, scale=scale)
        self.down = Kronecker(width, hidden, n, False)
        self.up = Kronecker(hidden, width, n, start == "zero")

    def common(self) -> Rule:
        return Rule(len(self.down.s))

    def share(self, common: nn.Module) -> None:
        for sum_of_products in (self.down, self.up):
            sum_of_products._rule = [common]
