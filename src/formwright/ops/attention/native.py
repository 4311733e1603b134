"""Packed attention by the compiled kernel: float32, any document lengths, causal or not; see ``native.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from formwright.ops import native

#: Longest document whose transposed keys stay in the second-level cache.
LONGEST = 4096


class Call(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "y")),
        *((name, c_int64) for name in ("q_row", "kv_row", "y_row")),
        ("offsets", c_void_p),
        *((name, c_int64) for name in ("documents", "heads", "groups", "width")),
        ("scale", c_float),
        ("causal", c_int),
    )


def suits(width: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether the kernel takes heads of this width and documents of these lengths, on this machine."""
    made = native.library()
    return width % 16 == 0 and bool(made.fw_attention_ready()) and max(b - a for a, b in spans) <= LONGEST


def packed_attention_native(
    q: Tensor, k: Tensor, v: Tensor, spans: Sequence[tuple[int, int]], scale: float, causal: bool
) -> Tensor | None:
    """q (1, T, H, D), k and v (1, T, G, D) -> (1, T, H, D), or None where the kernel does not apply.

    ``spans`` follow one another and cover 0 .. T.
    """
    width = q.shape[-1]
    if not native.usable(q, k, v) or v.shape[-1] != width or q.shape[1] == 0 or not suits(width, spans):
        return None
    if any(t.stride(-1) != 1 or t.stride(2) != width for t in (q, k, v)) or k.stride(1) != v.stride(1):
        return None
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    offsets = (c_int64 * (len(spans) + 1))(spans[0][0], *(stop for _, stop in spans))
    call = Call(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr(),
        q.stride(1), k.stride(1), y.stride(1), ctypes.addressof(offsets),
        len(spans), q.shape[2], k.shape[2], width, scale, causal,
    )  # fmt: skip
    native.library().fw_attention_packed(ctypes.byref(call), torch.get_num_threads())
    return y
