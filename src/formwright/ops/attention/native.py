"""Packed attention by the compiled kernel: float32, any document lengths, causal or not; see ``native.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import NamedTuple

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
        ("rounded", c_int),
    )


class Heads(NamedTuple):
    """Plain softmax attention: the width of a head, the factor of its scores, and whether it is causal.

    ``rounded`` allows factors in bfloat16 where the processor multiplies them: sums and exponentials stay float32.
    """

    width: int
    scale: float
    causal: bool
    rounded: bool = False


def suits(width: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether the kernel takes heads of this width and documents of these lengths, on this machine."""
    ready = width % 16 == 0 and bool(native.library().fw_attention_ready())
    return ready and max((stop - start for start, stop in spans), default=0) <= LONGEST


def documents(spans: Sequence[tuple[int, int]]) -> Call:
    """A call's documents, in order and covering 0 .. T; the rest of it is unset."""
    borders = (c_int64 * (len(spans) + 1))(0, *[stop for _, stop in spans])
    made = Call(offsets=ctypes.addressof(borders), documents=len(spans))
    made.held = borders  # a pointer keeps nothing alive
    return made


def packed_attention_native(
    q: Tensor, k: Tensor, v: Tensor, spans: Sequence[tuple[int, int]], scale: float, causal: bool, rounded: bool = False
) -> Tensor | None:
    """q (1, T, H, D), k and v (1, T, G, D) -> (1, T, H, D), or None where the kernel does not apply.

    ``rounded`` as in :class:`Heads`.
    """
    width = q.shape[-1]
    if not native.usable(q, k, v) or v.shape[-1] != width or q.shape[1] == 0 or not suits(width, spans):
        return None
    if any(t.stride(-1) != 1 or t.stride(2) != width for t in (q, k, v)) or k.stride(1) != v.stride(1):
        return None
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    call = documents(spans)
    call.heads, call.groups, call.width = q.shape[2], k.shape[2], width
    call.scale, call.causal, call.rounded = scale, causal, rounded
    call.q, call.k, call.v, call.y = q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr()
    call.q_row, call.kv_row, call.y_row = q.stride(1), k.stride(1), y.stride(1)
    native.library().fw_attention_packed(ctypes.byref(call), torch.get_num_threads())
    return y
