"""Several ways through the same tokens: a causal mixer run along chosen orders of a grid, or forwards and backwards.

    y = merge_k back_k(mixer_k(there_k(x)))

A mixer that reads only the past reads everything once its walks reach every cell from all sides. Orders and papers:
:mod:`formwright.parts.orders`; two directions: Schuster and Paliwal, 1997, and Vim (Zhu et al., 2024, 2401.09417).
``there`` permutes the tokens before the mixer, so that whatever it derives from them is permuted with them. Cost: that
of the mixers, one for each order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError
from formwright.parts.base import Cost, Part, Shape, cost_sum
from formwright.parts.combinators.combinators import joined
from formwright.parts.context import EMPTY, Context
from formwright.parts.orders import CROSS, Walk, check_order, walk
from formwright.registry import Paper, register

Merge = Literal["sum", "mean", "multiply"]


def merged(outputs: list[Tensor], how: Merge) -> Tensor:
    """Outputs of several walks, back in place, as one."""
    if how == "multiply":
        return reduce(torch.mul, outputs)
    total = reduce(torch.add, outputs)
    return total / len(outputs) if how == "mean" else total


def refuse_rules(ctx: Context, name: str) -> None:
    """SpecError where the context restricts who sees whom: walks in several directions see everything."""
    if ctx.visible.causal or not ctx.visible.simple:
        raise SpecError(f"{ctx.path}: {name} reads its rows in several directions and takes no rule of visibility")


class _Walks(Part):
    """``parts``: one for each order, or a single one that every walk uses."""

    def __init__(self, width: int, nodes: list[dict], orders: tuple[str, ...], merge: Merge) -> None:
        super().__init__()
        from formwright.parts.make import make_part

        self.orders, self.merge = orders, merge
        self.parts = nn.ModuleList(make_part(node, width) for node in nodes)
        held: list[Part] = list(self.parts)  # type: ignore[arg-type]
        traits = joined(held, 0)
        if not traits.causal and traits.lookahead == 0:
            raise SpecError("the mixer of a scan must be causal; one that sees all tokens needs no scan")
        self.traits = replace(traits, causal=False, streams=False)
        self.reads = tuple(name for part in held for name in part.reads)

    def walks(self) -> list[tuple[str, Part]]:
        """(order, the part that walks it)."""
        parts = list(self.parts) * (len(self.orders) if len(self.parts) == 1 else 1)
        return list(zip(self.orders, parts))  # type: ignore[arg-type]

    def furnish(self, ctx: Context, x: Tensor, generator: torch.Generator) -> Context:
        for part in self.parts:
            ctx = part.furnish(ctx, x, generator)  # type: ignore[operator]
        return ctx

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        refuse_rules(ctx, type(self).registered[1])  # type: ignore[attr-defined]
        outputs = []
        for index, (order, part) in enumerate(self.walks()):
            path = walk(order, x, ctx)
            outputs.append(path.back(part(path.there(x), _along(path, ctx.at(str(index))))))
        return merged(outputs, self.merge)

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        held = cost_sum([part.cost(shape, knobs) for part in self.parts])  # type: ignore[operator]
        return Cost(held.parameters, sum(part.cost(shape, knobs).macs for _, part in self.walks()))


def _along(path: Walk, ctx: Context) -> Context:
    """The context as the walk meets it: a line of its own, counted from its start, that no stream goes on."""
    return ctx.replace(
        state=None,
        grid=None,
        prefix=0,
        positions=None,
        origin=None if ctx.origin is None else path.there(ctx.origin),
        coords=None if ctx.coords is None else path.there(ctx.coords),
        marks={name: path.there(mark) for name, mark in ctx.marks.items()},
    )


@register(
    "combinator",
    "scan",
    paper=Paper("Liu et al.", 2024, "2401.10166"),
    summary="a causal mixer along several orders of a grid",
)
class Scan(_Walks):
    """Every order has a mixer of its own, or all use one (``share``).

    Args:
        mixer: the mixer, as in a layer list.
        orders: names of :mod:`formwright.parts.orders`; default the four of the cross-scan.
        share: one set of parameters for all orders.
        merge: "sum", "mean" or "multiply" over the orders.
    """

    examples = (
        {"mixer": {"part": "attention", "heads": 2, "causal": True, "window": 3}, "orders": ["row", "row-reversed"]},
        {
            "mixer": {"part": "attention", "heads": 2, "causal": True, "bias": False},
            "orders": ["column-reversed", "snake"],
            "share": True,
            "merge": "mean",
        },
    )

    def __init__(
        self, width: int, *, mixer: dict, orders: list[str] | None = None, share: bool = False, merge: Merge = "sum"
    ) -> None:
        chosen = CROSS if orders is None else tuple(orders)
        if not chosen:
            raise SpecError("orders must name at least one order")
        for name in chosen:
            check_order(name)
        super().__init__(width, [mixer] * (1 if share else len(chosen)), chosen, merge)


@register(
    "combinator",
    "bidirectional",
    paper=Paper("Schuster and Paliwal", 1997),
    summary="a causal mixer forwards and backwards",
)
class Bidirectional(_Walks):
    """One mixer reads each row or document from its first token, one from its last, within its own length.

    Args:
        mixer: the mixer, as in a layer list. reverse: the one that reads backwards, default of the same kind.
        share: one set of parameters for both directions.
        merge: "sum", "mean" (keeps the size of activations) or "multiply".
    """

    examples = (
        {"mixer": {"part": "attention", "heads": 2, "causal": True, "rotary": {}}, "merge": "mean"},
        {"mixer": {"part": "attention", "heads": 2, "causal": True}, "share": True, "merge": "multiply"},
    )

    def __init__(
        self, width: int, *, mixer: dict, reverse: dict | None = None, share: bool = False, merge: Merge = "sum"
    ) -> None:
        if share and reverse is not None:
            raise SpecError("share=true means one mixer, so it takes no reverse=")
        nodes = [mixer] if share else [mixer, mixer if reverse is None else reverse]
        super().__init__(width, nodes, ("row", "row-reversed"), merge)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        # Along the tokens as they stand, whatever grid they may come from.
        return super().forward(x, ctx.replace(grid=None))
