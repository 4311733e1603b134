"""Sparse Transformer: every token sees its neighbourhood and a thin selection of all that came before.

    strided:  i sees j <= i  where  i - j < stride  or  (i - j) mod stride = 0
    fixed:    i sees j <= i  where  j // stride = i // stride  or  j mod stride >= stride - summary

Two steps then reach any earlier token. Child et al., 2019 (1904.10509), with both patterns in every head. Cost: 4
width^2 multiply-accumulates a token and 2 width (stride + n / stride) a query (fixed: stride + summary n / stride),
least where stride is about the root of the length n; a stride that stays makes it quadratic with a small factor. State:
keys and values of every token seen. Strided keys are neighbours once the tokens are sorted by place within the stride,
and the parts of a row are joined by their log sums.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from formwright.kit.errors import SpecError, unknown
from formwright.ops.window_attention import Spans, merged, sliding, spans, window_attention
from formwright.parts.base import Traits
from formwright.parts.context import Context
from formwright.parts.mixers._windows import Windowed, at_least, by_residue
from formwright.registry import Paper, register

PATTERNS = ("strided", "fixed")


@functools.lru_cache(maxsize=64)
def earlier(length: int, stride: int) -> Spans:
    """For tokens sorted by place within the stride: all earlier ones of the same place."""
    start = by_residue(length, stride)[1]
    return spans(start[:, None], np.arange(length)[:, None], length)


@functools.lru_cache(maxsize=64)
def summaries(length: int, stride: int, summary: int) -> tuple[np.ndarray, Spans]:
    """The positions of summaries, and runs over all tokens followed by those: the own block so far, then summaries of
    blocks before it."""
    places = np.arange(length)
    columns = np.flatnonzero(places % stride >= stride - summary)
    block = places // stride
    low = np.stack((block * stride, np.full(length, length)), 1)
    high = np.stack((places + 1, length + block * summary), 1)
    return columns, spans(low, high, length + len(columns))


@register(
    "mixer", "sparse", paper=Paper("Child et al.", 2019, "1904.10509"), summary="strided or fixed sparse attention"
)
class Sparse(Windowed):
    """Slots and shared arguments as :class:`Windowed`. Always causal.

    Args:
        stride: about the root of the length it is meant for.
        pattern: "strided" (pictures, sound) or "fixed" (text).
        summary: with "fixed", how many places at the end of each block all later tokens see.
    """

    traits = Traits(causal=True, streams=True, growth="quadratic")
    examples = (
        {"heads": 4, "stride": 4, "rotary": {}},
        {"heads": 4, "kv_heads": 2, "stride": 4, "pattern": "fixed", "summary": 2, "bias": False},
    )

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        stride: int,
        pattern: Literal["strided", "fixed"] = "strided",
        summary: int = 1,
        kv_heads: int | None = None,
        head_width: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        rotary: dict[str, Any] | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(width, heads, kv_heads, head_width, bias, out_bias, rotary, scale, dropout)
        at_least(1, stride=stride, summary=summary)
        if pattern not in PATTERNS:
            raise SpecError(unknown("pattern of sparse", str(pattern), PATTERNS))
        if summary > stride:
            raise SpecError(f"summary={summary} must not be above stride={stride}, the places of a block")
        self.stride, self.pattern, self.summary = stride, pattern, summary

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: Context) -> Tensor:
        length = q.shape[1]
        if self.pattern == "fixed":
            columns, seen = summaries(length, self.stride, self.summary)
            places = torch.from_numpy(columns).to(q.device)
            k, v = (torch.cat((t, t[:, places]), 1) for t in (k, v))
            return window_attention(q, k, v, seen, scale=self.scale)[0]
        near = window_attention(q, k, v, sliding(length, self.stride - 1, 0), scale=self.scale)
        order = torch.from_numpy(by_residue(length, self.stride)[0]).to(q.device)
        back = torch.argsort(order)
        far = window_attention(q[:, order], k[:, order], v[:, order], earlier(length, self.stride), scale=self.scale)
        return merged(near, (far[0][:, back], far[1][:, back]))[0]

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        if self.pattern == "fixed":
            own = queries // self.stride == keys // self.stride
            return (own | (keys % self.stride >= self.stride - self.summary)) & (keys <= queries)
        apart = queries - keys
        return ((apart < self.stride) | (apart % self.stride == 0)) & (apart >= 0)

    def pairs(self, length: int) -> int:
        if self.pattern == "fixed":
            return summaries(length, self.stride, self.summary)[1].pairs(self.heads)
        return sliding(length, self.stride - 1, 0).pairs(self.heads) + earlier(length, self.stride).pairs(self.heads)
