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

import torch
from torch import Tensor

from formwright.ops.attention.fused import fused_attention
from formwright.ops.attention.native import packed_by_kernel
from formwright.ops.attention.reference import attention_reference
from formwright.registry import Paper, register

__all__ = ["attention", "attention_reference", "blocks", "packed_attention"]

#: Queries handled at once where a mask or bias has to be written out.
CHUNK = 512

#: (start, stop) of queries, (start, stop) of keys -> (1 or B, 1 or H, queries, keys) added to the scores
Bias = Callable[[slice, slice], Tensor]
#: the same for visibility: True where a key may be seen
Mask = Callable[[slice, slice], Tensor]


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
) -> Tensor:
    """q (B, L, H, D), k and v (B, S, G, D) -> (B, L, H, D).

    ``causal`` aligns the first query with the first key. ``mask`` and ``bias`` are asked for a block of queries and
    keys at a time. ``window`` tells which keys a block can need: it is only for queries and keys of one sequence, whose
    positions rise along it.
    """
    heads, groups = q.shape[2], k.shape[2]
    if groups != heads:
        k = k.repeat_interleave(heads // groups, dim=2)
        v = v.repeat_interleave(heads // groups, dim=2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    length, total = q.shape[2], k.shape[2]
    if length == 0 or total == 0 or q.shape[0] == 0:
        return q.new_zeros(q.shape[0], heads, length, v.shape[-1]).transpose(1, 2)
    if mask is None and bias is None:
        return fused_attention(q, k, v, None, causal and total > 1, scale).transpose(1, 2)
    pieces = [
        _block(q[:, :, rows], k[:, :, columns], v[:, :, columns], scale, causal, mask, bias, rows, columns)
        for rows, columns in blocks(length, total, window, causal)
    ]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)).transpose(1, 2)


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
) -> Tensor:
    seen = None if mask is None else mask(rows, columns)
    if seen is not None and seen.dim() == 3:
        seen = seen[:, None]
    if causal and mask is None:
        places = torch.arange(columns.start, columns.stop, device=q.device)
        seen = (places[None] <= torch.arange(rows.start, rows.stop, device=q.device)[:, None])[None, None]
    if bias is None:
        assert seen is not None
        blind = ~seen.any(-1, keepdim=True)
        out = fused_attention(q, k, v, seen | blind, False, scale)
    else:
        added = bias(rows, columns).to(q.dtype)
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
) -> Tensor:
    """The packed layout, q (1, T, H, D): each document by itself, neighbours of equal length together.

    ``mask`` and ``bias`` are asked for positions inside a document.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is None and bias is None and window is None:

        def general(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _one_by_one(q, k, v, spans, scale, causal)

        done = packed_by_kernel(general, q, k, v, spans, scale, causal)
        if done is not None:
            return done
    return _one_by_one(q, k, v, spans, scale, causal, mask, bias, window)


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
) -> Tensor:
    """Each document by itself, neighbours of equal length together."""
    groups = list(alike(spans))
    sizes = [count * length for count, length in groups]
    # One split each, whose gradient is one concatenation: that of a slice would be as long as all documents.
    parts = [t[0].split(sizes) for t in (q, k, v)]
    out = []
    for index, (count, length) in enumerate(groups):
        if length:
            rows = (part[index].unflatten(0, (count, length)) for part in parts)
            piece = attention(*rows, scale=scale, causal=causal, mask=mask, bias=bias, window=window)
            out.append(piece.reshape(1, count * length, *piece.shape[2:]))
    if not out:
        return q.new_zeros(1, 0, q.shape[2], v.shape[-1])
    return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def alike(spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(how many, length) of every run of neighbouring documents of equal length."""
    for length, run in groupby(stop - start for start, stop in spans):
        yield len(list(run)), length
