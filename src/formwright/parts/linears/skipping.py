"""Skipping: a linear that reads only the columns whose input is not zero.

Its weight is held (in, out), so that what one hidden unit adds lies together (:mod:`formwright.ops.active_product`). At
a tolerance of 0 it is the dense linear, exactly; it pays for a few tokens at a time behind an activation with true
zeros, such as relu. Cost: in x out multiply-accumulates a token at most, and of these the share that is active.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError
from formwright.ops.active_product import active_product
from formwright.parts.base import Cost, LinearLike, Shape
from formwright.parts.context import Context
from formwright.registry import Paper, register


@register("linear", "skipping", paper=Paper("Runwal et al.", 2024, "2402.01911"), summary="a linear that skips zeros")
class Skipping(LinearLike):
    """``columns`` (in, out) and ``bias`` (out). tolerance: inputs up to this size count as zero."""

    examples: ClassVar[tuple[dict, ...]] = ({}, {"bias": False, "tolerance": 0.05})

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, role: str = "", *, tolerance: float = 0.0
    ) -> None:
        super().__init__()
        if not 0.0 <= tolerance < float("inf"):
            raise SpecError(f"tolerance={tolerance} must be a finite number of at least 0")
        self.role, self.tolerance = role, tolerance
        self.columns = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return self.columns.shape[0]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return self.columns.shape[1]

    def reset(self, generator: torch.Generator) -> None:
        std = (2.0 / (self.in_features + self.out_features)) ** 0.5
        self.columns.copy_(torch.randn(self.columns.shape, generator=generator) * std)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        return active_product(x, self.columns, self.bias, self.tolerance)

    def dense_weight(self) -> Tensor:
        return self.columns.T

    def dense_bias(self) -> Tensor | None:
        return self.bias

    def take(self, out: Tensor | None = None, inn: Tensor | None = None) -> Skipping:
        columns = self.columns.detach()
        columns = columns if inn is None else columns[inn]
        columns = columns if out is None else columns[:, out]
        with torch.device("meta"):
            taken = Skipping(
                columns.shape[0], columns.shape[1], self.bias is not None, self.role, tolerance=self.tolerance
            )
        taken.columns = nn.Parameter(columns.clone(), requires_grad=self.columns.requires_grad)
        if self.bias is not None:
            bias = self.bias.detach() if out is None else self.bias.detach()[out]
            taken.bias = nn.Parameter(bias.clone(), requires_grad=self.bias.requires_grad)
        return taken

    def scale_in(self, s: float) -> None:
        with torch.no_grad():
            self.columns.mul_(s)

    def cost(self, shape: Shape) -> Cost:
        size = self.columns.numel()
        return Cost(size + (self.out_features if self.bias is not None else 0), size * shape.tokens)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, tolerance={self.tolerance:g}, role={self.role!r}"
