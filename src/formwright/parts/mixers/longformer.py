"""Longformer: a sliding window for every token, and a few global tokens that see all and are seen by all.

    i sees j  where  |i - j| <= dilation (window // 2)  and  (i - j) mod dilation = 0,  or j < first,  or i < first

causal: the last ``window`` places of its step, its own included, and the first tokens as far as they are earlier.
Beltagy et al., 2020 (2004.05150). With ``separate`` the rows of global tokens are made by projections of their own,
which surgeries may start as copies of the others. Cost: 4 width^2 multiply-accumulates a token and 2 width (window +
first) a query, and 2 width n for each global row. State: keys and values of the window and of the first tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.ops.attention import attention
from formwright.ops.window_attention import Spans, spans, window_attention
from formwright.parts.base import Cost, Shape, Traits
from formwright.parts.context import EMPTY, Context
from formwright.parts.linears.dense import Dense
from formwright.parts.mixers._windows import Windowed, at_least, by_residue
from formwright.registry import Paper, register


@functools.lru_cache(maxsize=64)
def windows(length: int, before: int, after: int, dilation: int, first: int, causal: bool) -> Spans:
    """Runs over the first tokens followed by all tokens, both sorted by what is left modulo ``dilation``."""
    order, start = by_residue(length, dilation)
    left, places = order % dilation, np.arange(length)
    size = -(-(length - left) // dilation)
    globals_here = np.maximum(0, -(-(first - left) // dilation))  # of this class; read from the front alone
    low = np.maximum(places - before, start + globals_here)
    high = np.minimum(places + after + 1, start + size)
    front = np.minimum(first, order + 1) if causal else np.full(length, first)
    starts = np.stack((np.zeros_like(places), low + first), 1)
    return spans(starts, np.stack((front, np.maximum(high, low) + first), 1), length + first)


@register("mixer", "longformer", paper=Paper("Beltagy et al.", 2020, "2004.05150"), summary="window and global tokens")
class Longformer(Windowed):
    """Slots and shared arguments as :class:`Windowed`, and ``q_global``, ``k_global``, ``v_global`` with ``separate``.

    Args:
        window: tokens of the window, half of them on each side, or all up to its own if causal.
        dilation: places between the keys of a window.
        first: global tokens, at the front; more than there are makes all tokens global.
        separate: projections of their own for the rows of global tokens; for encoders.
        causal: no token sees a later one; needed to stream.
    """

    examples = (
        {"heads": 4, "window": 4, "first": 2, "separate": True},
        {"heads": 4, "kv_heads": 2, "window": 3, "dilation": 2, "first": 3, "bias": False},
        {"heads": 2, "kv_heads": 1, "window": 3, "dilation": 2, "first": 2, "causal": True, "rotary": {}},
    )

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        window: int,
        dilation: int = 1,
        first: int = 0,
        separate: bool = False,
        causal: bool = False,
        kv_heads: int | None = None,
        head_width: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        rotary: dict[str, Any] | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(width, heads, kv_heads, head_width, bias, out_bias, rotary, scale, dropout)
        at_least(1, window=window, dilation=dilation)
        at_least(0, first=first)
        if separate and (causal or not first):
            raise SpecError("separate projections are for the global tokens of an encoder: first > 0, not causal")
        self.window, self.dilation, self.first = window, dilation, first
        self.memory = dilation * (window - 1) + 1
        self.traits = Traits(causal=causal, streams=causal, packed=not separate)
        made: list[Dense | None] = [None, None, None]
        if separate:
            made = [
                Dense(width, s.out_features, s.bias is not None, f"{s.role}_global") for s in (self.q, self.k, self.v)
            ]
            self.axes = {**self.axes, **{f"{name}_global": self.axes[name] for name in ("q", "k", "v")}}
        self.q_global, self.k_global, self.v_global = made

    def _windows(self, length: int) -> Spans:
        causal = self.traits.causal
        before, after = (self.window - 1, 0) if causal else (self.window // 2, self.window // 2)
        return windows(length, before, after, self.dilation, min(self.first, length), causal)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: Context) -> Tensor:
        length, first, causal = q.shape[1], min(self.first, q.shape[1]), self.traits.causal
        # Causal with padding on the right: a real query never reaches a padded key.
        valid = None if causal or ctx.lengths is None else ctx.valid(q)
        order = torch.from_numpy(by_residue(length, self.dilation)[0]).to(q.device)

        def laid(t: Tensor) -> Tensor:
            sorted_ = t if self.dilation == 1 else t[:, order]
            return torch.cat((t[:, :first], sorted_), 1) if first else sorted_

        asked = q if self.dilation == 1 else q[:, order]
        shown = None if valid is None else laid(valid)
        y, _ = window_attention(asked, laid(k), laid(v), self._windows(length), scale=self.scale, valid=shown)
        y = y if self.dilation == 1 else y[:, torch.argsort(order)]
        if causal or not first:
            return y
        return torch.cat((self._global(q, k, v, x, first, valid, ctx), y[:, first:]), 1)

    def _global(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, first: int, valid: Tensor | None, ctx: Context
    ) -> Tensor:
        """The rows of global tokens: full attention, by their own projections where there are such."""
        q = q[:, :first]
        if self.q_global is not None and self.k_global is not None and self.v_global is not None:
            made = (self.q_global(x[:, :first], ctx), self.k_global(x, ctx), self.v_global(x, ctx))
            q, k, v = (t.unflatten(-1, (-1, self.head_width)) for t in made)
            q, k = self.turned(q, k, x, ctx)
        mask = None if valid is None else (lambda rows, columns: valid[:, None, columns])
        return attention(q, k, v, scale=self.scale, mask=mask)

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        apart = queries - keys
        near = (apart.abs() <= self.dilation * (self.window // 2)) & (apart % self.dilation == 0)
        if self.traits.causal:
            near = (apart <= self.dilation * (self.window - 1)) & (apart % self.dilation == 0)
            return (near | (keys < self.first)) & (apart >= 0)
        return near | (keys < self.first) | (queries < self.first)

    def pairs(self, length: int) -> int:
        rows = 0 if self.traits.causal else min(self.first, length)
        return self._windows(length).pairs(self.heads) + self.heads * rows * length

    def probs(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        if self.q_global is not None:
            raise SpecError(f"{ctx.path}: probs of longformer are not given where global rows have other projections")
        return super().probs(q, k, v, ctx)

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        found = super().cost(shape, knobs)
        if self.q_global is None:
            return found
        rows = Shape(tuple(min(self.first, length) for length in shape.lengths))
        return found + Cost(0, self.q_global.cost(rows).macs - self.q_global.cost(shape).macs)
