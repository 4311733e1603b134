"""BiMamba-S: two Mambas, one reading forwards and one backwards, that share their projections in and out.

    [x | z] = in_proj(u)        y = out_proj(core_1(x, z) + reverse(core_2(reverse(x), reverse(z))))

Schiff et al., "Caduceus", 2024 (2403.03234); Wang et al., "LC-PLM", 2024 (2411.08909). Both projections act on each
token alone, so each runs once for both directions. The cores hold few parameters: nearly twice the depth for the
parameters of two whole mixers. Rows are reversed within their own lengths, packed texts within their own borders.
Cost: the projections of one Mamba and the cores of two; linear in the length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from formwright.parts.base import Cost, Part, Shape, Traits
from formwright.parts.combinators.scan import Merge, merged, refuse_rules
from formwright.parts.context import EMPTY, Context
from formwright.parts.linears.dense import Dense
from formwright.parts.mixers.mamba import Core, check_depth, step_rank, uniform
from formwright.parts.orders import walk
from formwright.parts.pieces import Kept, contexts, joined, piece_of, unseen
from formwright.registry import Paper, register


@register(
    "mixer",
    "bimamba-s",
    paper=Paper("Wang et al.", 2024, "2411.08909"),
    summary="Mamba forwards and backwards with shared projections",
)
class BiMambaS(Part):
    """Slots ``in_proj`` (2 E, W) and ``out_proj`` (W, E); ``ahead`` and ``back`` are the cores of a Mamba.

    Args:
        state, expand, conv, rank, conv_bias, selective, depth: as of ``mamba``, for both directions.
        merge: "sum" as published, "mean" (keeps the size of activations), or "multiply", for which each direction is
            projected out by itself.
    """

    traits = Traits()
    examples = ({"state": 4}, {"state": 2, "expand": 1, "merge": "multiply"}, {"state": 2, "conv": 2, "merge": "mean"})

    def __init__(
        self,
        width: int,
        *,
        state: int = 16,
        expand: int = 2,
        conv: int = 4,
        rank: int | None = None,
        conv_bias: bool = True,
        selective: list[str] | None = None,
        depth: int = 1,
        merge: Merge = "sum",
    ) -> None:
        super().__init__()
        inner, rank = expand * width, step_rank(width, rank)
        self._depth, self.merge = check_depth(depth), merge
        self.ahead = Core(inner, state, conv, rank, conv_bias, selective)
        self.back = Core(inner, state, conv, rank, conv_bias, selective)
        self.in_proj = Dense(width, 2 * inner, False, "in")
        self.out_proj = Dense(inner, width, False, "out")
        cores = {"ahead": self.ahead, "back": self.back}
        self.axes = {
            "in_proj": ("2*inner", "stream"),
            "out_proj": ("stream", "inner"),
            **{f"{name}.{slot}": axes for name, core in cores.items() for slot, axes in core.axes.items()},
        }

    def settle(self) -> None:
        uniform(self.in_proj)
        uniform(self.out_proj, self._depth**-0.5)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        refuse_rules(ctx, "bimamba-s")
        x, line = ctx.clear(x), ctx.replace(state=None, grid=None)
        if ctx.lengths is None and (size := piece_of(x)) and unseen(self, ctx):
            return self._in_pieces(x, line, size)
        path = walk("row-reversed", x, line)
        x, z = self.in_proj(x, ctx).chunk(2, -1)
        ahead = self.ahead.mixed(x, z, line.at("ahead"))
        back = path.back(self.back.mixed(path.there(x), path.there(z), line.at("back")))
        return self._out(ahead, back, ctx)

    def _in_pieces(self, x: Tensor, ctx: Context, size: int) -> Tensor:
        """Long rows of one length: forwards piece by piece, then backwards from the last piece, which finishes each.
        Projecting a piece in twice takes less than keeping all that both directions read."""

        def ahead(x: Tensor, ctx: Context) -> Tensor:
            x, z = self.in_proj(x, ctx).chunk(2, -1)
            return self.ahead.mixed(x, z, ctx.at("ahead"))

        found, out = joined(ahead, [x], ctx, size), torch.empty_like(x)
        for piece, inner in reversed(list(contexts(x, ctx.replace(state=Kept(None)), size))):
            turned, z = self.in_proj(x[:, piece], inner).flip(1).chunk(2, -1)
            back = self.back.mixed(turned, z, inner.at("back")).flip(1)
            out[:, piece] = self._out(found[:, piece], back, inner)
        return out

    def _out(self, ahead: Tensor, back: Tensor, ctx: Context) -> Tensor:
        """Both directions (B, L, E), in the order of the tokens, -> (B, L, W)."""
        if self.merge == "multiply":
            return self.out_proj(ahead, ctx) * self.out_proj(back, ctx)
        return self.out_proj(merged([ahead, back], self.merge), ctx)

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        held, twice = super().cost(shape, knobs), self.merge == "multiply"
        return Cost(held.parameters, held.macs + (self.out_proj.cost(shape).macs if twice else 0))
