"""Token mixers on a fixed Legendre memory: ``lmu`` and, with neurons that spike, ``spiking-lmu``.

    lmu: norm(out(cell(x)))        spiking-lmu: norm(out(cell(spikes(norm(x)))))

Liu, Datta, Li and Beerel, 2024 (LMUFormer, 2402.04882). The memory holds the last ``theta`` tokens of one scalar signal
as ``memory`` Legendre coefficients; nothing in it is learned, so a text is mixed in parallel by a convolution and a
stream by its recurrence, with equal outputs. Norms are batch norms: a stream needs ``model.eval()``. Cost:
W + hidden (memory + 2 W) multiply-accumulates a token, and those of the memory (see ``ops/legendre_memory``); state:
``memory`` values, spiking also a voltage a neuron.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from formwright.parts.base import Cost, Part, Shape, Slot, Traits
from formwright.parts.context import EMPTY, Context
from formwright.parts.legendre import Cell, SpikingCell, spiked
from formwright.parts.linears.dense import Dense
from formwright.parts.norms.batch import BatchNorm
from formwright.parts.pieces import pieced
from formwright.parts.spikes import LIF
from formwright.parts.streaming import refuse_rules, remembered, slot_bytes
from formwright.registry import Paper, register

AXES = {
    "cell.input": ("signal", "stream"),
    "cell.hidden": ("hidden", "memory+stream"),
    "out": ("stream", "hidden"),
}


@register(
    "mixer",
    "lmu",
    paper=Paper("Liu, Datta, Li and Beerel", 2024, "2402.04882"),
    summary="fixed Legendre memory of the last theta tokens",
)
class LMU(Part):
    """Slots ``cell.input`` (1, W), ``cell.hidden`` (hidden, memory + W) and ``out`` (W, hidden).

    Args: ``theta``: tokens that the memory reaches back. ``memory``: its coefficients (default W). ``hidden`` (default
        W). ``activation`` of the cell, ``input_activation`` of its scalar signal. ``batch_norm``: one at the end.
    """

    traits = Traits(causal=True, streams=True, statistics=True)
    axes = AXES
    examples = (
        {"theta": 9},
        {
            "theta": 4.5,
            "memory": 6,
            "hidden": 20,
            "activation": "tanh",
            "input_activation": "identity",
            "batch_norm": False,
        },
    )

    def __init__(
        self,
        width: int,
        *,
        theta: float = 128,
        memory: int | None = None,
        hidden: int | None = None,
        activation: str = "relu",
        input_activation: str = "relu",
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        inner = width if hidden is None else hidden
        self.cell = Cell(width, inner, width if memory is None else memory, theta, activation, input_activation)
        self.out = Dense(inner, width, True, "out")
        self.norm = BatchNorm(width) if batch_norm else None

    def slots(self) -> dict[str, Slot]:
        """What a stream remembers for each row: the memory."""
        return self.cell.slots()

    @pieced
    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        refuse_rules(ctx, "lmu")
        return spiked(self.out(self.cell(ctx.clear(x), ctx), ctx), self.norm, None, ctx)


@register(
    "mixer",
    "spiking-lmu",
    paper=Paper("Liu, Datta, Li and Beerel", 2024, "2402.04882"),
    summary="Legendre memory between spiking neurons",
)
class SpikingLMU(Part):
    """Slots as in ``lmu``; nothing but spikes enters them.

    Args: ``theta``, ``memory`` (default 2 W), ``hidden`` (default W). ``tau``: leak of all neurons. ``threshold`` of
        the neurons at the entrance. ``form``: "pre" fires before the cell and adds a current to the stream; "post"
        takes the stream as it is and adds spikes.
    """

    traits = Traits(causal=True, streams=True, statistics=True, gradient="surrogate")
    axes = AXES
    examples = ({"theta": 9}, {"theta": 5, "memory": 6, "hidden": 20, "form": "post", "tau": 1.5})

    def __init__(
        self,
        width: int,
        *,
        theta: float = 128,
        memory: int | None = None,
        hidden: int | None = None,
        tau: float = 2.0,
        threshold: float = 0.5,
        form: Literal["pre", "post"] = "pre",
    ) -> None:
        super().__init__()
        inner = width if hidden is None else hidden
        self.norm_in = BatchNorm(width) if form == "pre" else None
        self.lif_in = LIF("stream", threshold, tau) if form == "pre" else None
        self.cell = SpikingCell(width, inner, 2 * width if memory is None else memory, theta, tau=tau)
        self.out = Dense(inner, width, True, "out")
        self.norm = BatchNorm(width)
        self.lif_out = LIF("out", tau=tau) if form == "post" else None

    def _own(self) -> dict[str, Slot]:
        like = self.out.dense_weight()
        layers = [layer for layer in (self.lif_in, self.lif_out) if layer is not None]
        return {layer.slot: remembered(self.out.out_features, like=like) for layer in layers}

    def slots(self) -> dict[str, Slot]:
        """What a stream remembers for each row: the memory and the voltages."""
        return {**self.cell.slots(), **self._own()}

    @pieced
    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        refuse_rules(ctx, "spiking-lmu")
        x = spiked(ctx.clear(x), self.norm_in, self.lif_in, ctx)
        return spiked(self.out(self.cell(x, ctx), ctx), self.norm, self.lif_out, ctx)

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        return super().cost(shape, knobs) + Cost(state_bytes=slot_bytes(self._own(), len(shape.lengths), self))
