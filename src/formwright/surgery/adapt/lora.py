"""LoRA: train a small product beside frozen weights, and keep one model for many tasks.

    y = base(x) + scaling B A dropout(x),   A (rank, in), B (out, rank)

Hu et al., 2021 (2106.09685); scaling is alpha / rank, or alpha / sqrt(rank) with ``rslora`` (Kalajdzievski, 2023,
2312.03732). A starts uniform in +-1/sqrt(in) and B at zero, so an adapter begins as nothing at all. A further plan with
another name adds an adapter to slots that have one already; rows of a batch choose theirs by number
(:mod:`formwright.surgery.adapt.switch`). Cost: rank (in + out) parameters and products a token in each slot; with r on
the q and v of L square layers of width d, 4 r d L parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.kit.errors import SpecError
from formwright.ops.lora_linear import lora_linear
from formwright.parts.base import Cost, LinearLike, Shape, hooked
from formwright.parts.context import Context
from formwright.parts.linears.adapted import Change, cut
from formwright.parts.linears.dense import Dense
from formwright.registry import Paper, register
from formwright.surgery.adapt._changes import Adapts, count, number


@register("change", "lora", paper=Paper("Hu et al.", 2021, "2106.09685"), summary="y + scaling B A x")
class LoRA(Change):
    """One pair ``A`` (rank, in), ``B`` (out, rank)."""

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"rank": 3},)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        scaling: float = 2.0,
        number: int = 0,
        rate: float = 0.0,
    ) -> None:
        super().__init__(number, rate)
        if not 1 <= rank <= min(in_features, out_features):
            raise SpecError(
                f"rank={rank} must be at least 1 and at most {min(in_features, out_features)}, the smaller side of a "
                f"{out_features} x {in_features} weight"
            )
        self.scaling = scaling
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))

    def reset(self, generator: torch.Generator) -> None:
        bound = self.A.shape[1] ** -0.5
        self.A.copy_(torch.rand(self.A.shape, generator=generator) * (2 * bound) - bound)
        self.B.zero_()

    def forward(self, x: Tensor, y: Tensor, base: LinearLike, ctx: Context | None, mask: Tensor | None) -> Tensor:
        return y + self.product(self.dropped(x, ctx), mask).to(y.dtype)

    def alone(self, x: Tensor, base: LinearLike, ctx: Context | None) -> Tensor:
        """In one step where the base is a plain weight; the terms one by one otherwise."""
        if type(base) is not Dense or hooked(base) or (self.rate and self.training):
            return super().alone(x, base, ctx)
        return lora_linear(x, base.weight, base.bias, self.A, self.B, self.scaling)

    def product(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """scaling B A x; where ``mask`` (..., 1) is False, zeros."""
        inner = F.linear(x.to(self.A.dtype), self.A) * self.scaling
        if mask is not None:
            inner = torch.where(mask, inner, 0.0)
        return F.linear(inner, self.B)

    def weight(self) -> Tensor:
        """scaling B A, (out, in)."""
        return self.scaling * (self.B @ self.A)

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.weight().to(weight.dtype), bias

    def take(self, base: LinearLike, out: Tensor | None, inn: Tensor | None) -> LoRA:
        taken = copy.deepcopy(self)
        taken.A, taken.B = cut(self.A, 1, inn), cut(self.B, 0, out)
        return taken

    def scale_in(self, s: float) -> None:
        self.A.mul_(s)

    def cost(self, shape: Shape) -> Cost:
        size = self.A.numel() + self.B.numel()
        return Cost(size, size * shape.tokens)

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[0]}, scaling={self.scaling:g}, number={self.number}"


class LowRank(Adapts):
    """Options of LoRA and its kin:

    rank: of A and B, default 8. alpha: scaling is alpha / rank (alpha / sqrt(rank) with ``rslora``), default 2 rank.
    dropout: of the adapter's input while training. And those of :class:`Adapts`; default q and v.
    """

    own: ClassVar[Mapping[str, Any]] = {"rank": 8, "alpha": None, "rslora": False, "dropout": 0.0}

    def wrong(self, options: Mapping[str, Any]) -> list[str]:
        found = count(f"{self.name}: rank", options["rank"])
        found += number(f"{self.name}: dropout", options["dropout"], 0.0, 1.0)
        if options["alpha"] is not None:
            found += number(f"{self.name}: alpha", options["alpha"], 0.0, above=True)
        return found

    def size(self, slot: LinearLike, address: str, options: Mapping[str, Any]) -> int:
        return options["rank"]

    def shared(self, options: Mapping[str, Any], slots: Sequence[str]) -> dict[str, Any]:
        rank, alpha = options["rank"], options["alpha"]
        alpha = 2.0 * rank if alpha is None else float(alpha)
        return {
            "scaling": alpha / (math.sqrt(rank) if options["rslora"] else rank),
            "dropout": float(options["dropout"]),
        }

    def arguments(self, decisions: Mapping[str, Any], address: str) -> dict[str, Any]:
        scaling = decisions.get("scalings", {}).get(address, decisions["scaling"])
        return {"rank": decisions["slots"][address], "scaling": scaling, "rate": decisions["dropout"]}

    def told(self, decisions: Mapping[str, Any]) -> str:
        ranks = sorted(set(decisions["slots"].values()))
        size = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return f"{self.name}, {size}"


@register(
    "surgery", "lora", paper=Paper("Hu et al.", 2021, "2106.09685"), summary="low-rank adapters beside the weights"
)
class Lora(LowRank):
    __doc__ = LowRank.__doc__

    examples = ({"rank": 2}, {"rank": 3, "alpha": 1.0, "rslora": True, "where": ["q", "o"], "name": "other"})
