"""One token of a Mamba layer, from the projection in to the projection out, in one call.

The same mathematics as a pass of a single token through the part's own pieces, which stay the definition: for a few
rows its time is that of reading the layer's weights, and a call for each piece would take longer than that. ``native``
shares the four passes over the weights among threads. Gu and Dao, "Mamba", 2023 (2312.00752). Cost: one
multiply-accumulate a weight and row, and about 9 operations a row, channel and state.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from formwright.ops import native
from formwright.registry import Paper, register

__all__ = ["MOST", "Weights", "mamba_step"]

#: Rows above which products of matrices are faster.
MOST = 8


class Weights(NamedTuple):
    """in (2 E, W), conv (E, K), x (rank + 2 N, E), dt (E, rank), dt_bias and D (E,), A_log (E, N), out (W, E).

    The projections have no bias but those in, out and of the convolution.
    """

    in_weight: Tensor
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    x: Tensor
    dt: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    out_weight: Tensor
    out_bias: Tensor | None


class _Call(ctypes.Structure):
    _fields_ = (
        ("given", c_void_p),
        *((name, c_void_p) for name in Weights._fields),
        *((name, c_void_p) for name in ("window", "h", "y", "next_window", "next_h")),
        *((name, c_void_p) for name in ("mixed", "values", "chosen")),
        *((name, c_int64) for name in ("rows", "width", "inner", "states", "taps", "rank")),
    )


@register("op", "mamba_step", paper=Paper("Gu and Dao", 2023, "2312.00752"), summary="a Mamba layer for one token")
def mamba_step(x: Tensor, weights: Weights, window: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """x (B, 1, W), window (B, K-1, E) and h (B, E, N) -> y (B, 1, W), the next window and the next h.

    None where only the layer's own pieces serve: more than ``MOST`` rows, a wanted gradient, other types or devices, or
    no compiled kernel.
    """
    rows, length, width = x.shape
    held = [x, window, h, *(t for t in weights if t is not None)]
    if length != 1 or not 0 < rows <= MOST or not native.usable(*held) or not all(t.is_contiguous() for t in held):
        return None
    (inner, states), (_, taps) = weights.A_log.shape, weights.conv.shape
    chosen = weights.x.shape[0]
    y, next_window, next_h = torch.empty_like(x), torch.empty_like(window), torch.empty_like(h)
    space = x.new_empty(rows * (3 * inner + chosen))
    at = space.data_ptr()
    pointers = [None if t is None else t.data_ptr() for t in (x, *weights, window, h, y, next_window, next_h)]
    places = (at, at + 8 * rows * inner, at + 12 * rows * inner)
    call = _Call(*pointers, *places, rows, width, inner, states, taps, weights.dt.shape[1])
    native.library().fw_mamba_step(ctypes.byref(call), torch.get_num_threads())
    return y, next_window, next_h
