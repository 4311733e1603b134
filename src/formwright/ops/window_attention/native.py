"""Attention by runs of keys in the compiled kernel: float32 on the CPU, forwards and backwards; see ``native.cpp``."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from formwright.ops import native
from formwright.ops.window_attention.spans import Spans, tiles

#: Queries of a tile, as in ``native.cpp``.
TILE = 48


class Call(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "hidden", "y", "logs", "dy", "delta", "dq", "dk", "dv")),
        *((name, c_void_p) for name in ("low", "high", "tiles")),
        *((name, c_int64) for name in ("batch", "length", "total", "heads", "groups", "width")),
        *((name, c_int64) for name in ("runs", "patterns", "count")),
        ("scale", c_float),
    )


def usable(q: Tensor, k: Tensor, v: Tensor, seen: Spans) -> bool:
    """Whether the kernel takes these, whatever gradients are wanted: its backward is its own."""
    with torch.no_grad():
        return native.usable(q, k, v) and min(*q.shape, *k.shape) > 0 and seen.low.shape[-1] > 0


def _call(q: Tensor, k: Tensor, seen: Spans, scale: float, **tensors: Tensor | None) -> tuple[Call, Any]:
    """What the kernel is told, and what must outlive it."""
    borders = tiles(seen, TILE)
    call = Call(
        low=seen.low.ctypes.data, high=seen.high.ctypes.data, tiles=borders.ctypes.data,
        batch=q.shape[0], length=q.shape[1], total=k.shape[1], heads=q.shape[2], groups=k.shape[2], width=q.shape[3],
        runs=seen.low.shape[-1], patterns=seen.patterns, count=len(borders) - 1, scale=scale,
    )  # fmt: skip
    held = {name: t.contiguous() for name, t in dict(tensors, q=q, k=k).items() if t is not None}
    for name, tensor in held.items():
        setattr(call, name, tensor.data_ptr())
    return call, held


def hidden(valid: Tensor | None) -> Tensor | None:
    """(B, S) of 0 where a key may be seen and -inf where not."""
    return None if valid is None else torch.zeros(valid.shape).masked_fill_(~valid, float("-inf"))


def forward(q: Tensor, k: Tensor, v: Tensor, seen: Spans, scale: float, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    out, logs = torch.empty(q.shape), torch.empty(q.shape[:3])
    call, held = _call(q, k, seen, scale, v=v, hidden=hidden(valid), y=out, logs=logs)
    native.library().fw_window_attention(ctypes.byref(call), torch.get_num_threads())
    del held
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
    dq, dk, dv = torch.zeros(q.shape), torch.zeros(k.shape), torch.zeros(v.shape)
    call, held = _call(q, k, seen, scale, v=v, hidden=hidden(valid), logs=logs, dy=dy, delta=delta, dq=dq, dk=dk, dv=dv)
    native.library().fw_window_attention_backward(ctypes.byref(call), torch.get_num_threads())
    del held
    return dq, dk, dv
