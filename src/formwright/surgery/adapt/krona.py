"""KronA: a change that is the Kronecker product of two small matrices.

    y = base(x) + s (A (x) B) x,   A (a, b), B (out / a, in / b)

Edalati et al., 2022 (2212.10650). The product has full rank where its factors have, with as few numbers as a low-rank
one. B starts at zero. It is never formed: x is read as a matrix (b, in / b), and y is A x B^T. Cost:
a b + (out / a) (in / b) parameters; in out / a + a b (out / a) products a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from formwright.kit.errors import Refusal, SpecError
from formwright.parts.base import Cost, LinearLike, Shape
from formwright.parts.context import Context
from formwright.parts.linears.adapted import Change
from formwright.registry import Paper, register
from formwright.surgery.adapt._changes import Adapts, count, number


@register("change", "krona", paper=Paper("Edalati et al.", 2022, "2212.10650"), summary="y + s (A kron B) x")
class KronA(Change):
    """``A`` (rows, columns), ``B`` (out / rows, in / columns)."""

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"rows": 4, "columns": 8},)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rows: int,
        columns: int,
        scaling: float = 1.0,
        number: int = 0,
        rate: float = 0.0,
    ) -> None:
        super().__init__(number, rate)
        if rows < 1 or columns < 1 or out_features % rows or in_features % columns:
            raise SpecError(
                f"a {out_features} x {in_features} weight is no Kronecker product with a {rows} x {columns} matrix: "
                "each side must be divided without rest"
            )
        self.scaling = scaling
        self.A = nn.Parameter(torch.empty(rows, columns))
        self.B = nn.Parameter(torch.empty(out_features // rows, in_features // columns))

    def reset(self, generator: torch.Generator) -> None:
        bound = self.A.shape[1] ** -0.5
        self.A.copy_(torch.rand(self.A.shape, generator=generator) * (2 * bound) - bound)
        self.B.zero_()

    def forward(self, x: Tensor, y: Tensor, base: LinearLike, ctx: Context | None, mask: Tensor | None) -> Tensor:
        seen = self.dropped(x, ctx).to(self.A.dtype).unflatten(-1, (self.A.shape[1], -1))
        made = (self.A * self.scaling @ (seen @ self.B.t())).flatten(-2)
        return y + (made if mask is None else torch.where(mask, made, 0.0)).to(y.dtype)

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + (self.scaling * torch.kron(self.A, self.B)).to(weight.dtype), bias

    def take(self, base: LinearLike, out: Tensor | None, inn: Tensor | None) -> Change:
        raise Refusal("single rows and columns cannot be taken from a Kronecker product; merge the adapter first")

    def scale_in(self, s: float) -> None:
        self.A.mul_(s)

    def cost(self, shape: Shape) -> Cost:
        (rows, columns), (high, wide) = self.A.shape, self.B.shape
        return super().cost(shape) + Cost(0, (columns * wide * high + rows * columns * high) * shape.tokens)

    def extra_repr(self) -> str:
        return f"{tuple(self.A.shape)} x {tuple(self.B.shape)}, scaling={self.scaling:g}, number={self.number}"


@register("surgery", "krona", paper=Paper("Edalati et al.", 2022, "2212.10650"), summary="Kronecker products")
class Krona(Adapts):
    """Options: factor: sides of A, as near to it as divides the linear's, default 32. scaling: default 1. dropout: of
    the adapter's input while training. And those of :class:`Adapts`; default q and v."""

    own: ClassVar[Mapping[str, Any]] = {"factor": 32, "scaling": 1.0, "dropout": 0.0}
    examples = ({"factor": 4},)

    def wrong(self, options: Mapping[str, Any]) -> list[str]:
        found = count("krona: factor", options["factor"])
        found += number("krona: dropout", options["dropout"], 0.0, 1.0)
        return found + number("krona: scaling", options["scaling"], 0.0, above=True)

    def size(self, slot: LinearLike, address: str, options: Mapping[str, Any]) -> dict[str, int]:
        sides = [nearest_divisor(side, options["factor"]) for side in (slot.out_features, slot.in_features)]
        return {"rows": sides[0], "columns": sides[1]}

    def shared(self, options: Mapping[str, Any], slots: Sequence[str]) -> dict[str, Any]:
        return {"scaling": float(options["scaling"]), "dropout": float(options["dropout"])}

    def arguments(self, decisions: Mapping[str, Any], address: str) -> dict[str, Any]:
        own = super().arguments(decisions, address)
        return {**own, "scaling": decisions["scaling"], "rate": decisions["dropout"]}


def nearest_divisor(whole: int, wanted: int) -> int:
    """The divisor of ``whole`` nearest to ``wanted``, the smaller of two."""
    return min((n for n in range(1, whole + 1) if whole % n == 0), key=lambda n: (abs(n - wanted), n))
