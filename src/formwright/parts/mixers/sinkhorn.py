"""Sinkhorn attention: blocks of keys are brought to the block of queries that needs them, by a soft permutation.

    S = sinkhorn(sort logits / temperature),   k'_u = sum_v S_uv k_v,   v'_u = sum_v S_uv v_v   (whole blocks)
    o_u = softmax(q_u [k_u, k'_u]^T / sqrt(head_width)) [v_u, v'_u]

Rows and columns of S are normalised in turn until both add up to 1. Its logits compare the sums of tokens of blocks
("attention"), or are learned for each block and read from a table ("table"). Tay et al., 2020 (2002.11296). A column
adds over later blocks, so there is no causal form that keeps S doubly stochastic, and none is given. Cost: 4 W^2
multiply-accumulates a token for the slots, 4 block W inside blocks and 2 L / block W for the sorting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.kit.errors import SpecError
from formwright.ops.attention import attention
from formwright.parts.base import Cost, Shape, Traits, cost_sum, costed, project
from formwright.parts.context import EMPTY, Context
from formwright.parts.linears.dense import Dense
from formwright.parts.mixers._projected import Projected
from formwright.registry import Paper, register

#: A logarithm of nothing that stays finite, so that its gradient is zero and not NaN.
NOTHING = -1e30


@register("mixer", "sinkhorn", paper=Paper("Tay et al.", 2020, "2002.11296"))
class Sinkhorn(Projected):
    """Slots as in ``attention``, and of blocks: ``sort_q`` and ``sort_k`` (heads*head_width, W), or ``sort``
    (heads*blocks, W).

    Args:
        heads, head_width, bias, out_bias, dropout: as in ``attention``.
        block: tokens in a block.
        blocks: gives the table of that many blocks, and with it the longest text; None: blocks are compared.
        iterations, temperature: of the normalisation.
        gumbel: scale of the noise that the sort logits get while training.
    """

    examples = (
        {"heads": 2, "block": 64},
        {"heads": 2, "block": 4, "blocks": 175, "iterations": 4, "gumbel": 1.0, "bias": False},
    )

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        block: int = 64,
        blocks: int | None = None,
        iterations: int = 8,
        temperature: float = 0.75,
        gumbel: float = 0.0,
        head_width: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            width, heads=heads, head_width=head_width, bias=bias, out_bias=out_bias, dropout=dropout
        )  # fmt: skip
        if block < 1 or iterations < 1 or (blocks is not None and blocks < 1):
            raise SpecError(f"block={block}, blocks={blocks} and iterations={iterations} must be at least 1")
        if temperature <= 0 or gumbel < 0:
            raise SpecError(f"temperature={temperature} must be above 0, and gumbel={gumbel} not below")
        self.block, self.iterations, self.temperature, self.gumbel = block, iterations, temperature, gumbel
        self.blocks = blocks
        if blocks is None:
            self.sort_q = Dense(width, heads * self.head_width, False, "sort_q")
            self.sort_k = Dense(width, heads * self.head_width, False, "sort_k")
            self.axes = {**self.axes, **dict.fromkeys(("sort_q", "sort_k"), ("heads*head", "stream"))}
        else:
            self.sort = Dense(width, heads * blocks, False, "sort")
            self.axes = {**self.axes, "sort": ("heads*blocks", "stream")}
        length: int | Literal["any"] = "any" if blocks is None else blocks * block
        self.traits = Traits(packed=False, length=length, growth="quadratic")

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.check_rules(ctx)
        if self.blocks is not None:
            self.check_length(x, ctx, self.blocks * self.block, option="blocks", each=self.block)
        q, k, v = self.enter(x, ctx)
        cut = [self._cut(t) for t in (q, ctx.clear(k), ctx.clear(v))]
        real = self._cut(ctx.valid(x))  # (B, N, block)
        order = self.order(self._cut(ctx.clear(x)).sum(2), real.any(2), ctx)
        ctx.note("order", order)
        k, v = (torch.cat((t, self._sorted(order, t)), 2) for t in cut[1:])
        seen = torch.cat((real, real.any(1, keepdim=True).expand_as(real)), 2).flatten(0, 1)[:, None]
        mixed = attention(
            cut[0].flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask=lambda rows, columns: seen[:, :, columns]
        )
        return self.leave(mixed.unflatten(0, real.shape[:2]).flatten(1, 2)[:, : x.shape[1]], ctx)

    def _cut(self, t: Tensor) -> Tensor:
        """(B, L, ...) -> (B, N, block, ...), with zeros behind the last token."""
        spare = -t.shape[1] % self.block
        return F.pad(t, (*[0, 0] * (t.dim() - 2), 0, spare)).unflatten(1, (-1, self.block))

    def order(self, sums: Tensor, real: Tensor, ctx: Context) -> Tensor:
        """Sums of tokens (B, N, W), which blocks hold any (B, N) -> S (B, H, N, N), zero where either holds none."""
        if self.blocks is None:
            # Products of sums pass what half precision can hold.
            exact = torch.promote_types(sums.dtype, torch.float32)
            made = project([self.sort_q, self.sort_k], sums, ctx)
            q, k = (t.to(exact).unflatten(-1, (-1, self.head_width)) for t in made)
            logits = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * self.head_width**-0.5
        else:
            table = self.sort(sums, ctx).unflatten(-1, (-1, self.blocks)).relu().transpose(1, 2)
            logits = F.pad(table, (0, sums.shape[1] - self.blocks))  # what passes the table is padding
        if self.training and self.gumbel > 0:
            drawn = ctx.noise(tuple(logits.shape), logits, "uniform", "gumbel").clamp(1e-6, 1 - 1e-6)
            logits = logits - self.gumbel * (-drawn.log()).log()
        return sinkhorn(logits / self.temperature, real, self.iterations).to(sums.dtype)

    def _sorted(self, order: Tensor, t: Tensor) -> Tensor:
        """Blocks of keys or values (B, N, block, H, D), each query block's own mixture of them."""
        whole = t.permute(0, 3, 1, 2, 4).flatten(3)
        return (order @ whole).unflatten(3, (self.block, -1)).permute(0, 2, 3, 1, 4)

    def mixing_macs(self, length: int, past: int) -> int:
        number = -(-length // self.block)
        inner = self.heads * self.head_width
        compared = number * number * inner if self.blocks is None else 0
        return compared + 2 * number * number * self.block * inner + 4 * number * self.block * self.block * inner

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        """Sort slots see blocks, all others tokens."""
        blocks = Shape(tuple(-(-length // self.block) for length in shape.lengths))
        slots = cost_sum([slot.cost(blocks if name.startswith("sort") else shape) for name, slot in costed(self)])
        return slots + Cost(0, sum(self.mixing_macs(length, 0) for length in shape.lengths))


def sinkhorn(logits: Tensor, real: Tensor, iterations: int) -> Tensor:
    """logits (B, H, N, N), real (B, N) -> rows and then columns divided by their sums, ``iterations`` times.

    Entries of blocks that are not real are zero and count in no sum. Done, and given, in float32 at least.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    pair = (real[:, :, None] & real[:, None])[:, None]
    held = logits.to(exact).masked_fill(~pair, NOTHING)
    for _ in range(iterations):
        for axis in (3, 2):
            held = (held - held.logsumexp(axis, keepdim=True)).masked_fill(~pair, NOTHING)
    return held.exp()
