"""The selective scan on a GPU: one program a row and block of channels, which walks its chunks of tokens.

In a chunk one state after the other is an associative scan over the tokens, so that every token, step and gate is read
once and no state of a token is ever in memory. Between chunks the states of a block stay on the chip. Kept for the
backward pass are the states before every chunk; it makes the others again, from which a second scan runs back through
the chunk. Sums over channels (the gradients of B and C) are left per block, those over rows per row, and added
afterwards: no bit depends on the order in which programs finish. Inputs of half precision are read as they are and
computed in float32.

This module needs the package triton and is imported only where a tensor is on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from formwright.ops.rows import Rows, even, laid_out
from formwright.ops.selective_scan.native import Tensors

#: Tokens of a chunk and channels of a block, which both passes' registers hold with so many warps.
CHUNK, BLOCK, WARPS = 64, 32, 8
#: Inputs whose tokens may lie apart.
STRIDED = "x delta B C z"

rows = Rows.on_device


@triton.jit
def after(decay, change, later, changed):
    """Two stretches of tokens, each state -> decay state + change, as one."""
    return decay * later, change * later + changed


@triton.jit
def after_but(decay, change, kept, later, changed, later_kept):
    """The same with a third number: the change without what the stretch's last token adds."""
    return decay * later, change * later + changed, change * later + later_kept


@triton.jit
def picked(values, index, which):
    """Row ``which`` of (rows, BLOCK), whose numbers are ``index``."""
    return tl.sum(tl.where(index[:, None] == which, values, 0.0), 0)


@triton.jit
def softplus(x):
    """log(1 + e^x); the quotient gives back what 1 + u rounds off, so that small results keep their digits."""
    u = tl.exp(-tl.abs(x))
    w = 1.0 + u
    return tl.maximum(x, 0.0) + tl.where(w == 1.0, u, tl.log(w) * (u / (w - 1.0)))


@triton.jit
def tokens(at, stride, token, e, inside):
    """(CHUNK, BLOCK) values of some tokens and channels in float32, zero outside."""
    return tl.load(at + token[:, None] * stride + e[None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def steps(delta_at, stride, token, e, inside, SOFTPLUS: tl.constexpr):
    """Steps of some tokens and channels: 0 outside, where a state then stays as it is."""
    raw = tokens(delta_at, stride, token, e, inside)
    return tl.where(inside, softplus(raw), 0.0) if SOFTPLUS else raw


@triton.jit
def column(at, stride, index, n, inside):
    """Column ``n`` of a matrix, its rows ``stride`` apart, in float32."""
    return tl.load(at + index * stride + n, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    x_at, delta_at, A_at, B_at, C_at, D_at, z_at, initial_at, y_at, final_at, kept_at, starts_at, lengths_at,
    x_stride, delta_stride, B_stride, C_stride, z_stride, channels, states,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Outputs, the last states, and unless ``kept_at`` is None the states before every chunk."""
    row = tl.program_id(0).to(tl.int64)
    first, length = tl.load(starts_at + row), tl.load(lengths_at + row)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    t, n = tl.arange(0, CHUNK), tl.arange(0, STATES)
    real, held = e < channels, (n < states)[:, None] & (e < channels)[None]
    own = (row * channels + e)[None] * states + n[:, None]
    state = tl.load(initial_at + own, mask=held, other=0.0)
    for chunk in range(tl.cdiv(length, CHUNK)):
        if kept_at is not None:
            place = first // CHUNK + row + chunk
            tl.store(kept_at + (place * states + n)[:, None] * channels + e[None], state, mask=held)
        token = first + chunk * CHUNK + t
        present = token < first + length
        inside = present[:, None] & real[None]
        x = tokens(x_at, x_stride, token, e, inside)
        step = steps(delta_at, delta_stride, token, e, inside, SOFTPLUS)
        y = tl.zeros((CHUNK, BLOCK), tl.float32)
        if D_at is not None:
            y = x * column(D_at, 1, e, 0, real)[None]
        for s in range(states):
            decay = tl.exp(step * column(A_at, states, e, s, real)[None])
            entering = tl.where(t[:, None] == 0, decay * picked(state, n, s)[None], 0.0)
            added = step * x * column(B_at, B_stride, token, s, present)[:, None]
            _, h = tl.associative_scan((decay, entering + added), 0, after)
            y += h * column(C_at, C_stride, token, s, present)[:, None]
            state = tl.where(n[:, None] == s, picked(h, t, CHUNK - 1)[None], state)
        if z_at is not None:
            z = tokens(z_at, z_stride, token, e, inside)
            y *= z * tl.sigmoid(z)
        tl.store(y_at + token[:, None] * channels + e[None], y, mask=inside)
    tl.store(final_at + own, state, mask=held)


@triton.jit
def backward_kernel(
    x_at, delta_at, A_at, B_at, C_at, D_at, z_at, kept_at, d_y_at, d_final_at, starts_at, lengths_at,
    d_x_at, d_delta_at, d_A_at, d_B_at, d_C_at, d_D_at, d_z_at, d_initial_at,
    x_stride, delta_stride, B_stride, C_stride, z_stride, d_y_stride, channels, states, total,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Gradients of tokens and of the first states; those of A and D for each row, of B and C for each block as
    (blocks, states, total tokens)."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, length = tl.load(starts_at + row), tl.load(lengths_at + row)
    e = block * BLOCK + tl.arange(0, BLOCK)
    t, n = tl.arange(0, CHUNK), tl.arange(0, STATES)
    real, held = e < channels, (n < states)[:, None] & (e < channels)[None]
    own = (row * channels + e)[None] * states + n[:, None]
    d_state = tl.zeros((STATES, BLOCK), tl.float32)  # of what a chunk's last token leaves
    if d_final_at is not None:
        d_state = tl.load(d_final_at + own, mask=held, other=0.0)
    d_A = tl.zeros((STATES, BLOCK), tl.float32)
    d_D = tl.zeros((BLOCK,), tl.float32)
    chunks = tl.cdiv(length, CHUNK)
    for back in range(chunks):
        chunk = chunks - 1 - back
        place = first // CHUNK + row + chunk
        token = first + chunk * CHUNK + t
        present = token < first + length
        inside = present[:, None] & real[None]
        followed = ((t + 1 < CHUNK) & (token + 1 < first + length))[:, None] & real[None]
        x = tokens(x_at, x_stride, token, e, inside)
        step = steps(delta_at, delta_stride, token, e, inside, SOFTPLUS)
        next_step = steps(delta_at, delta_stride, token + 1, e, followed, SOFTPLUS)
        d_read = tokens(d_y_at, d_y_stride, token, e, inside)
        if z_at is not None:
            z = tokens(z_at, z_stride, token, e, inside)
            d_read *= z * tl.sigmoid(z)
        y = tl.zeros((CHUNK, BLOCK), tl.float32)
        from_A = tl.zeros((CHUNK, BLOCK), tl.float32)
        from_B = tl.zeros((CHUNK, BLOCK), tl.float32)
        for s in range(states):
            A = column(A_at, states, e, s, real)[None]
            B = column(B_at, B_stride, token, s, present)[:, None]
            C = column(C_at, C_stride, token, s, present)[:, None]
            decay = tl.exp(step * A)
            before = tl.load(kept_at + (place * states + s) * channels + e, mask=real, other=0.0)
            entering = tl.where(t[:, None] == 0, decay * before[None], 0.0)
            added = step * x * B
            _, h, kept = tl.associative_scan((decay, entering + added, entering), 0, after_but)
            leaving = tl.where(t[:, None] == CHUNK - 1, picked(d_state, n, s)[None], 0.0)
            _, d_h = tl.associative_scan((tl.exp(next_step * A), d_read * C + leaving), 0, after, reverse=True)
            through = d_h * kept
            y += h * C
            from_A += through * A
            from_B += d_h * B
            d_state = tl.where(n[:, None] == s, picked(decay * d_h, t, 0)[None], d_state)
            d_A += tl.where(n[:, None] == s, tl.sum(step * through, 0)[None], 0.0)
            sums = (block * states + s) * total + token
            tl.store(d_B_at + sums, tl.sum(d_h * step * x, 1), mask=present)
            tl.store(d_C_at + sums, tl.sum(d_read * h, 1), mask=present)
        at = token[:, None] * channels + e[None]
        d_x = step * from_B
        d_step = x * from_B + from_A
        if D_at is not None:
            D = column(D_at, 1, e, 0, real)[None]
            d_x += D * d_read
            y += D * x
            d_D += tl.sum(d_read * x, 0)
        if z_at is not None:
            z = tokens(z_at, z_stride, token, e, inside)
            gate = tl.sigmoid(z)
            d_y = tokens(d_y_at, d_y_stride, token, e, inside)
            tl.store(d_z_at + at, d_y * y * gate * (1.0 + z * (1.0 - gate)), mask=inside)
        if SOFTPLUS:
            d_step *= tl.sigmoid(tokens(delta_at, delta_stride, token, e, inside))
        tl.store(d_x_at + at, d_x, mask=inside)
        tl.store(d_delta_at + at, d_step, mask=inside)
    tl.store(d_initial_at + own, d_state, mask=held)
    tl.store(d_A_at + own, d_A, mask=held)
    if D_at is not None:
        tl.store(d_D_at + row * channels + e, d_D, mask=real)


def _sizes(tensors: Tensors, rows: Rows[Tensor], softplus: bool) -> tuple[tuple[int, int], list[int], dict[str, Any]]:
    """The grid, the strides that both kernels are told first, and what they are compiled for."""
    x, delta, A, B, C, _, z, _ = tensors
    strides = [0 if t is None else t.stride(1) for t in (x, delta, B, C, z)]
    sizes = {
        "SOFTPLUS": softplus, "CHUNK": CHUNK, "BLOCK": BLOCK, "STATES": triton.next_power_of_2(A.shape[1]),
        "num_warps": WARPS,
    }  # fmt: skip
    return (len(rows.starts), triton.cdiv(A.shape[0], BLOCK)), strides, sizes


def forward(
    tensors: Tensors, rows: Rows[Tensor], softplus: bool, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the final states and, with ``keep``, the states before every chunk, which the backward pass starts from."""
    tensors = laid_out(tensors, STRIDED)
    x, (channels, states), initial = tensors.x, tensors.A.shape, tensors.initial
    grid, strides, sizes = _sizes(tensors, rows, softplus)
    y, final = rows.blank(x), torch.empty_like(initial)
    # Chunks of a row start anew, so row r has its own from place start / CHUNK + r on.
    places = x.shape[0] * x.shape[1] // CHUNK + grid[0]
    kept = initial.new_empty(places, states, channels) if keep else None
    made = (y, final, kept, rows.starts, rows.lengths)
    forward_kernel[grid](*tensors, *made, *strides, channels, states, **sizes)
    return y, final, kept


def backward(
    grad_y: Tensor, grad_final: Tensor | None, kept: Tensor, tensors: Tensors, rows: Rows[Tensor], softplus: bool
) -> list[Tensor | None]:
    """Gradients of ``tensors``, in their order: x, delta, A, B, C, D, z, initial."""
    tensors, grad_y = laid_out(tensors, STRIDED), even(grad_y)
    grad_final = None if grad_final is None else grad_final.contiguous()
    x, delta, A, B, C, D, z, initial = tensors
    channels, states = A.shape
    grid, strides, sizes = _sizes(tensors, rows, softplus)
    total = x.shape[0] * x.shape[1]
    d_x, d_delta, d_z = rows.blank(x), rows.blank(delta), None if z is None else rows.blank(z)
    d_A = initial.new_empty(grid[0], channels, states)
    d_D = None if D is None else initial.new_empty(grid[0], channels)
    d_B, d_C = (initial.new_empty if rows.full else initial.new_zeros)((2, grid[1], states, total))
    d_initial = torch.empty_like(initial)
    given = (*tensors[:-1], kept, grad_y, grad_final, rows.starts, rows.lengths)
    made = (d_x, d_delta, d_A, d_B, d_C, d_D, d_z, d_initial)
    backward_kernel[grid](*given, *made, *strides, grad_y.stride(1), channels, states, total, **sizes)
    whole = [part.sum(0).t().unflatten(0, x.shape[:2]).to(t.dtype) for part, t in ((d_B, B), (d_C, C))]
    d_D = None if D is None or d_D is None else d_D.sum(0).to(D.dtype)
    return [d_x, d_delta, d_A.sum(0).to(A.dtype), *whole, d_D, d_z, d_initial]
