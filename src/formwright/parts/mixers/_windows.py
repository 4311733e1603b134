"""What mixers that see a part of the sequence share: slots as `attention` names them, packed and streamed forms, costs.

A subclass says who sees whom twice: :meth:`Windowed.mix` runs whole sequences as runs of keys, :meth:`Windowed.sees`
is the rule itself, on positions, for calls that go on a stream and for who looks. A later call of a stream takes its
few queries over the keys that are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.ops.attention import attention, attention_reference
from formwright.parts.base import Cost, Shape, Slot, cost_sum, costed, element_bytes, own_parameters
from formwright.parts.context import EMPTY, Context
from formwright.parts.linears.dense import Dense
from formwright.parts.mixers._projected import Projected
from formwright.parts.positions import check_rotary, rotary_angles, rotate


class Windowed(Projected):
    """Slots and arguments as :class:`Projected`.

    Args:
        rotary: {"theta", "width", "interleaved", "scaling"}, as attention takes it.
        scale: of the scores; default head_width ** -0.5.
    """

    q: Dense
    k: Dense
    #: Earlier tokens that a later call of a stream needs; None: all.
    memory: int | None = None
    #: Leading tokens that everyone sees, kept beside those.
    first: int = 0

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None,
        head_width: int | None,
        bias: bool,
        out_bias: bool | None,
        rotary: dict[str, Any] | None,
        scale: float | None,
        dropout: float,
    ) -> None:
        super().__init__(
            width, heads=heads, kv_heads=kv_heads, head_width=head_width, bias=bias, out_bias=out_bias,
            dropout=dropout,
        )  # fmt: skip
        if rotary is not None:
            check_rotary(rotary, self.head_width)
        self.scale, self.rotary = scale, rotary

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: Context) -> Tensor:
        """Whole sequences: q (B, L, H, D), k and v (B, L, G, D) -> (B, L, H, D)."""
        raise NotImplementedError

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether the token at position ``queries`` (..., L, 1) sees that at ``keys`` (..., 1, S)."""
        raise NotImplementedError

    def pairs(self, length: int) -> int:
        """Products of a query and a key, over all heads, that the written-out form of :meth:`mix` takes."""
        raise NotImplementedError

    def slots(self) -> dict[str, Slot]:
        if not self.traits.streams:
            return {}
        shape = (self.kv_heads, self.head_width)
        kept = Slot("grow", shape) if self.memory is None else Slot("window", shape, window=self.memory)
        found = {"k": kept, "v": kept}
        if self.first:
            found |= {name: Slot("fixed", (self.first, *shape)) for name in ("first_k", "first_v")}
        return found

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x (B, L, W) or (1, T, W) -> the same shape."""
        self.check_rules(ctx)
        x = ctx.clear(x)
        q, k, v = self.enter(x, ctx)
        q, k = self.turned(q, k, x, ctx)
        if ctx.offsets is not None:
            y = self._packed(q, k, v, x, ctx)
        elif ctx.state is not None and self.traits.streams:
            y = self._streamed(q, k, v, x, ctx)
        else:
            y = self.mix(q, k, v, x, ctx)
        if ctx.wants("probs"):
            ctx.note("probs", self.probs(q, k, v, ctx))
        return self.leave(y, ctx)

    def turned(self, q: Tensor, k: Tensor, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Queries (B, M, H, D) of the first M tokens and keys (B, L, G, D), turned by position where asked for."""
        if self.rotary is None:
            return q, k
        cos, sin = rotary_angles(ctx.place(x), self.rotary.get("width") or self.head_width, self.rotary, q.dtype)
        interleaved, asked = bool(self.rotary.get("interleaved")), q.shape[1]
        return rotate(q, cos[:, :asked], sin[:, :asked], interleaved), rotate(k, cos, sin, interleaved)

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: Context) -> Tensor:
        if ctx.state is not None:
            raise SpecError(f"{ctx.path}: {self.name} streams in the padded layout; give lengths, not offsets")
        alone = ctx.replace(offsets=None, borders=None, positions=None)
        documents = [slice(start, stop) for start, stop in ctx.spans() if stop > start]
        done = [self.mix(q[:, own], k[:, own], v[:, own], x[:, own], alone) for own in documents]
        return torch.cat([q[:, :0], *done], 1)

    def _streamed(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: Context) -> Tensor:
        assert ctx.state is not None
        past = ctx.state.get(f"{ctx.path}.k")
        keys, places = ctx.append("k", k, self.memory)
        values, _ = ctx.append("v", v, self.memory)
        first_k, first_v = self._leading("first_k", k, ctx), self._leading("first_v", v, ctx)
        if past is None or past.shape[1] == 0:
            return self.mix(q, k, v, x, ctx)
        if self.first:
            # Leading tokens are read from their own slots alone.
            keys, values = torch.cat((first_k, keys), 1), torch.cat((first_v, values), 1)
            fixed = torch.arange(self.first, device=q.device).expand(len(q), -1)
            places = torch.cat((fixed, places.masked_fill(places < self.first, -1)), 1)
        queries = ctx.state.seen[:, None] + torch.arange(q.shape[1], device=q.device)

        def mask(rows: slice, columns: slice) -> Tensor:
            i, j = queries[:, rows, None], places[:, None, columns]
            return (j >= 0) & (j <= i) & self.sees(i, j)

        return attention(q, keys, values, scale=self.scale, mask=mask)

    def _leading(self, name: str, tokens: Tensor, ctx: Context) -> Tensor:
        """The first tokens of the stream (B, first, G, D), zeros where it has not come so far; kept for later calls."""
        if not self.first:
            return tokens[:, :0]
        assert ctx.state is not None
        rows, length = tokens.shape[:2]
        kept = ctx.slot(name, lambda: tokens.new_zeros(rows, self.first, *tokens.shape[2:]))
        source = torch.arange(self.first, device=tokens.device) - ctx.state.seen[:, None]
        new = (source >= 0) & (source < (length if ctx.lengths is None else ctx.lengths[:, None]))
        if length:
            index = source.clamp(0, length - 1)[..., None, None].expand_as(kept)
            kept = torch.where(new[..., None, None], tokens.gather(1, index), kept)
        ctx.keep(name, kept)
        return kept

    def probs(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        """(B, H, L, L) of whole sequences, written out for who asked to look."""
        if ctx.offsets is not None or (ctx.state is not None and bool(ctx.state.seen.any())):
            raise SpecError(f"{ctx.path}: probs of {self.name} are those of whole, padded sequences")
        steps = torch.arange(q.shape[1], device=q.device)
        seen = self.sees(steps[:, None], steps[None])[None] & ctx.valid(q)[:, None]
        return attention_reference(q, k, v, scale=self.scale, seen=seen)[1]

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        held = cost_sum([child.cost(shape) for _, child in costed(self)]) + own_parameters(self)
        past = shape.past if self.traits.streams else 0
        if past:
            held_keys = self._kept(past) + self.first
            pairs = sum(self.heads * length * (length + held_keys) for length in shape.lengths)
        else:
            pairs = sum(self.pairs(length) for length in shape.lengths)
        kept = sum(self._kept(length + past) + self.first for length in shape.lengths) if self.traits.streams else 0
        each = 2 * self.kv_heads * self.head_width * element_bytes(self)
        return held + Cost(0, 2 * self.head_width * pairs, each * kept)

    def _kept(self, tokens: int) -> int:
        return tokens if self.memory is None else min(tokens, self.memory)


def at_least(least: int, **options: int) -> None:
    """A SpecError that names the first option below ``least``."""
    for option, value in options.items():
        if value < least:
            raise SpecError(f"{option}={value} must be at least {least}")


@functools.lru_cache(maxsize=64)
def by_residue(length: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions sorted by what is left of them modulo ``step``, and where each one's class starts in that order."""
    order = np.lexsort((np.arange(length), np.arange(length) % step))
    sizes = np.bincount(order % step, minlength=step)
    return order, (sizes.cumsum() - sizes)[order % step]
