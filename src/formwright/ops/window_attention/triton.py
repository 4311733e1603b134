"""Attention by runs of keys on a GPU: Triton kernels, forwards and backwards; imported only where one is used.

One program takes a tile of queries of one head and walks over the union of its runs with a running softmax, in float32.
The backward pass makes the probabilities again from the log sums; gradients of keys and values are added atomically,
so their last bits depend on the order in which programs finish.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from formwright.ops.window_attention.spans import Spans, tiles

#: Queries of a tile and keys of a step.
TILE = KEYS = 64


@triton.jit
def _tile(Low, High, Tiles, pattern, length, total, run, RUNS: tl.constexpr, TILE: tl.constexpr):
    """The queries of this program, which are real, where their run starts and ends, and the union of it."""
    start, stop = tl.load(Tiles + tl.program_id(0)), tl.load(Tiles + tl.program_id(0) + 1)
    rows = start + tl.arange(0, TILE)
    real = rows < stop
    at = (pattern * length + rows) * RUNS + run
    low, high = tl.load(Low + at, real, 0), tl.load(High + at, real, 0)
    first = tl.min(tl.where(low < high, low, total), 0)
    last = tl.max(tl.where(low < high, high, 0), 0)
    return rows, real, low, high, first, last


@triton.jit
def _forward(
    Q, K, V, Valid, Y, Logs, Low, High, Tiles, length, total, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, RUNS: tl.constexpr, PATTERNS: tl.constexpr,
    MASKED: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    group = head // (HEADS // GROUPS)
    pattern = head if PATTERNS > 1 else 0
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    rows, real, low, high, first, last = _tile(Low, High, Tiles, pattern, length, total, 0, RUNS, TILE)
    q_at = ((batch * length + rows) * HEADS + head)[:, None] * WIDTH + columns[None]
    shown = real[:, None] & inside[None]
    q = tl.load(Q + q_at, shown, 0.0).to(tl.float32)
    peak = tl.full((TILE,), float("-inf"), tl.float32)
    sums = tl.zeros((TILE,), tl.float32)
    y = tl.zeros((TILE, BLOCK), tl.float32)
    for run in range(RUNS):
        rows, real, low, high, first, last = _tile(Low, High, Tiles, pattern, length, total, run, RUNS, TILE)
        for at in range(first, last, KEYS):
            keys = at + tl.arange(0, KEYS)
            held = keys < last
            k_at = ((batch * total + keys) * GROUPS + group)[:, None] * WIDTH + columns[None]
            k = tl.load(K + k_at, held[:, None] & inside[None], 0.0).to(tl.float32)
            v = tl.load(V + k_at, held[:, None] & inside[None], 0.0).to(tl.float32)
            seen = (keys[None] >= low[:, None]) & (keys[None] < high[:, None])
            if MASKED:
                seen = seen & (tl.load(Valid + batch * total + keys, held, 0) != 0)[None]
            s = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
            most = tl.maximum(peak, tl.max(s, 1))
            base = tl.where(most == float("-inf"), 0.0, most)
            p = tl.exp(s - base[:, None])
            factor = tl.exp(peak - base)
            sums = sums * factor + tl.sum(p, 1)
            y = y * factor[:, None] + tl.dot(p, v, input_precision="ieee")
            peak = most
    blind = sums == 0.0
    safe = tl.where(blind, 1.0, sums)
    tl.store(Y + q_at, (y / safe[:, None]).to(Y.dtype.element_ty), shown)
    logs = tl.where(blind, float("-inf"), peak + tl.log(safe))
    tl.store(Logs + (batch * length + rows) * HEADS + head, logs, real)


@triton.jit
def _backward(
    Q, K, V, Valid, Logs, Grad, Delta, Dq, Dk, Dv, Low, High, Tiles, length, total, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, RUNS: tl.constexpr, PATTERNS: tl.constexpr,
    MASKED: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    group = head // (HEADS // GROUPS)
    pattern = head if PATTERNS > 1 else 0
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    rows, real, low, high, first, last = _tile(Low, High, Tiles, pattern, length, total, 0, RUNS, TILE)
    q_at = ((batch * length + rows) * HEADS + head)[:, None] * WIDTH + columns[None]
    shown = real[:, None] & inside[None]
    q = tl.load(Q + q_at, shown, 0.0).to(tl.float32)
    grad = tl.load(Grad + q_at, shown, 0.0).to(tl.float32)
    row_at = (batch * length + rows) * HEADS + head
    logs = tl.load(Logs + row_at, real, 0.0)
    delta = tl.load(Delta + row_at, real, 0.0)
    dq = tl.zeros((TILE, BLOCK), tl.float32)
    for run in range(RUNS):
        rows, real, low, high, first, last = _tile(Low, High, Tiles, pattern, length, total, run, RUNS, TILE)
        for at in range(first, last, KEYS):
            keys = at + tl.arange(0, KEYS)
            held = keys < last
            k_at = ((batch * total + keys) * GROUPS + group)[:, None] * WIDTH + columns[None]
            k = tl.load(K + k_at, held[:, None] & inside[None], 0.0).to(tl.float32)
            v = tl.load(V + k_at, held[:, None] & inside[None], 0.0).to(tl.float32)
            seen = (keys[None] >= low[:, None]) & (keys[None] < high[:, None])
            if MASKED:
                seen = seen & (tl.load(Valid + batch * total + keys, held, 0) != 0)[None]
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            p = tl.where(seen, tl.exp(tl.where(seen, s - logs[:, None], 0.0)), 0.0)
            ds = p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None]) * scale
            dq += tl.dot(ds, k, input_precision="ieee")
            tl.atomic_add(Dk + k_at, tl.dot(tl.trans(ds), q, input_precision="ieee"), held[:, None] & inside[None])
            tl.atomic_add(Dv + k_at, tl.dot(tl.trans(p), grad, input_precision="ieee"), held[:, None] & inside[None])
    tl.store(Dq + q_at, dq, shown)


def usable(q: Tensor, k: Tensor, grad: Tensor, seen: Spans) -> bool:
    """Whether the backward kernel takes these: anything that is plain memory, since no graph is being built."""
    return all(type(t) in (Tensor, torch.nn.Parameter) for t in (q, k, grad))


def _sizes(q: Tensor, k: Tensor, seen: Spans, masked: bool) -> tuple[dict[str, Any], tuple[int, int], list[Tensor]]:
    """Compile-time sizes, the grid, and the pattern on the device."""
    borders = tiles(seen, TILE)
    sizes = {
        "HEADS": q.shape[2], "GROUPS": k.shape[2], "WIDTH": q.shape[3], "RUNS": seen.low.shape[-1],
        "PATTERNS": seen.patterns, "MASKED": masked, "TILE": TILE, "KEYS": KEYS,
        "BLOCK": max(16, triton.next_power_of_2(q.shape[3])),
    }  # fmt: skip
    pattern = [torch.from_numpy(t).to(device=q.device, dtype=torch.int32) for t in (seen.low, seen.high, borders)]
    return sizes, (len(borders) - 1, q.shape[0] * q.shape[2]), pattern


def forward(q: Tensor, k: Tensor, v: Tensor, seen: Spans, scale: float, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`~formwright.ops.window_attention.window_attention`."""
    q, k, v = (t.contiguous() for t in (q, k, v))
    out = torch.empty_like(q)
    logs = torch.empty(q.shape[:3], device=q.device, dtype=torch.float32)
    sizes, grid, pattern = _sizes(q, k, seen, valid is not None)
    shown = q if valid is None else valid.to(torch.int8).contiguous()
    _forward[grid](q, k, v, shown, out, logs, *pattern, q.shape[1], seen.total, scale, **sizes)
    return out, logs


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Spans,
    scale: float,
    valid: Tensor | None,
    logs: Tensor,
    dy: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``delta`` (B, L, H): sum of the output times its gradient, less the gradient of the log sums."""
    q, k, v, dy = (t.contiguous() for t in (q, k, v, dy))
    dq, dk, dv = (torch.zeros(t.shape, device=q.device, dtype=torch.float32) for t in (q, k, v))
    sizes, grid, pattern = _sizes(q, k, seen, valid is not None)
    shown = q if valid is None else valid.to(torch.int8).contiguous()
    _backward[grid](
        q,
        k,
        v,
        shown,
        logs,
        dy,
        delta.float().contiguous(),
        dq,
        dk,
        dv,
        *pattern,
        q.shape[1],
        seen.total,
        scale,
        **sizes,
    )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
