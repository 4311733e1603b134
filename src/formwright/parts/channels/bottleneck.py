"""The bottleneck: a two-layer perceptron much narrower than the stream, ``scale up(act(down(x)))``.

Houlsby et al., 2019 (1902.00751): what an adapter puts beside or behind a frozen sublayer. ``up`` starts at zero, so a
new one adds nothing. Cost: 2 width x hidden multiply-accumulates a token.
"""

from __future__ import annotations

from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.parts.activations import activation as activation_named
from formwright.parts.base import Part, Traits, dropout
from formwright.parts.context import Context
from formwright.parts.linears.dense import Dense
from formwright.registry import Paper, register


@register("channel", "bottleneck", paper=Paper("Houlsby et al.", 2019, "1902.00751"), summary="a narrow perceptron")
class Bottleneck(Part):
    """Slots ``down`` (hidden, W) and ``up`` (W, hidden). ``dropout``: of what ``up`` reads, while training."""

    traits = Traits(causal=True, streams=True)
    axes = {"down": ("bottleneck", "stream"), "up": ("stream", "bottleneck")}
    examples = ({"hidden": 4}, {"hidden": 3, "activation": "relu", "scale": 2.0})

    def __init__(
        self, width: int, *, hidden: int, activation: str = "gelu", scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if hidden < 1:
            raise SpecError(f"hidden={hidden} of a bottleneck must be at least 1")
        self.activation, self.scale, self.rate = activation_named(activation), scale, dropout
        self.down = Dense(width, hidden, True, "down")
        self.up = Dense(hidden, width, True, "up")

    def settle(self) -> None:
        """After all resets: nothing is added at the start."""
        for parameter in self.up.parameters():
            parameter.zero_()

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        hidden = self.activation(self.down(ctx.clear(x), ctx))
        y = self.up(dropout(hidden, self.rate, ctx, self.training, "dropout"), ctx)
        return y if self.scale == 1.0 else y * self.scale
