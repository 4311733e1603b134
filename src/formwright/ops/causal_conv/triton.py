"""The short causal convolution on a GPU: one program a tile of tokens of one row and block of channels, both passes.

A row is taken together with the window before it, so that the first K-1 of its tokens are the initial window and its
last K-1 the final one. Taps read their shifted tiles from the cache; memory is read and written once. Nothing is kept:
the backward pass computes the sums before the activation again. Gradients of taps and bias are left per tile and added
afterwards, so that no bit depends on the order in which programs finish. Inputs of half precision are read as they are
and computed in float32.

This module needs the package triton and is imported only where a tensor is on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from formwright.ops.causal_conv.native import Tensors
from formwright.ops.rows import Rows, even, laid_out

#: Tokens of a tile and channels of a block, which both passes' registers hold with so many warps.
TILE, BLOCK, WARPS = 64, 64, 8

rows = Rows.on_device


@triton.jit
def mine(owners_at, starts_at, lengths_at, KEPT: tl.constexpr, TILE: tl.constexpr):
    """Row of this program, its first token and length, and places in the window and the row behind it."""
    program = tl.program_id(0)
    row = tl.load(owners_at + program)
    first, length = tl.load(starts_at + row), tl.load(lengths_at + row)
    skipped = (first + row * KEPT) // TILE + row  # by the rows before, see _sizes
    return row, first, length, (program - skipped) * TILE + tl.arange(0, TILE)


@triton.jit
def block(values_at, e, real):
    """Values of a block of channels in float32, zeros where there are none."""
    if values_at is None:
        values = tl.zeros(e.shape, tl.float32)
    else:
        values = tl.load(values_at + e, mask=real, other=0.0)
    return values.to(tl.float32)


@triton.jit
def seen(window_at, row_at, stride, channels, length, s, real, KEPT: tl.constexpr):
    """(TILE, BLOCK) values at places ``s``, in float32, zero in front of the window and behind the row."""
    t = s - KEPT
    old = ((s >= 0) & (t < 0))[:, None] & real[None]
    new = ((t >= 0) & (t < length))[:, None] & real[None]
    kept = tl.load(window_at[None] + s[:, None] * channels, mask=old, other=0.0).to(tl.float32)
    own = tl.load(row_at[None] + t[:, None] * stride, mask=new, other=0.0).to(tl.float32)
    return tl.where(old, kept, own)


@triton.jit
def summed(window_at, row_at, taps_at, bias, stride, channels, length, s, real, TAPS: tl.constexpr):
    """What the taps make of places ``s`` and those before, ahead of the activation."""
    sums = bias[None]
    for j in tl.static_range(TAPS):
        value = seen(window_at, row_at, stride, channels, length, s + j + 1 - TAPS, real, TAPS - 1)
        sums += value * block(taps_at, j, real)[None]
    return sums


@triton.jit
def forward_kernel(
    x_at, weight_at, bias_at, initial_at, y_at, final_at, owners_at, starts_at, lengths_at, stride, channels,
    SILU: tl.constexpr, TAPS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    KEPT: tl.constexpr = TAPS - 1
    row, first, length, s = mine(owners_at, starts_at, lengths_at, KEPT, TILE)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real, bias = e < channels, block(bias_at, e, e < channels)
    row_at, window_at = x_at + first * stride + e, initial_at + row * KEPT * channels + e
    y = summed(window_at, row_at, weight_at + e * TAPS, bias, stride, channels, length, s, real, TAPS)
    if SILU:
        y *= tl.sigmoid(y)
    new = ((s >= KEPT) & (s < length + KEPT))[:, None] & real[None]
    tl.store(y_at + (first + s - KEPT)[:, None] * channels + e[None], y, mask=new)
    last = ((s >= length) & (s < length + KEPT))[:, None] & real[None]
    value = seen(window_at, row_at, stride, channels, length, s, real, KEPT)
    tl.store(final_at + (row * KEPT + s - length)[:, None] * channels + e[None], value, mask=last)


@triton.jit
def reached(
    d_y_at, d_y_stride, window_at, row_at, taps_at, bias, stride, channels, length, s, real,
    SILU: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The gradient of the sums at places ``s``."""
    t = s + 1 - TAPS
    new = ((t >= 0) & (t < length))[:, None] & real[None]
    d_sums = tl.load(d_y_at[None] + t[:, None] * d_y_stride, mask=new, other=0.0).to(tl.float32)
    if SILU:
        sums = summed(window_at, row_at, taps_at, bias, stride, channels, length, s, real, TAPS)
        gate = tl.sigmoid(sums)
        d_sums = tl.where(new, d_sums * gate * (1.0 + sums * (1.0 - gate)), 0.0)
    return d_sums


@triton.jit
def backward_kernel(
    x_at, weight_at, bias_at, initial_at, d_y_at, d_final_at, d_x_at, d_taps_at, d_initial_at,
    owners_at, starts_at, lengths_at, stride, d_y_stride, channels,
    SILU: tl.constexpr, TAPS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of tokens and initial windows; for each tile those of the taps, and behind them that of the bias."""
    KEPT: tl.constexpr = TAPS - 1
    row, first, length, s = mine(owners_at, starts_at, lengths_at, KEPT, TILE)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real, bias, taps_at = e < channels, block(bias_at, e, e < channels), weight_at + e * TAPS
    row_at, window_at = x_at + first * stride + e, initial_at + row * KEPT * channels + e
    value = seen(window_at, row_at, stride, channels, length, s, real, KEPT)
    d_value = tl.zeros((TILE, BLOCK), tl.float32)
    if d_final_at is not None:
        last = ((s >= length) & (s < length + KEPT))[:, None] & real[None]
        d_last = tl.load(d_final_at + (row * KEPT + s - length)[:, None] * channels + e[None], mask=last, other=0.0)
        d_value = d_last.to(tl.float32)
    sums_at = d_taps_at + tl.program_id(0).to(tl.int64) * (TAPS + 1) * channels + e
    for j in range(TAPS):  # what the sum j places on makes of a value
        d_sums = reached(
            d_y_at + first * d_y_stride + e, d_y_stride, window_at, row_at, taps_at, bias, stride, channels, length,
            s + j, real, SILU, TAPS,
        )  # fmt: skip
        d_value += d_sums * block(taps_at, KEPT - j, real)[None]
        tl.store(sums_at + (KEPT - j) * channels, tl.sum(d_sums * value, 0), mask=real)
        tl.store(sums_at + TAPS * channels, tl.sum(d_sums, 0), mask=real & (j == 0))
    old = (s < KEPT)[:, None] & real[None]
    tl.store(d_initial_at + (row * KEPT + s)[:, None] * channels + e[None], d_value, mask=old)
    new = ((s >= KEPT) & (s < length + KEPT))[:, None] & real[None]
    tl.store(d_x_at + (first + s - KEPT)[:, None] * channels + e[None], d_value, mask=new)


def _sizes(tensors: Tensors, rows: Rows[Tensor], silu: bool) -> tuple[tuple[int, int], Tensor, dict[str, Any]]:
    """The grid, the row of every tile, and what both kernels are compiled for.

    With its window of K-1 places a row begins at place start + row (K-1) of all, and has its tiles to itself: they
    are numbered from that place / TILE + row on, and a few numbers that no row needs do nothing.
    """
    x, (channels, taps), count = tensors.x, tensors.weight.shape, len(rows.starts)
    number = torch.arange(count, device=x.device)
    begin = (rows.starts + number * (taps - 1)) // TILE + number
    tiles = (x.shape[0] * x.shape[1] + count * (taps - 1)) // TILE + count
    owners = torch.searchsorted(begin, torch.arange(tiles, device=x.device), right=True) - 1
    sizes = {"SILU": silu, "TAPS": taps, "TILE": TILE, "BLOCK": BLOCK, "num_warps": WARPS}
    return (tiles, triton.cdiv(channels, BLOCK)), owners.clamp(min=0), sizes


def forward(tensors: Tensors, rows: Rows[Tensor], silu: bool, *, keep: bool) -> tuple[Tensor, Tensor, None]:
    """y and the window after each row; nothing is kept."""
    tensors = laid_out(tensors, "x")
    grid, owners, sizes = _sizes(tensors, rows, silu)
    y, final = rows.blank(tensors.x), torch.empty_like(tensors.initial)
    given = (*tensors, y, final, owners, rows.starts, rows.lengths)
    forward_kernel[grid](*given, tensors.x.stride(1), tensors.x.shape[2], **sizes)
    return y, final, None


def backward(
    grad_y: Tensor, grad_final: Tensor | None, kept: None, tensors: Tensors, rows: Rows[Tensor], silu: bool
) -> list[Tensor | None]:
    """Gradients of ``tensors``, in their order."""
    tensors, grad_y = laid_out(tensors, "x"), even(grad_y)
    grad_final = None if grad_final is None else grad_final.contiguous()
    x, weight, bias, initial = tensors
    channels, taps = weight.shape
    grid, owners, sizes = _sizes(tensors, rows, silu)
    d_x, d_initial = rows.blank(x), torch.empty_like(initial)
    d_taps = x.new_empty(grid[0], taps + 1, channels, dtype=torch.float32)
    given = (*tensors, grad_y, grad_final, d_x, d_taps, d_initial, owners, rows.starts, rows.lengths)
    backward_kernel[grid](*given, x.stride(1), grad_y.stride(1), channels, **sizes)
    total = d_taps.sum(0)
    d_bias = None if bias is None else total[taps].to(bias.dtype)
    return [d_x, total[:taps].t().to(weight.dtype), d_bias, d_initial]
