"""How a part's output joins the stream.

``add``: x + s y, s fixed or learned per channel (LayerScale, Touvron et al., 2021, 2103.17239). ``gated``: x + g y with
a scalar g starting at zero (ReZero, Bachlechner et al., 2020, 2003.04887). ``modulated``: scale, shift and gate come
from a condition (adaptive norm with zero start, Peebles and Xie, 2022, 2212.09748). ``concat``: a linear of [x, y]
back to the width of the stream.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.kit.errors import SpecError
from formwright.parts.base import Cost, Shape, cost_sum, costed, own_parameters
from formwright.parts.context import Context
from formwright.parts.linears.dense import Dense
from formwright.registry import Paper, register


class Combine(nn.Module):
    """``before`` may change what the part sees; ``forward`` joins its output ``y`` to the stream ``x``."""

    reads: tuple[str, ...] = ()
    examples: tuple[dict, ...] = ({},)
    #: Whether it is x + y and nothing else.
    plain: bool = False

    def before(self, x: Tensor, ctx: Context) -> Tensor:
        return x

    def furnish(self, ctx: Context, x: Tensor, generator: torch.Generator) -> Context:
        """``ctx`` with random values for all that this reads beside the stream: for tests and tracing."""
        return ctx

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        raise NotImplementedError

    def cost(self, shape: Shape) -> Cost:
        return cost_sum([child.cost(shape) for _, child in costed(self)]) + own_parameters(self)


@register("combine", "add", paper=Paper("He et al.", 2015, "1512.03385"), summary="x + s y")
class Add(Combine):
    """x + scale * y; ``learned`` makes scale a vector per channel that starts at ``scale``."""

    examples = ({}, {"scale": 0.5}, {"scale": 0.1, "learned": True})

    def __init__(self, width: int, *, scale: float = 1.0, learned: bool = False) -> None:
        super().__init__()
        self.start = scale
        self.scale = nn.Parameter(torch.empty(width)) if learned else None
        self.plain = not learned and scale == 1.0

    def reset(self, generator: torch.Generator) -> None:
        if self.scale is not None:
            self.scale.fill_(self.start)

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        if self.scale is not None:
            return x + self.scale * y
        return x + y if self.start == 1.0 else x + self.start * y


@register("combine", "gated", paper=Paper("Bachlechner et al.", 2020, "2003.04887"), summary="x + g y, g starts at 0")
class Gated(Combine):
    """x + g * y with one learned g, zero at the start, so that a new layer begins as the identity."""

    def __init__(self, width: int, *, start: float = 0.0) -> None:
        super().__init__()
        self.start = start
        self.gate = nn.Parameter(torch.empty(()))

    def reset(self, generator: torch.Generator) -> None:
        self.gate.fill_(self.start)

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return x + self.gate * y


@register(
    "combine",
    "modulated",
    paper=Paper("Peebles and Xie", 2022, "2212.09748"),
    summary="scale, shift, gate by a condition",
)
class Modulated(Combine):
    """The part sees x (1 + scale) + shift; the stream gets x + gate y; all three are a linear of silu(condition).

    The condition ``source`` is (B, condition_width). Slot ``modulation`` (3 W, condition_width) starts at zero.
    """

    examples = ({"source": "c", "condition_width": 12},)

    def __init__(self, width: int, *, source: str, condition_width: int) -> None:
        super().__init__()
        self.source = source
        self.reads = (source,)
        self.modulation = Dense(condition_width, 3 * width, True, "modulation")

    def settle(self) -> None:
        """After all resets: zero, so that a new layer begins as the identity."""
        for parameter in self.modulation.parameters():
            parameter.zero_()

    def furnish(self, ctx: Context, x: Tensor, generator: torch.Generator) -> Context:
        shape = (len(x), self.modulation.in_features)
        made = torch.randn(shape, generator=generator, dtype=torch.float64).to(x)
        return ctx.replace(condition={**ctx.condition, self.source: made})

    def _parts(self, x: Tensor, ctx: Context) -> tuple[Tensor, ...]:
        if self.source not in ctx.condition:
            raise SpecError(f"{ctx.path}: modulated reads condition {self.source!r}, which this call does not carry")
        made = self.modulation(F.silu(ctx.condition[self.source]), ctx)
        if ctx.offsets is not None:
            made = torch.repeat_interleave(made, ctx.offsets.diff(), 0)[None]
        else:
            made = made[:, None]
        return made.chunk(3, -1)

    def before(self, x: Tensor, ctx: Context) -> Tensor:
        shift, scale, _ = self._parts(x, ctx)
        return x * (1 + scale) + shift

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return x + self._parts(x, ctx)[2] * y

    def cost(self, shape: Shape) -> Cost:
        # Two products a call: what the part sees, and what the stream gets.
        rows = Shape.full(len(shape.lengths), 1)
        once = self.modulation.cost(rows)
        return once + Cost(0, once.macs)


@register("combine", "concat", summary="a linear of [x, y] back to the stream")
class Concat(Combine):
    """join([x, y]), slot ``join`` (W, 2 W); the common form of long skips."""

    def __init__(self, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.join = Dense(2 * width, width, bias, "join")

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return self.join(torch.cat((x, y), -1), ctx)
