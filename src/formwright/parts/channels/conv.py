"""Channel mixers of 1x1 convolutions with batch norms: ``conv-mlp`` and, with neurons that spike, ``spiking-mlp``.

    conv-mlp: relu(norm(down(gelu(norm(up(x))))))        spiking-mlp: down(spikes(norm(up(spikes(norm(x))))))

Liu, Datta, Li and Beerel, 2024 (LMUFormer, 2402.04882). A 1x1 convolution is a linear of every token. Batch norms use
running averages outside training: a stream needs ``model.eval()``. Cost: 2 W hidden multiply-accumulates a token;
state: none, spiking a voltage a neuron.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from formwright.parts.activations import activation as activation_named
from formwright.parts.base import Cost, Part, Shape, Slot, Traits
from formwright.parts.context import EMPTY, Context
from formwright.parts.linears.dense import Dense
from formwright.parts.norms.batch import BatchNorm
from formwright.parts.spikes import LIF
from formwright.parts.streaming import remembered, slot_bytes
from formwright.registry import Paper, register

AXES = {"up": ("hidden", "stream"), "down": ("stream", "hidden")}


@register("channel", "conv-mlp", paper=Paper("Liu, Datta, Li and Beerel", 2024, "2402.04882"))
class ConvMLP(Part):
    """Slots ``up`` (hidden, W) and ``down`` (W, hidden), a batch norm and an activation behind each."""

    traits = Traits(causal=True, streams=True, statistics=True)
    axes = AXES
    examples = ({"hidden": 48}, {"hidden": 40, "activation": "silu", "out_activation": "identity"})

    def __init__(self, width: int, *, hidden: int, activation: str = "gelu", out_activation: str = "relu") -> None:
        super().__init__()
        self.activation, self.out_activation = activation_named(activation), activation_named(out_activation)
        self.up = Dense(width, hidden, True, "up")
        self.up_norm = BatchNorm(hidden)
        self.down = Dense(hidden, width, True, "down")
        self.down_norm = BatchNorm(width)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        hidden = self.activation(self.up_norm(self.up(ctx.clear(x), ctx), ctx))
        ctx.note("hidden", hidden)
        return self.out_activation(self.down_norm(self.down(hidden, ctx), ctx))


@register("channel", "spiking-mlp", paper=Paper("Liu, Datta, Li and Beerel", 2024, "2402.04882"))
class SpikingMLP(Part):
    """Slots ``up`` (hidden, W) and ``down`` (W, hidden). ``form``: "pre" fires before each of them, so that only spikes
    enter and a current leaves; "post" fires behind each, so that spikes leave."""

    traits = Traits(causal=True, streams=True, statistics=True, gradient="surrogate")
    axes = AXES
    examples = ({"hidden": 48}, {"hidden": 40, "form": "post", "tau": 1.5})

    def __init__(self, width: int, *, hidden: int, tau: float = 2.0, form: Literal["pre", "post"] = "pre") -> None:
        super().__init__()
        sizes = (width, hidden) if form == "pre" else (hidden, width)
        self.form = form
        self.up = Dense(width, hidden, True, "up")
        self.down = Dense(hidden, width, True, "down")
        self.up_norm, self.down_norm = BatchNorm(sizes[0]), BatchNorm(sizes[1])
        self.up_lif, self.down_lif = LIF("up", tau=tau), LIF("down", tau=tau)

    def slots(self) -> dict[str, Slot]:
        """What a stream remembers for each row: the voltages."""
        pairs = ((self.up_lif, self.up_norm), (self.down_lif, self.down_norm))
        return {layer.slot: remembered(norm.weight.numel(), like=norm.weight) for layer, norm in pairs}

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = ctx.clear(x)
        steps = ((self.up, self.up_norm, self.up_lif), (self.down, self.down_norm, self.down_lif))
        for linear, norm, layer in steps:
            x = linear(layer(norm(x, ctx), ctx), ctx) if self.form == "pre" else layer(norm(linear(x, ctx), ctx), ctx)
        return x

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        return super().cost(shape, knobs) + Cost(state_bytes=slot_bytes(self.slots(), len(shape.lengths), self))
