"""(IA)^3: what keys, values and the hidden units of feed-forwards say, multiplied by a learned factor each.

    y = l * base(x)   (keys, values)        y = base(l * x)   (the feed-forward's second linear)

Liu et al., 2022 (2205.05638). All factors start at one, which changes no bit. Cost: one multiplication an entry; d
parameters for each of k and v and f for a feed-forward of hidden width f: (2 d + f) L in L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError
from formwright.parts.base import LinearLike
from formwright.parts.context import Context
from formwright.parts.linears.adapted import Change, cut
from formwright.registry import Paper, register
from formwright.surgery.adapt._changes import Adapts

SIDES = ("out", "in")


@register("change", "ia3", paper=Paper("Liu et al.", 2022, "2205.05638"), summary="outputs or inputs, multiplied")
class IA3(Change):
    """``l``: (out,) with ``side`` out, (in,) with side in."""

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"side": "out"}, {"side": "in"})

    def __init__(
        self, in_features: int, out_features: int, *, side: str = "out", number: int = 0, rate: float = 0.0
    ) -> None:
        super().__init__(number, rate)
        if side not in SIDES:
            raise SpecError(f"side={side!r} must be 'out' or 'in'")
        self.side = side
        self.l = nn.Parameter(torch.empty(out_features if side == "out" else in_features))

    def reset(self, generator: torch.Generator) -> None:
        self.l.fill_(1.0)

    def before(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.times(x, mask) if self.side == "in" else x

    def forward(self, x: Tensor, y: Tensor, base: LinearLike, ctx: Context | None, mask: Tensor | None) -> Tensor:
        return self.times(y, mask) if self.side == "out" else y

    def times(self, x: Tensor, mask: Tensor | None) -> Tensor:
        made = (x * self.l).to(x.dtype)
        return made if mask is None else torch.where(mask, made, x)

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = self.l.to(weight.dtype)
        if self.side == "in":
            return weight * factor, bias
        return weight * factor[:, None], None if bias is None else bias * factor

    def take(self, base: LinearLike, out: Tensor | None, inn: Tensor | None) -> IA3:
        size = self.l.shape[0]
        with torch.device("meta"):
            taken = IA3(size, size, side=self.side)
        taken.l = cut(self.l, 0, out if self.side == "out" else inn)
        return taken

    def extra_repr(self) -> str:
        return f"side={self.side}, number={self.number}"


@register(
    "surgery", "ia3", paper=Paper("Liu et al.", 2022, "2205.05638"), summary="keys, values and hidden units scaled"
)
class IA3Surgery(Adapts):
    """Options: inputs: roles whose inputs are multiplied, default down (other slots' outputs are). And those of
    :class:`Adapts`; default k, v and down."""

    own: ClassVar[Mapping[str, Any]] = {"inputs": ("down",)}
    places = ("k", "v", "down")
    examples = ({"where": ["k", "v", "down"]}, {"where": ["query", "up"], "inputs": ["up"], "name": "other"})

    def wrong(self, options: Mapping[str, Any]) -> list[str]:
        given = options["inputs"]
        right = not isinstance(given, str) and all(isinstance(role, str) for role in given)
        return [] if right else [f"ia3: inputs={given!r} must be a list of roles"]

    def size(self, slot: LinearLike, address: str, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"side": "in" if address.rpartition(":")[2] in options["inputs"] else "out"}
