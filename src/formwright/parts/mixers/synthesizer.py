"""Synthesizer: mixing weights that are learned, or made from the query's token alone, instead of compared.

    o_i = sum_j softmax_j(B_i) v_j, with B_i over the positions j of a table of fixed length:

- dense: B_i = W_2 relu(W_1 x_i);   factorised-dense: B_ij = A_i[j mod a] C_i[j div a], both made like that;
- random: B = R, learned for every pair of positions;   factorised-random: B = R_1 R_2^T of rank ``rank``;
- dot: q_i . k_j / sqrt(head_width), ordinary attention, for mixtures.

A mixture is the softmax of a weighted sum of several, with weights that add up to 1 in each head. Tay et al., 2021
(2005.00743). Cost for each pair of tokens and head: head_width for the values, and for a kind in turn head_width, 1, 0,
rank or head_width. State when causal: values of every token seen (and keys with ``dot``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError
from formwright.parts.base import Cost, Shape, Slot, Traits, element_bytes
from formwright.parts.context import EMPTY, Context
from formwright.parts.linears.dense import Dense
from formwright.parts.mixers._projected import Projected
from formwright.registry import Paper, register

Kind = Literal["dense", "random", "factorised-dense", "factorised-random", "dot"]
#: Kinds whose weights come from the token.
DENSE = ("dense", "factorised-dense")


@register("mixer", "synthesizer", paper=Paper("Tay et al.", 2021, "2005.00743"))
class Synthesizer(Projected):
    """Slots ``v`` and ``o`` as in ``attention``; ``q`` and ``k`` with "dot", ``w1`` (heads*head_width, W) with a dense
    kind. Tables are held for each head.

    Args:
        heads, kv_heads, head_width, bias, out_bias, dropout: as in ``attention``.
        kinds: what is added up, of "dense", "random", "factorised-dense", "factorised-random", "dot".
        length: the longest text that it takes; a longer one is an error.
        causal: mix earlier tokens and the own one only; streams.
        rank: of R_1 and R_2.
    """

    dense: Tensor
    inner: Tensor
    outer: Tensor
    random: Tensor
    left: Tensor
    right: Tensor

    examples = (
        {"heads": 2, "kinds": ["dense"], "length": 700},
        {"heads": 1, "kinds": ["random"], "length": 700, "causal": True},
        {"heads": 2, "kv_heads": 1, "kinds": ["factorised-random", "dot"], "length": 700, "causal": True, "rank": 3},
        {"heads": 2, "kinds": ["factorised-dense"], "length": 700, "bias": False},
        {"heads": 2, "kinds": ["dense", "factorised-dense"], "length": 700, "causal": True, "head_width": 5},
    )

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kinds: list[Kind],
        length: int,
        causal: bool = False,
        rank: int = 8,
        kv_heads: int | None = None,
        head_width: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            width, heads=heads, kv_heads=kv_heads, head_width=head_width, bias=bias, out_bias=out_bias,
            dropout=dropout, inputs=("q", "k", "v") if "dot" in kinds else ("v",),
        )  # fmt: skip
        if not kinds or len(set(kinds)) != len(kinds):
            raise SpecError(f"kinds={kinds} must name at least one kind, and none twice")
        if length < 1 or rank < 1:
            raise SpecError(f"length={length} and rank={rank} must be at least 1")
        self.length, self.kinds = length, tuple(kinds)
        head, side = self.head_width, math.isqrt(length - 1) + 1
        shapes = {
            "dense": {"dense": (heads, head, length)},
            "factorised-dense": {"inner": (heads, head, side), "outer": (heads, head, -(-length // side))},
            "random": {"random": (heads, length, length)},
            "factorised-random": {"left": (heads, length, rank), "right": (heads, length, rank)},
            "dot": {},
        }
        for kind in kinds:
            for name, shape in shapes[kind].items():
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.mixture = nn.Parameter(torch.empty(heads, len(kinds))) if len(kinds) > 1 else None
        if any(kind in DENSE for kind in kinds):
            self.w1 = Dense(width, heads * head, bias, "w1")
            self.axes = {**self.axes, "w1": ("heads*head", "stream")}
        self.traits = Traits(causal=causal, streams=causal, packed=False, length=length, growth="quadratic")

    def reset(self, generator: torch.Generator) -> None:
        for name, table in self.named_parameters(recurse=False):
            if name == "mixture":
                table.zero_()
            else:
                std = table.shape[1] ** -0.5 if name in ("dense", "inner", "outer") else 1.0
                table.copy_(torch.randn(table.shape, generator=generator) * std)

    def slots(self) -> dict[str, Slot]:
        kept = ("k", "v") if "dot" in self.kinds else ("v",)
        return {name: Slot("grow", (self.kv_heads, self.head_width)) for name in kept} if self.traits.streams else {}

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.check_rules(ctx)
        past = None if ctx.state is None else ctx.state.get(f"{ctx.path}.v")
        self.check_length(x, ctx, self.length, 0 if past is None else past.shape[1])
        entered = dict(zip(self.inputs, self.enter(x, ctx)))
        queries = ctx.place(x)
        keys = torch.where(ctx.valid(x), queries, -1)
        for name in self.slots():
            entered[name], keys = ctx.append(name, entered[name])
        seen = keys[:, None] >= 0
        if self.traits.causal:
            seen = seen & (keys[:, None] <= queries[:, :, None])
        logits = self._logits(x, entered, queries.clamp(0, self.length - 1), keys.clamp(0, self.length - 1), ctx)
        blind = ~seen.any(-1, keepdim=True)
        probs = logits.masked_fill(~(seen | blind)[:, None], -torch.inf).softmax(-1).masked_fill(blind[:, None], 0.0)
        ctx.note("probs", probs)
        return self.leave((probs @ self.for_queries(entered["v"]).transpose(1, 2)).transpose(1, 2), ctx)

    def _logits(self, x: Tensor, entered: Mapping[str, Tensor], queries: Tensor, keys: Tensor, ctx: Context) -> Tensor:
        """(B, H, L, S) for tokens at ``queries`` (B, L) and ``keys`` (B, S) of the tables."""
        hidden = None
        if any(kind in DENSE for kind in self.kinds):
            hidden = self.w1(ctx.clear(x), ctx).unflatten(-1, (-1, self.head_width)).relu().transpose(1, 2)
        shares = None if self.mixture is None else self.mixture.softmax(-1)
        total = None
        for index, kind in enumerate(self.kinds):
            part = self._kind(kind, hidden, entered, queries, keys)
            part = part if shares is None else part * shares[:, index, None, None]
            total = part if total is None else total + part
        assert total is not None
        return total

    def _kind(self, kind: str, hidden: Any, entered: Mapping[str, Tensor], queries: Tensor, keys: Tensor) -> Tensor:
        if kind == "dense":
            return hidden @ self.dense[:, :, keys].permute(2, 0, 1, 3)
        if kind == "random":
            return self.random[:, queries[:, :, None], keys[:, None]].transpose(0, 1)
        if kind == "factorised-random":
            left, right = (table[:, at].transpose(0, 1) for table, at in ((self.left, queries), (self.right, keys)))
            return left @ right.transpose(-1, -2)
        if kind == "factorised-dense":
            side = self.inner.shape[2]
            inner, outer = hidden @ self.inner, hidden @ self.outer
            return chosen(inner, keys % side) * chosen(outer, keys // side)
        q, k = entered["q"].transpose(1, 2), self.for_queries(entered["k"]).transpose(1, 2)
        return q @ k.transpose(-1, -2) * self.head_width**-0.5

    def mixing_macs(self, length: int, past: int) -> int:
        total = length + (past if self.traits.streams else 0)
        head, pair = self.head_width, length * total
        macs = {"dense": head * pair, "random": 0, "dot": head * pair}
        if "factorised-random" in self.kinds:
            macs["factorised-random"] = self.left.shape[2] * pair
        if "factorised-dense" in self.kinds:
            macs["factorised-dense"] = length * head * (self.inner.shape[2] + self.outer.shape[2])
        return self.heads * (head * pair + sum(macs[kind] for kind in self.kinds))

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        kept = len(self.slots()) * sum(length + shape.past for length in shape.lengths)
        each = self.kv_heads * self.head_width * element_bytes(self)
        return super().cost(shape, knobs) + Cost(state_bytes=kept * each)


def chosen(values: Tensor, index: Tensor) -> Tensor:
    """values (B, H, L, n), index (B, S) -> (B, H, L, S): those columns for every token of the row."""
    return values.gather(3, index[:, None, None].expand(-1, *values.shape[1:3], -1))
