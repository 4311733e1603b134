"""Linformer: keys and values are projected along the length to a few rows, and every query reads those.

    o = softmax(q (E k)^T / sqrt(head_width)) (F v),   E and F (rank, length) learned

Wang et al., 2020 (2006.04768). Every projected row mixes all positions, so there is no causal form; shorter texts use
the first columns of E and F. Cost: 4 W^2 multiply-accumulates a token for the slots and 4 rank W for the rest.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError
from formwright.ops.attention import attention
from formwright.parts.base import Traits
from formwright.parts.context import Context
from formwright.parts.mixers._projected import Projected
from formwright.registry import Paper, register


@register("mixer", "linformer", paper=Paper("Wang et al.", 2020, "2006.04768"))
class Linformer(Projected):
    """Slots as in ``attention``; tables ``e`` and ``f``, (rank, length), or (heads, rank, length) each.

    Args:
        heads, head_width, bias, out_bias, dropout: as in ``attention``.
        length: the longest text that it takes; a longer one is an error.
        rank: rows that keys and values are projected to.
        share: "headwise" (one E and one F for all heads), "key-value" (one E for both), "none" (E and F a head).
    """

    examples = (
        {"heads": 4, "length": 700, "rank": 6},
        {"heads": 2, "length": 700, "rank": 3, "share": "key-value"},
        {"heads": 2, "length": 700, "rank": 2, "share": "none", "bias": False},
    )

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        length: int,
        rank: int,
        share: Literal["headwise", "key-value", "none"] = "headwise",
        head_width: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            width, heads=heads, head_width=head_width, bias=bias, out_bias=out_bias, dropout=dropout
        )  # fmt: skip
        if length < 1 or rank < 1:
            raise SpecError(f"length={length} and rank={rank} must be at least 1")
        shape = (heads, rank, length) if share == "none" else (rank, length)
        self.e = nn.Parameter(torch.empty(shape))
        self.f = None if share == "key-value" else nn.Parameter(torch.empty(shape))
        self.traits = Traits(packed=False, length=length)

    def reset(self, generator: torch.Generator) -> None:
        for table in (self.e, self.f):
            if table is not None:
                table.copy_(torch.randn(table.shape, generator=generator) * table.shape[-2] ** -0.5)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.check_rules(ctx)
        self.check_length(x, ctx, self.e.shape[-1])
        q, k, v = self.enter(x, ctx)
        e, f = self.e, self.e if self.f is None else self.f
        return self.leave(attention(q, projected(e, ctx.clear(k)), projected(f, ctx.clear(v))), ctx)

    def mixing_macs(self, length: int, past: int) -> int:
        return 4 * length * self.e.shape[-2] * self.heads * self.head_width


def projected(table: Tensor, x: Tensor) -> Tensor:
    """table (rank, length) or (heads, rank, length), x (B, L, H, D) -> (B, rank, H, D)."""
    used = min(x.shape[1], table.shape[-1])
    table, x = table[..., :used], x[:, :used]
    if table.dim() == 2:
        return (table @ x.flatten(2)).unflatten(2, x.shape[2:])
    return (table @ x.transpose(1, 2)).transpose(1, 2)
