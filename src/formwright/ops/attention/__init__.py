"""Softmax attention over padded, masked or packed inputs: ``softmax(q k^T * scale + bias) v``.

All forms use (B, L, H, D) for queries and (B, S, G, D) for keys and values, where G divides H (grouped and multi-query
attention). ``reference`` is the definition; :func:`attention` picks PyTorch's fused kernel. In the packed layout it
runs document by document, so nothing crosses a border and no product is spent on padding; where ``native`` was built
that is one call, forwards and backwards. A query that sees no key gives zeros. Cost: 2 L S H D multiply-accumulates;
memory linear in length except where a bias or mask must be made, which happens for ``CHUNK`` queries at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.ops.attention.fused import fused_attention
from formwright.ops.attention.native import packed_by_kernel
from formwright.ops.attention.reference import attention_reference
from formwright.registry import Paper, register

__all__ = ["Ahead", "attention", "attention_reference", "blocks", "packed_attention"]

#: Queries handled at once where a mask or bias has to be written out.
CHUNK = 512

#: (start, stop) of queries, (start, stop) of keys -> (1 or B, 1 or H, queries, keys) added to the scores
Bias = Callable[[slice, slice], Tensor]
#: the same for visibility: True where a key may be seen
Mask = Callable[[slice, slice], Tensor]


class Ahead(NamedTuple):
    """Keys and values that stand before all others, k and v (B or 1, P, G, D): every query sees them, whatever the
    rule and without bias. ``seen`` (B, P) bool: which of them a row has, None for all."""

    k: Tensor
    v: Tensor
    seen: Tensor | None = None

    def rows(self, start: int, stop: int) -> Ahead:
        """Those of the rows (documents) ``start`` .. ``stop``."""
        if self.seen is None and len(self.k) == 1:
            return self
        return Ahead(*(None if t is None or len(t) == 1 else t[start:stop] for t in self))  # type: ignore[arg-type]

    def before(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (B, S, G, D) behind these."""
        own = (t.to(k.dtype).expand(len(k), -1, -1, -1) for t in (self.k, self.v))
        return tuple(torch.cat(pair, 1) for pair in zip(own, (k, v)))  # type: ignore[return-value]

    def visible(self, seen: Tensor | None, total: int) -> Tensor | None:
        """What is seen of these and of ``total`` keys behind them, from what is seen of those (..., L or 1, total)."""
        if seen is None and self.seen is None:
            return None
        own = self.k.new_ones(1, 1, 1, self.k.shape[1], dtype=torch.bool)
        own = own if self.seen is None else self.seen[:, None, None]
        rest = own.new_ones(1, 1, 1, total) if seen is None else seen
        shape = torch.broadcast_shapes(own.shape[:-1], rest.shape[:-1])
        return torch.cat((own.expand(*shape, -1), rest.expand(*shape, -1)), -1)


@register(
    "op", "attention", paper=Paper("Vaswani et al.", 2017, "1706.03762"), summary="softmax attention, padded or packed"
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    mask: Mask | None = None,
    bias: Bias | None = None,
    window: int | None = None,
    ahead: Ahead | None = None,
) -> Tensor:
    """q (B, L, H, D), k and v (B, S, G, D) -> (B, L, H, D).

    ``causal`` aligns the first query with the first key. ``mask`` and ``bias`` are asked for a block of queries and
    keys at a time. ``window`` tells which keys a block can need: it is only for queries and keys of one sequence, whose
    positions rise along it. ``ahead``: keys and values before all of these.
    """
    heads = q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    length, total = q.shape[1], k.shape[1]
    if length == 0 or total == 0 or q.shape[0] == 0:
        return q.new_zeros(q.shape[0], length, heads, v.shape[-1])
    if mask is None and bias is None and (ahead is None or (ahead.seen is None and not causal)):
        k, v = (k, v) if ahead is None else ahead.before(k, v)
        return fused_attention(*_heads_first(q, k, v), None, causal and total > 1, scale).transpose(1, 2)
    pieces = []
    for rows, columns in blocks(length, total, window, causal):
        near = k[:, columns], v[:, columns]
        near = near if ahead is None else ahead.before(*near)
        pieces.append(_block(*_heads_first(q[:, rows], *near), scale, causal, mask, bias, rows, columns, ahead))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)).transpose(1, 2)


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, L, D) of each, keys and values once for every head of the queries that reads them."""
    repeats = q.shape[2] // k.shape[2]
    if repeats != 1:
        k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def blocks(length: int, total: int, window: int | None, causal: bool) -> Iterator[tuple[slice, slice]]:
    """The queries that are handled at once where a mask or bias is written out, and the keys that they can need."""
    # A length that stays open while a graph is traced for export cannot be counted in blocks.
    if isinstance(length, torch.SymInt) or (window is None and 0 < length <= 2 * CHUNK):
        yield slice(0, length), slice(0, total)
        return
    for start in range(0, length, CHUNK):
        rows = slice(start, min(start + CHUNK, length))
        first, last = 0, total
        if window is not None:
            first = max(0, rows.start - window + 1)
            last = min(total, rows.stop if causal else rows.stop + window - 1)
        yield rows, slice(first, last)


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    mask: Mask | None,
    bias: Bias | None,
    rows: slice,
    columns: slice,
    ahead: Ahead | None,
) -> Tensor:
    seen = None if mask is None else mask(rows, columns)
    if seen is not None and seen.dim() == 3:
        seen = seen[:, None]
    if causal and mask is None:
        places = torch.arange(columns.start, columns.stop, device=q.device)
        seen = (places[None] <= torch.arange(rows.start, rows.stop, device=q.device)[:, None])[None, None]
    added = None if bias is None else bias(rows, columns).to(q.dtype)
    if ahead is not None:
        seen = ahead.visible(seen, columns.stop - columns.start)
        added = None if added is None else F.pad(added, (ahead.k.shape[1], 0))
    if added is None:
        assert seen is not None
        blind = ~seen.any(-1, keepdim=True)
        out = fused_attention(q, k, v, seen | blind, False, scale)
    else:
        if seen is None:
            return fused_attention(q, k, v, added, False, scale)
        blind = ~seen.any(-1, keepdim=True)
        added = added.masked_fill(~(seen | blind), float("-inf"))
        out = fused_attention(q, k, v, added, False, scale)
    return out.masked_fill(blind, 0.0)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Sequence[tuple[int, int]],
    *,
    scale: float | None = None,
    causal: bool = False,
    mask: Mask | None = None,
    bias: Bias | None = None,
    window: int | None = None,
    ahead: Ahead | None = None,
) -> Tensor:
    """The packed layout, q (1, T, H, D): each document by itself, neighbours of equal length together.

    ``mask`` and ``bias`` are asked for positions inside a document; ``ahead`` has a row for each, or one for all.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is None and bias is None and window is None and ahead is None:

        def general(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _one_by_one(q, k, v, spans, scale, causal)

        done = packed_by_kernel(general, q, k, v, spans, scale, causal)
        if done is not None:
            return done
    return _one_by_one(q, k, v, spans, scale, causal, mask, bias, window, ahead)


def _one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Sequence[tuple[int, int]],
    scale: float,
    causal: bool,
    mask: Mask | None = None,
    bias: Bias | None = None,
    window: int | None = None,
    ahead: Ahead | None = None,
) -> Tensor:
    """Each document by itself, neighbours of equal length together."""
    groups = list(alike(spans))
    sizes = [count * length for count, length in groups]
    # One split each, whose gradient is one concatenation: that of a slice would be as long as all documents.
    parts = [t[0].split(sizes) for t in (q, k, v)]
    out, first = [], 0
    for index, (count, length) in enumerate(groups):
        if length:
            rows = (part[index].unflatten(0, (count, length)) for part in parts)
            front = None if ahead is None else ahead.rows(first, first + count)
            piece = attention(*rows, scale=scale, causal=causal, mask=mask, bias=bias, window=window, ahead=front)
            out.append(piece.reshape(1, count * length, *piece.shape[2:]))
        first += count
    if not out:
        return q.new_zeros(1, 0, q.shape[2], v.shape[-1])
    return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def alike(spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(how many, length) of every run of neighbouring documents of equal length."""
    for length, run in groupby(stop - start for start, stop in spans):
        yield len(list(run)), length
