"""The plain linear map: ``y = x W^T + b``. Cost: in x out multiply-accumulates a token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.kit.errors import Refusal
from formwright.ops.embedding import Source
from formwright.parts.base import Cost, LinearLike, Shape, TableLike
from formwright.parts.context import Context
from formwright.registry import register


@register("linear", "dense", summary="plain weight and bias")
class Dense(LinearLike):
    """weight (out, in), bias (out,) or None. Starts with Glorot-normal weights and zero bias."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, role: str = "") -> None:
        super().__init__()
        self.role = role
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return self.weight.shape[0]

    def reset(self, generator: torch.Generator) -> None:
        std = (2.0 / (self.in_features + self.out_features)) ** 0.5
        self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * std)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def dense_weight(self) -> Tensor:
        return self.weight

    def dense_bias(self) -> Tensor | None:
        return self.bias

    def take(self, out: Tensor | None = None, inn: Tensor | None = None) -> Dense:
        weight = self.weight.detach()
        weight = weight if out is None else weight[out]
        weight = weight if inn is None else weight[:, inn]
        with torch.device("meta"):
            taken = Dense(weight.shape[1], weight.shape[0], self.bias is not None, self.role)
        taken.weight = nn.Parameter(weight.clone(), requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            bias = self.bias.detach() if out is None else self.bias.detach()[out]
            taken.bias = nn.Parameter(bias.clone(), requires_grad=self.bias.requires_grad)
        return taken

    def scale_in(self, s: float) -> None:
        with torch.no_grad():
            self.weight.mul_(s)

    def cost(self, shape: Shape) -> Cost:
        size = self.in_features * self.out_features
        return Cost(size + (self.out_features if self.bias is not None else 0), size * shape.tokens)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}, role={self.role!r}"


class Table(TableLike):
    """A plain float table; ``std`` of its normal start."""

    def __init__(self, rows: int, width: int, std: float = 0.02) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(rows, width))

    @property
    def rows(self) -> int:  # type: ignore[override]
        return self.weight.shape[0]

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.weight.shape[1]

    def reset(self, generator: torch.Generator) -> None:
        self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * self.std)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def dense_weight(self) -> Tensor:
        return self.weight

    def source(self, ids: Tensor | None, factor: float = 1.0) -> Source | None:
        return Source(self.weight, None, ids, factor)

    def extra_repr(self) -> str:
        return f"{self.rows} x {self.width}"


def dense_of(slot: LinearLike) -> Dense:
    """A :class:`Dense` equal to any slot that can be said densely; a Refusal with the reason otherwise."""
    weight, bias = slot.dense_weight().detach(), slot.dense_bias()
    if weight.dim() != 2:
        raise Refusal(f"slot {slot.role!r} states a weight of shape {tuple(weight.shape)}, not a matrix")
    with torch.device("meta"):
        dense = Dense(weight.shape[1], weight.shape[0], bias is not None, slot.role)
    dense.weight = nn.Parameter(weight.clone())
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().clone())
    return dense
