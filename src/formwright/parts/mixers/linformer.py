"""Linformer: keys and values are projected along the length to a few rows, and every query reads those.

    o = softmax(q (E k)^T / sqrt(head_width)) (F v),   E and F (rank, length) learned

Wang et al., 2020 (2006.04768). Every projected row mixes all positions, so there is no causal form; shorter texts use
the first columns of E and F. One E may also serve keys and values of all layers: the conditioner ``length-projection``
holds it then. Cost: 4 W^2 multiply-accumulates a token for the slots and 4 rank W for the rest.
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
    """Slots as in ``attention``; tables ``e`` and ``f``, (rank, length), or (kv_heads, rank, length) each.

    Args:
        heads, kv_heads, head_width, bias, out_bias, dropout: as in ``attention``.
        length: the longest text that it takes; a longer one is an error.
        rank: rows that keys and values are projected to.
        share: "none" (an E and an F for each head of keys), "headwise" (one E and one F), "key-value" (one E for both),
            or "layerwise" (one E for all layers, of the model's conditioner ``table``, which states the same sizes).
        table: name of that conditioner.
    """

    examples = (
        {"heads": 4, "length": 700, "rank": 6},
        {"heads": 2, "length": 700, "rank": 3, "share": "key-value"},
        {"heads": 4, "kv_heads": 2, "length": 700, "rank": 2, "share": "none", "bias": False},
        {"heads": 2, "length": 700, "rank": 4, "share": "layerwise"},
    )

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        length: int,
        rank: int,
        share: Literal["none", "headwise", "key-value", "layerwise"] = "headwise",
        table: str = "length-projection",
        kv_heads: int | None = None,
        head_width: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            width, heads=heads, kv_heads=kv_heads, head_width=head_width, bias=bias, out_bias=out_bias,
            dropout=dropout,
        )  # fmt: skip
        if length < 1 or rank < 1:
            raise SpecError(f"length={length} and rank={rank} must be at least 1")
        shape = (self.kv_heads, rank, length) if share == "none" else (rank, length)
        self.rank = rank
        self.e = None if share == "layerwise" else nn.Parameter(torch.empty(shape))
        self.f = nn.Parameter(torch.empty(shape)) if share in ("none", "headwise") else None
        self.traits = Traits(packed=False, length=length)
        if share == "layerwise":
            self.reads = (table,)

    def reset(self, generator: torch.Generator) -> None:
        for table in (self.e, self.f):
            if table is not None:
                table.copy_(torch.randn(table.shape, generator=generator) * table.shape[-2] ** -0.5)

    def furnish(self, ctx: Context, x: Tensor, generator: torch.Generator) -> Context:
        made = {name: torch.randn(self.rank, self.length, generator=generator).to(x) for name in self.reads}
        return ctx.replace(condition={**ctx.condition, **made})

    @property
    def length(self) -> int:
        assert self.traits.length != "any"
        return self.traits.length

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.check_rules(ctx)
        self.check_length(x, ctx, self.length)
        q, k, v = self.enter(x, ctx)
        e = self._shared(ctx) if self.e is None else self.e
        k, v = projected(e, ctx.clear(k)), projected(e if self.f is None else self.f, ctx.clear(v))
        return self.leave(attention(q, k, v), ctx)

    def _shared(self, ctx: Context) -> Tensor:
        """The conditioner's E (rank, length), which serves all layers."""
        table, wanted = ctx.condition.get(self.reads[0]), (self.rank, self.length)
        if table is None or tuple(table.shape) != wanted:
            found = "no conditioner of this model fills" if table is None else f"is {tuple(table.shape)} here"
            raise SpecError(
                f"{ctx.path}: linformer reads condition {self.reads[0]!r} of {wanted}, which {found}; give the model a "
                f"conditioner of that name: {{'part': 'length-projection', 'rank': {wanted[0]}, 'length': {wanted[1]}}}"
            )
        return table

    def mixing_macs(self, length: int, past: int) -> int:
        return 2 * length * self.rank * (self.heads + self.kv_heads) * self.head_width


def projected(table: Tensor, x: Tensor) -> Tensor:
    """table (rank, length) or (heads, rank, length), x (B, L, H, D) -> (B, rank, H, D)."""
    used = min(x.shape[1], table.shape[-1])
    table, x = table[..., :used], x[:, :used]
    if table.dim() == 2:
        return (table @ x.flatten(2)).unflatten(2, x.shape[2:])
    return (table @ x.transpose(1, 2)).transpose(1, 2)
