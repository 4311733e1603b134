"""What mixers with slots q, k, v and o share: projections cut into heads, and rules of visibility refused in words.

Slots are named and shaped as those of ``attention``, so that weights pass from one to the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from formwright.kit.errors import DataError, SpecError
from formwright.parts.base import Cost, LinearLike, Part, Shape, dropout, project
from formwright.parts.context import EMPTY, Context
from formwright.parts.linears.dense import Dense

#: Rules of visibility besides ``causal``, as the context names them.
RULES = ("window", "prefix", "segments", "context")


def head_sizes(width: int, heads: int, kv_heads: int | None, head_width: int | None) -> tuple[int, int]:
    """(kv_heads, head_width), by default ``heads`` and W / heads; SpecError where they do not divide."""
    groups = heads if kv_heads is None else kv_heads
    if heads < 1 or groups < 1 or heads % groups:
        raise SpecError(f"kv_heads={groups} must divide heads={heads}")
    if head_width is None and width % heads:
        raise SpecError(f"heads={heads} does not divide width {width}; give head_width")
    return groups, width // heads if head_width is None else head_width


class Projected(Part):
    """Slots ``q`` (heads*head_width, W), ``k``, ``v`` (kv_heads*head_width, W) and ``o`` (W, heads*head_width).

    Args:
        heads, kv_heads, head_width: ``kv_heads`` divides ``heads``; head_width defaults to W / heads.
        bias, out_bias: biases of q, k, v, and of o (default: as ``bias``).
        dropout: rate on the output of ``o`` while training.
    """

    registered: tuple[str, str]
    v: Dense

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int | None = None,
        head_width: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        dropout: float = 0.0,
        inputs: tuple[str, ...] = ("q", "k", "v"),
    ) -> None:
        super().__init__()
        groups, self.head_width = head_sizes(width, heads, kv_heads, head_width)
        self.rate, self.inputs = dropout, inputs
        inner = {"q": heads, "k": groups, "v": groups}
        for name in inputs:
            self.add_module(name, Dense(width, inner[name] * self.head_width, bias, name))
        self.o = Dense(heads * self.head_width, width, bias if out_bias is None else out_bias, "o")
        made = {name: ("heads*head" if name == "q" else "kv_heads*head", "stream") for name in inputs}
        self.axes = {**made, "o": ("stream", "heads*head")}

    @property
    def name(self) -> str:
        """As it is registered, for sentences."""
        return type(self).registered[1]

    @property
    def heads(self) -> int:
        return self.o.in_features // self.head_width

    @property
    def kv_heads(self) -> int:
        return self.v.out_features // self.head_width

    def enter(self, x: Tensor, ctx: Context) -> list[Tensor]:
        """What each input slot makes of ``x``, (B, L, H, D), or kv_heads instead of H for ``k`` and ``v``; finite in
        the padding, but not zero where slots have biases."""
        slots: list[LinearLike] = [getattr(self, name) for name in self.inputs]
        return [t.unflatten(-1, (-1, self.head_width)) for t in project(slots, ctx.clear(x), ctx)]

    def for_queries(self, t: Tensor) -> Tensor:
        """Keys or values (B, L, kv_heads, D), or sums of them, once for each head of the queries that reads them."""
        return t if self.kv_heads == self.heads else t.repeat_interleave(self.heads // self.kv_heads, dim=2)

    def leave(self, mixed: Tensor, ctx: Context) -> Tensor:
        """(B, L, H, D) -> (B, L, W)."""
        return dropout(self.o(mixed.flatten(2), ctx), self.rate, ctx, self.training, "dropout")

    def check_rules(self, ctx: Context) -> None:
        """A SpecError for a rule of the context that this mixer cannot keep."""
        where = f"{ctx.path or self.name}: {self.name}"
        for rule in RULES:
            if getattr(ctx.visible, rule) is not None:
                raise SpecError(f"{where} cannot keep the rule {rule!r}; use attention for it")
        if ctx.visible.causal and not self.traits.causal:
            raise SpecError(f"{where} reads later tokens, so it cannot keep the rule 'causal'")

    def check_length(
        self, x: Tensor, ctx: Context, most: int, past: int = 0, option: str = "length", each: int = 1
    ) -> None:
        """A DataError where a row of ``x``, behind ``past`` tokens at most, passes the ``most`` tokens of a table,
        whose size ``option`` states in units of ``each`` tokens."""
        if past + x.shape[1] <= most:
            return
        own = torch.tensor(x.shape[1]) if ctx.lengths is None else ctx.lengths
        longest = int((own if ctx.state is None else own + ctx.state.seen).max()) if len(x) else 0
        if longest > most:
            raise DataError(
                f"{ctx.path or self.name}: {longest} tokens pass the {most} of this {self.name}'s table; cut the "
                f"text, or build it with {option}={-(-longest // each)}"
            )

    def mixing_macs(self, length: int, past: int) -> int:
        """Multiply-accumulates of one row between the slots."""
        raise NotImplementedError

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        return super().cost(shape, knobs) + Cost(0, sum(self.mixing_macs(n, shape.past) for n in shape.lengths))
