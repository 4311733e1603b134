"""The channel mixers of a Transformer block: the two-layer perceptron and its gated form.

``mlp``: down(act(up(x))), Vaswani et al., 2017. ``gated-mlp``: down(act(gate(x)) * up(x)), Shazeer, 2020
(2002.05202), with silu it is SwiGLU. Cost: 2 (or 3) width x hidden multiply-accumulates a token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from formwright.parts.activations import activation as activation_named
from formwright.parts.base import Part, Step, Tail, Traits, dropout, drops, project
from formwright.parts.context import Context
from formwright.parts.linears.dense import Dense
from formwright.registry import Paper, register


@register("channel", "mlp", paper=Paper("Vaswani et al.", 2017, "1706.03762"))
class MLP(Part):
    """Slots ``up`` (hidden, W) and ``down`` (W, hidden)."""

    traits = Traits(causal=True, streams=True)
    axes = {"up": ("hidden", "stream"), "down": ("stream", "hidden")}
    examples = ({"hidden": 48}, {"hidden": 40, "activation": "relu", "bias": False})

    def __init__(
        self, width: int, *, hidden: int, activation: str = "gelu", bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.activation, self.rate = activation_named(activation), dropout
        self.activation_name = activation
        self.up = Dense(width, hidden, bias, "up")
        self.down = Dense(hidden, width, bias, "down")

    def forward(self, x: Tensor, ctx: Context, tail: Tail | None = None) -> Tensor:
        if tail is None:
            step = self.step(ctx, None, joins=False)
            if step is not None and step.takes(x):
                return step.run((step,), x, [])
        hidden = self.activation(self.up(ctx.clear(x), ctx))
        ctx.note("hidden", hidden)
        if tail is not None:
            return self.down.joined(hidden, tail)
        return dropout(self.down(hidden, ctx), self.rate, ctx, self.training, "dropout")

    def step(self, ctx: Context, norm: nn.Module | None, before: bool = False, joins: bool = True) -> Step | None:
        held: Any = self._modules
        up, down = slots = [held["up"], held["down"]]
        if drops(self.rate, self.training) or ctx.wants("hidden") or type(up) is not type(down):
            return None
        return type(up).perceptron(slots, self.activation_name, norm, before, joins)

    def finishes(self, tail: Tail) -> bool:
        return not drops(self.rate, self.training) and self.down.finishes(tail)


@register("channel", "gated-mlp", paper=Paper("Shazeer", 2020, "2002.05202"))
class GatedMLP(Part):
    """Slots ``gate`` (hidden, W), ``up`` (hidden, W) and ``down`` (W, hidden)."""

    traits = Traits(causal=True, streams=True)
    axes = {"gate": ("hidden", "stream"), "up": ("hidden", "stream"), "down": ("stream", "hidden")}
    examples = ({"hidden": 40}, {"hidden": 24, "activation": "gelu", "bias": True})

    def __init__(
        self, width: int, *, hidden: int, activation: str = "silu", bias: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.activation, self.rate = activation_named(activation), dropout
        self.activation_name = activation
        self.gate = Dense(width, hidden, bias, "gate")
        self.up = Dense(width, hidden, bias, "up")
        self.down = Dense(hidden, width, bias, "down")

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        gate, up = project([self.gate, self.up], ctx.clear(x), ctx)
        gate = self.activation(gate)  # in its own place: of a long row, one more tensor of this width is much memory
        hidden = gate * up
        ctx.note("hidden", hidden)
        return dropout(self.down(hidden, ctx), self.rate, ctx, self.training, "dropout")
