"""Bottleneck adapters: down to a few features, an activation, and up again.

    behind:  y + up(f(down(y)))            y the sublayer's output (sequential)
    beside:  y + scale up(f(down(x)))      x the sublayer's input (parallel)

Houlsby et al., 2019 (1902.00751); behind the feed-forward sublayer only: Pfeiffer et al., 2021 (2005.00247); beside it:
He et al., 2022 (2110.04366). ``up`` starts at zero, so that the model's function is unchanged at the start; "bert"
draws both from N(0, 0.02), which is only near. Cost: 2 width hidden multiply-accumulates a token, and 2 width hidden +
hidden + width parameters. It works token by token, so it streams.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.kit.errors import SpecError, unknown
from formwright.parts.activations import activation as activation_named
from formwright.parts.adapters._gate import Gate
from formwright.parts.base import Cost, Shape, dropout
from formwright.parts.beside import Adapter
from formwright.parts.context import Context
from formwright.registry import Paper, register

#: How ``up`` starts: at nothing, or both maps as BERT's weights did.
STARTS = ("zero", "bert")


class Affine(nn.Module):
    """weight (out, in) and bias (out,), which starts at zero. ``start``: "uniform" within in ** -0.5 (Kaiming with
    a = sqrt 5), "bert" N(0, 0.02), or "zero"."""

    def __init__(self, inner: int, outer: int, start: str) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(outer, inner))
        self.bias = nn.Parameter(torch.empty(outer))

    def reset(self, generator: torch.Generator) -> None:
        self.bias.zero_()
        if self.start == "zero":
            self.weight.zero_()
        elif self.start == "bert":
            self.weight.copy_(0.02 * torch.randn(self.weight.shape, generator=generator))
        else:
            bound = self.weight.shape[1] ** -0.5
            self.weight.copy_(torch.rand(self.weight.shape, generator=generator) * (2 * bound) - bound)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def cost(self, shape: Shape) -> Cost:
        size = self.weight.numel()
        return Cost(size + self.bias.numel(), size * shape.tokens)


def check_hidden(hidden: int, width: int) -> None:
    """SpecError for a bottleneck that is none."""
    if not 1 <= hidden <= width:
        raise SpecError(f"hidden={hidden} must be at least 1 and at most the width, {width}")


class Narrow(Adapter):
    """``scale up(f(down(...)))`` for maps ``down`` and ``up`` of any kind."""

    down: Any
    up: Any

    def __init__(
        self,
        activation: str,
        *,
        side: str = "behind",
        scale: float = 1.0,
        gate: Gate | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation, self.side, self.scale = activation_named(activation), side, scale
        self.gate, self.rate = gate, dropout

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        read = ctx.clear(y if self.side == "behind" else x)
        hidden = self.activation(self.down(read))
        added = self.up(dropout(hidden, self.rate, ctx, self.training, "bottleneck"))
        if self.scale != 1.0:
            added = added * self.scale
        return added if self.gate is None else added * self.gate.spread(read, ctx)

    def cost(self, shape: Shape) -> Cost:
        held = self.down.cost(shape) + self.up.cost(shape)
        return held if self.gate is None else held + self.gate.cost(shape)


@register("adapter", "bottleneck", paper=Paper("Houlsby et al.", 2019, "1902.00751"), summary="down, activation, up")
class Bottleneck(Narrow):
    """Args:
    hidden: features between ``down`` and ``up``. activation: between them. side: "behind" reads the part's output,
    "beside" its input. scale: of what is added. start: "zero" or "bert". gate: a gate for each sequence decides how
    much is added. dropout: of what ``up`` reads, while training.
    """

    examples = ({"hidden": 4}, {"hidden": 3, "side": "beside", "scale": 2.0, "activation": "silu", "start": "bert"})

    def __init__(
        self,
        width: int,
        *,
        hidden: int,
        activation: str = "relu",
        side: Literal["behind", "beside"] = "behind",
        scale: float = 1.0,
        start: str = "zero",
        gate: bool = False,
        dropout: float = 0.0,
    ) -> None:
        check_hidden(hidden, width)
        if start not in STARTS:
            raise SpecError(unknown("start", start, STARTS))
        super().__init__(activation, side=side, scale=scale, gate=Gate(width) if gate else None, dropout=dropout)
        self.down = Affine(width, hidden, "bert" if start == "bert" else "uniform")
        self.up = Affine(hidden, width, start)
