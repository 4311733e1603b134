"""VeRA: one random pair of matrices for all slots, and for each slot two vectors that scale it.

    y = base(x) + b * (B (d * (A x))),   A (rank, in), B (out, rank) fixed and shared

Kopiczko et al., 2023 (2310.11454). A and B are drawn once, as wide as the widest slot; a narrower one uses their first
columns and rows. b starts at zero, so nothing changes at the start. Cost: rank + out trained parameters a slot, LoRA's
products at the same rank; A and B are kept once, with the adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.parts.base import Cost, LinearLike, Shape
from formwright.parts.context import Context
from formwright.parts.linears.adapted import Change, cut, whole
from formwright.registry import Paper, register
from formwright.surgery.adapt._changes import Adapts, count, held, number
from formwright.surgery.base import Displaced, Plan, slot_generator


class Projections(nn.Module):
    """``A`` (rank, widest in) and ``B`` (widest out, rank), fixed."""

    def __init__(self, rank: int, inn: int, out: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, inn), requires_grad=False)
        self.B = nn.Parameter(torch.empty(out, rank), requires_grad=False)

    def reset(self, generator: torch.Generator) -> None:
        for factor in (self.A, self.B):
            bound = (6.0 / factor.shape[1]) ** 0.5
            factor.copy_(torch.rand(factor.shape, generator=generator) * (2 * bound) - bound)


@register("change", "vera", paper=Paper("Kopiczko et al.", 2023, "2310.11454"), summary="y + b * B (d * A x)")
class VeRA(Change):
    """``d`` (rank,), ``b`` (out,); ``shared`` holds A and B, the same module in all slots of one adapter."""

    trained = ("d", "b")
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"rank": 3},)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        widest: Sequence[int] | None = None,
        number: int = 0,
        rate: float = 0.0,
    ) -> None:
        super().__init__(number, rate)
        whole("rank", rank)
        self.d = nn.Parameter(torch.empty(rank))
        self.b = nn.Parameter(torch.empty(out_features))
        self.shared = Projections(rank, *(widest or (in_features, out_features)))
        self.inputs = in_features

    def reset(self, generator: torch.Generator) -> None:
        self.d.fill_(0.1)
        self.b.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """This slot's A and B."""
        return self.shared.A[:, : self.inputs], self.shared.B[: self.b.shape[0]]

    def forward(self, x: Tensor, y: Tensor, base: LinearLike, ctx: Context | None, mask: Tensor | None) -> Tensor:
        a, b = self.factors()
        inner = F.linear(self.dropped(x, ctx).to(a.dtype), a) * self.d
        if mask is not None:
            inner = torch.where(mask, inner, 0.0)
        return y + (F.linear(inner, b) * self.b).to(y.dtype)

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b = self.factors()
        return weight + (self.b[:, None] * (b @ (self.d[:, None] * a))).to(weight.dtype), bias

    def take(self, base: LinearLike, out: Tensor | None, inn: Tensor | None) -> VeRA:
        """With factors of its own, since no other slot uses these rows and columns."""
        taken, (a, b) = copy.deepcopy(self), self.factors()
        taken.b = cut(self.b, 0, out)
        taken.shared.A = nn.Parameter(a[:, inn] if inn is not None else a.clone(), requires_grad=False)
        taken.shared.B = nn.Parameter(b[out] if out is not None else b.clone(), requires_grad=False)
        taken.inputs = taken.shared.A.shape[1]
        return taken

    def scale_in(self, s: float) -> None:
        self.d.mul_(s)

    def cost(self, shape: Shape) -> Cost:
        products = len(self.d) * (self.inputs + len(self.b))
        return super().cost(shape) + Cost(0, products * shape.tokens)

    def extra_repr(self) -> str:
        return f"rank={len(self.d)}, number={self.number}"


@register("surgery", "vera", paper=Paper("Kopiczko et al.", 2023, "2310.11454"), summary="one random pair, scaled")
class Vera(Adapts):
    """Options: rank: default 256. dropout: of the adapter's input while training. And those of :class:`Adapts`; default
    q and v."""

    own: ClassVar[Mapping[str, Any]] = {"rank": 256, "dropout": 0.0}
    examples = ({"rank": 3}, {"rank": 4, "where": ["q", "down"], "name": "other"})

    def wrong(self, options: Mapping[str, Any]) -> list[str]:
        return count("vera: rank", options["rank"]) + number("vera: dropout", options["dropout"], 0.0, 1.0)

    def size(self, slot: LinearLike, address: str, options: Mapping[str, Any]) -> list[int]:
        return [slot.in_features, slot.out_features]

    def shared(self, options: Mapping[str, Any], slots: Sequence[str]) -> dict[str, Any]:
        return {"rank": options["rank"], "dropout": float(options["dropout"])}

    def arguments(self, decisions: Mapping[str, Any], address: str) -> dict[str, Any]:
        widest = [max(sizes) for sizes in zip(*decisions["slots"].values())]
        return {"rank": decisions["rank"], "rate": decisions["dropout"], "widest": widest}

    def reshape(self, model: Any, plan: Plan) -> Displaced:
        displaced = super().reshape(model, plan)
        changes: list[VeRA] = list(held(model, plan).values())  # type: ignore[arg-type]
        for change in changes:
            change.shared = changes[0].shared
        return displaced

    def fill(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        super().fill(model, plan, displaced)
        changes: list[VeRA] = list(held(model, plan).values())  # type: ignore[arg-type]
        changes[0].shared.reset(slot_generator(plan.decisions["seed"], plan.decisions["name"]))

    def told(self, decisions: Mapping[str, Any]) -> str:
        return f"{self.name}, rank {decisions['rank']}"
