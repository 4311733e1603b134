"""Combinators: parts made of parts. ``chain`` runs them one after another, ``parallel`` side by side on one input.

Cost: the sum of what they hold.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError
from formwright.parts.base import Cost, Part, Shape, Slot, Traits, cost_sum
from formwright.parts.context import EMPTY, Context
from formwright.registry import register


def joined(parts: list[Part], lookahead: int) -> Traits:
    """What holds for all of them holds for the whole."""
    order = ("exact", "piecewise", "surrogate", "none")
    growth = ("linear", "n log n", "n sqrt n", "quadratic")
    lengths = [p.traits.length for p in parts if p.traits.length != "any"]
    return Traits(
        causal=all(p.traits.causal for p in parts),
        streams=all(p.traits.streams for p in parts),
        lookahead=lookahead,
        gradient=max((p.traits.gradient for p in parts), key=order.index),
        statistics=any(p.traits.statistics for p in parts),
        selects=any(p.traits.selects for p in parts),
        packed=all(p.traits.packed for p in parts),
        length=min(lengths) if lengths else "any",  # type: ignore[type-var]
        growth=max((p.traits.growth for p in parts), key=growth.index),
    )


class _Several(Part):
    def __init__(self, width: int, parts: list[dict]) -> None:
        super().__init__()
        from formwright.parts.make import make_part

        if not parts:
            raise SpecError("a combinator needs at least one part")
        self.parts = nn.ModuleList(make_part(node, width) for node in parts)
        held: list[Part] = list(self.parts)  # type: ignore[arg-type]
        self.traits = joined(held, self.reach([part.traits.lookahead for part in held]))
        self.reads = tuple(name for part in held for name in part.reads)
        self.writes = tuple(name for part in held for name in part.writes)

    def reach(self, lookaheads: list[int]) -> int:
        """How far the whole looks ahead, from how far each part does."""
        return sum(lookaheads)

    def slots(self) -> dict[str, Slot]:
        return {
            f"{index}.{name}": slot
            for index, part in enumerate(self.parts)
            for name, slot in part.slots().items()  # type: ignore[operator]
        }

    def furnish(self, ctx: Context, x: Tensor, generator: torch.Generator) -> Context:
        for part in self.parts:
            ctx = part.furnish(ctx, x, generator)  # type: ignore[operator]
        return ctx

    def cost(self, shape: Shape, knobs=EMPTY) -> Cost:
        return cost_sum([part.cost(shape, knobs) for part in self.parts])  # type: ignore[operator]


@register("combinator", "chain", summary="parts one after another")
class Chain(_Several):
    """y = part_n(... part_1(x)), no residual in between."""

    examples = ({"parts": [{"part": "mlp", "hidden": 24}, {"part": "attention", "heads": 2, "causal": True}]},)

    def __init__(self, width: int, *, parts: list[dict]) -> None:
        super().__init__(width, parts)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        for index, part in enumerate(self.parts):
            x = part(x, ctx.at(str(index)))
        return x


@register("combinator", "parallel", summary="parts side by side, fused by sum, mean or learned weights")
class Parallel(_Several):
    """All parts see x. ``fuse``: "sum", "mean", or "weighted" (softmax of learned logits, equal at the start)."""

    examples = (
        {"parts": [{"part": "mlp", "hidden": 24}, {"part": "attention", "heads": 2}]},
        {
            "parts": [{"part": "mlp", "hidden": 16}, {"part": "attention", "heads": 2, "causal": True}],
            "fuse": "weighted",
        },
        {"parts": [{"part": "mlp", "hidden": 16}, {"part": "gated-mlp", "hidden": 8}], "fuse": "mean"},
    )

    def __init__(self, width: int, *, parts: list[dict], fuse: Literal["sum", "mean", "weighted"] = "sum") -> None:
        super().__init__(width, parts)
        if fuse not in ("sum", "mean", "weighted"):
            raise SpecError(f"fuse {fuse!r} is none of sum, mean, weighted")
        self.fuse = fuse
        self.logits = nn.Parameter(torch.empty(len(parts))) if fuse == "weighted" else None

    def reach(self, lookaheads: list[int]) -> int:
        return max(lookaheads)

    def reset(self, generator: torch.Generator) -> None:
        if self.logits is not None:
            self.logits.zero_()

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        outputs = [part(x, ctx.at(str(index))) for index, part in enumerate(self.parts)]
        if self.logits is not None:
            weights = torch.softmax(self.logits, 0)
            return sum(weight * y for weight, y in zip(weights, outputs))  # type: ignore[return-value]
        total = outputs[0]
        for y in outputs[1:]:
            total = total + y
        return total / len(outputs) if self.fuse == "mean" else total

    def cost(self, shape: Shape, knobs=EMPTY) -> Cost:
        extra = 0 if self.logits is None else self.logits.numel()
        return super().cost(shape, knobs) + Cost(extra)
