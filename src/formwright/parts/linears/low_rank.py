"""Low rank: two thin products in place of one wide one.

    y = second(first(x)),   first (rank, in) without bias, second (out, rank) with the bias

Winata et al., 2020 (1910.13923): the linear encoder-decoder. Cost: rank (in + out) parameters and multiply-accumulates
a token against in x out; it pays below the break-even rank in out / (in + out).
"""

from __future__ import annotations

import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.parts.base import Cost, LinearLike, Shape
from formwright.parts.context import Context
from formwright.parts.linears.dense import Dense
from formwright.registry import Paper, register


def break_even(in_features: int, out_features: int) -> int:
    """The rank at which two factors hold as many numbers as the matrix, rounded down."""
    return in_features * out_features // (in_features + out_features)


@register("linear", "low-rank", paper=Paper("Winata et al.", 2020, "1910.13923"), summary="two thin linears")
class LowRank(LinearLike):
    """``first`` (rank, in) and ``second`` (out, rank); either may itself become another kind of linear."""

    examples = ({"rank": 4}, {"rank": 1, "bias": False})

    def __init__(self, in_features: int, out_features: int, bias: bool = True, role: str = "", *, rank: int) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise SpecError(
                f"rank={rank} of a {out_features} x {in_features} weight must be at least 1 and at most "
                f"{min(in_features, out_features)}"
            )
        self.role = role
        self.first: LinearLike = Dense(in_features, rank, False, role)
        self.second: LinearLike = Dense(rank, out_features, bias, role)

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return self.first.in_features

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return self.second.out_features

    @property
    def rank(self) -> int:
        return self.first.out_features

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        return self.second(self.first(x, ctx), ctx)

    def dense_weight(self) -> Tensor:
        return self.second.dense_weight() @ self.first.dense_weight()

    def dense_bias(self) -> Tensor | None:
        return self.second.dense_bias()

    def take(self, out: Tensor | None = None, inn: Tensor | None = None) -> LowRank:
        with torch.device("meta"):
            taken = LowRank(1, 1, False, self.role, rank=1)
        taken.first = self.first.take(None, inn)
        taken.second = self.second.take(out, None)
        return taken

    def scale_in(self, s: float) -> None:
        self.first.scale_in(s)

    def cost(self, shape: Shape) -> Cost:
        return self.first.cost(shape) + self.second.cost(shape)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, role={self.role!r}"
