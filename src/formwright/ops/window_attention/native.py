"""Attention by runs of keys in the compiled kernel: float32 on the CPU, forwards and backwards; see ``native.cpp``."""

from __future__ import annotations

from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from formwright.ops import native
from formwright.ops.window_attention.spans import Spans, tiles

#: Queries of a tile, as in ``native.cpp``.
TILE = 48


class Call(native.Call):
    """The struct of the same name in ``native.cpp``."""

    _fields_ = native.fields(
        (c_void_p, "q k v hidden y logs dy delta dq dk dv low high tiles"),
        (c_int64, "batch length total heads groups width runs patterns count"),
        (c_float, "scale"),
    )


def usable(q: Tensor, k: Tensor, v: Tensor, seen: Spans) -> bool:
    """Whether the kernel takes these, whatever gradients are wanted: its backward is its own."""
    return native.reachable(q, k, v) and min(*q.shape, *k.shape) > 0 and seen.low.shape[-1] > 0


def _run(
    entry: str, q: Tensor, k: Tensor, seen: Spans, scale: float, valid: Tensor | None, **tensors: Tensor | None
) -> None:
    borders = tiles(seen, TILE)
    call = Call(
        low=seen.low.ctypes.data, high=seen.high.ctypes.data, tiles=borders.ctypes.data,
        batch=q.shape[0], length=q.shape[1], total=k.shape[1], heads=q.shape[2], groups=k.shape[2], width=q.shape[3],
        runs=seen.low.shape[-1], patterns=seen.patterns, count=len(borders) - 1, scale=scale,
    )  # fmt: skip
    call.give(q=q, k=k, hidden=hidden(valid), **tensors)
    call.run(entry)


def hidden(valid: Tensor | None) -> Tensor | None:
    """(B, S) of 0 where a key may be seen and -inf where not."""
    return None if valid is None else torch.zeros(valid.shape).masked_fill_(~valid, float("-inf"))


def forward(q: Tensor, k: Tensor, v: Tensor, seen: Spans, scale: float, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    out, logs = torch.empty(q.shape), torch.empty(q.shape[:3])
    _run("fw_window_attention", q, k, seen, scale, valid, v=v, y=out, logs=logs)
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
    made = {"dq": dq, "dk": dk, "dv": dv}
    _run("fw_window_attention_backward", q, k, seen, scale, valid, v=v, logs=logs, dy=dy, delta=delta, **made)
    return dq, dk, dv
