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


class Projected(Part):
    """Slots ``q``, ``k``, ``v`` (heads*head_width, W) and ``o`` (W, heads*head_width).

    Args:
        heads, head_width: head_width defaults to W / heads.
        bias, out_bias: biases of q, k, v, and of o (default: as ``bias``).
        dropout: rate on the output of ``o`` while training.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        head_width: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        dropout: float = 0.0,
        inputs: tuple[str, ...] = ("q", "k", "v"),
    ) -> None:
        super().__init__()
        if heads < 1 or (head_width is None and width % heads):
            raise SpecError(f"heads={heads} must divide width {width}, or give head_width")
        self.head_width = width // heads if head_width is None else head_width
        self.rate, self.inputs = dropout, inputs
        inner = heads * self.head_width
        for name in inputs:
            self.add_module(name, Dense(width, inner, bias, name))
        self.o = Dense(inner, width, bias if out_bias is None else out_bias, "o")
        self.axes = {**dict.fromkeys(inputs, ("heads*head", "stream")), "o": ("stream", "heads*head")}

    @property
    def heads(self) -> int:
        return self.o.in_features // self.head_width

    def enter(self, x: Tensor, ctx: Context) -> list[Tensor]:
        """What each input slot makes of ``x``, (B, L, H, D); finite in the padding, but not zero where slots have
        biases."""
        slots: list[LinearLike] = [getattr(self, name) for name in self.inputs]
        return [t.unflatten(-1, (-1, self.head_width)) for t in project(slots, ctx.clear(x), ctx)]

    def leave(self, mixed: Tensor, ctx: Context) -> Tensor:
        """(B, L, H, D) -> (B, L, W)."""
        return dropout(self.o(mixed.flatten(2), ctx), self.rate, ctx, self.training, "dropout")

    def check_rules(self, ctx: Context) -> None:
        """A SpecError for a rule of the context that this mixer cannot keep."""
        name = type(self).registered[1]  # type: ignore[attr-defined]
        for rule in RULES:
            if getattr(ctx.visible, rule) is not None:
                raise SpecError(f"{ctx.path or name}: {name} cannot keep the rule {rule!r}; use attention for it")
        if ctx.visible.causal and not self.traits.causal:
            raise SpecError(f"{ctx.path or name}: {name} reads later tokens, so it cannot keep the rule 'causal'")

    def check_length(self, x: Tensor, ctx: Context, most: int, past: int = 0) -> None:
        """A DataError where a row of ``x``, behind ``past`` tokens at most, passes the ``most`` tokens of a table."""
        if past + x.shape[1] <= most:
            return
        own = torch.tensor(x.shape[1]) if ctx.lengths is None else ctx.lengths
        longest = int((own if ctx.state is None else own + ctx.state.seen).max()) if len(x) else 0
        if longest > most:
            name = type(self).registered[1]  # type: ignore[attr-defined]
            raise DataError(
                f"{ctx.path or name}: {longest} tokens pass the {most} of this {name}'s table; cut the text, or build "
                f"it with length={longest}"
            )

    def mixing_macs(self, length: int, past: int) -> int:
        """Multiply-accumulates of one row between the slots."""
        raise NotImplementedError

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        return super().cost(shape, knobs) + Cost(0, sum(self.mixing_macs(n, shape.past) for n in shape.lengths))
