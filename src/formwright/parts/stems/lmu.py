"""A stem that is a Legendre memory unit: a signal of few values a step becomes a stream of any width.

    x = cell(relu(norm(lift(values))))        spiking: spikes of the cell on the values themselves

Voelker, Kajic and Eliasmith, 2019; pixel by pixel as in Liu, Datta, Li and Beerel, 2024 (2402.04882). Cost: the cell's,
width (memory + values) multiply-accumulates a step beside the memory; a stream remembers ``memory`` values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.kit.errors import DataError
from formwright.parts.context import Context
from formwright.parts.legendre import Cell, SpikingCell
from formwright.parts.linears.dense import Dense
from formwright.parts.norms.batch import BatchNorm
from formwright.parts.stems.tokens import Stem
from formwright.registry import Paper, register


@register(
    "stem",
    "lmu-values",
    paper=Paper("Voelker, Kajic and Eliasmith", 2019),
    summary="a signal through a Legendre memory unit",
)
class LMUValues(Stem):
    """Reads ``values`` (B, L, features) float; slots ``cell.input``, ``cell.hidden`` and, with ``lift``, ``lift``.

    Args: ``memory``: Legendre coefficients; ``theta``: steps they reach back. ``lift``: values that a step is widened
        to first. ``spiking``: neurons fire the signal and the stream, without batch norms.
    """

    examples = (
        {"features": 2, "memory": 6, "theta": 8, "lift": 3},
        {"features": 1, "memory": 5, "theta": 8, "spiking": True},
    )

    def __init__(
        self,
        width: int,
        *,
        memory: int,
        theta: float,
        features: int = 1,
        lift: int | None = None,
        spiking: bool = False,
        tau: float = 2.0,
    ) -> None:
        super().__init__()
        inner = features if lift is None else lift
        self.width = width
        self.lift = None if lift is None else Dense(features, inner, True, "lift")
        self.norm = None if lift is None else BatchNorm(inner)
        self.cell = (
            SpikingCell(inner, width, memory, theta, tau=tau, norm=False, spike_memory=False)
            if spiking
            else Cell(inner, width, memory, theta)
        )

    @property
    def features(self) -> int:
        return (self.cell.input if self.lift is None else self.lift).in_features

    def field(self) -> str:
        return "values"

    def sample(self, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"values": torch.randn(batch, length, self.features, generator=generator)}

    def forward(self, inputs: dict[str, Tensor], ctx: Context) -> tuple[Tensor, Context]:
        if "values" not in inputs:
            raise DataError(f"this model reads 'values'; the batch holds {', '.join(sorted(inputs)) or 'nothing'}")
        x, inner = inputs["values"], ctx.at("stem")
        if x.dim() != 3 or x.shape[-1] != self.features:
            raise DataError(f"values have shape {tuple(x.shape)}; this model reads (rows, steps, {self.features})")
        if self.lift is not None and self.norm is not None:
            x = F.relu(self.norm(self.lift(x, inner), inner))
        return self.cell(x, inner), ctx
