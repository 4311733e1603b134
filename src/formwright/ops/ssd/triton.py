"""The state-space dual on a GPU: one program a row and head, which walks its chunks with the state on the chip.

The mathematics is that of ``chunked``, with decays as exponentials of masked running sums; products are in full
float32. Documents are apart where each begins a chunk, see ``documents``. The forward pass stores the state before
every chunk, and the backward pass makes the rest again from it; gradients of B and C are left for every head and summed
over groups behind it, so they do not depend on the order in which programs finish. This module needs the package triton
and is imported only where a tensor is on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from formwright.ops.ssd.chunked import of_decays
from formwright.ops.ssd.reference import logarithms

#: Tokens of a chunk.
CHUNK = 32
#: Widest head, and largest state of a channel, that fit a program.
WIDEST = 128


@triton.jit
def product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def tokens(at, chunk, row, head, length, heads, width, q: tl.constexpr, wide: tl.constexpr):
    """Pointers to and mask of a chunk's (q, wide) entries of one head in (B, L, heads, width)."""
    step, lane = chunk * q + tl.arange(0, q), tl.arange(0, wide)
    place = ((row * length + step).to(tl.int64) * heads + head) * width
    return at + place[:, None] + lane[None, :], (step < length)[:, None] & (lane < width)[None, :]


@triton.jit
def matrix(at, index, width, size, wide: tl.constexpr, deep: tl.constexpr):
    """Pointers to and mask of the state (wide, deep) at ``index`` of (..., width, size)."""
    p, n = tl.arange(0, wide), tl.arange(0, deep)
    place = index.to(tl.int64) * width * size + p[:, None] * size + n[None, :]
    return at + place, (p < width)[:, None] & (n < size)[None, :]


@triton.jit
def decays(logs, q: tl.constexpr):
    """From logarithms (q): between all tokens, from the start to each, from each to the end, and from start to end."""
    i = tl.arange(0, q)
    after = i[:, None] > i[None, :]
    sums = tl.cumsum(tl.where(after, logs[:, None], 0.0), 0)
    between = tl.where(i[:, None] >= i[None, :], tl.exp(sums), 0.0)
    out = tl.exp(tl.sum(tl.where(after, logs[:, None], 0.0), 0))
    return between, tl.exp(tl.cumsum(logs, 0)), out, tl.exp(tl.sum(logs, 0))


@triton.jit
def passed(state, logs_at, chunk, row, head, length, heads, q: tl.constexpr):
    """What of a state, or of its gradient, passes the start of a chunk: nothing, not even NaN, where a document begins
    and the first decay is zero."""
    first = tl.load(logs_at + (row * length + chunk * q) * heads + head)
    return tl.where(first == float("-inf"), 0.0, state)


@triton.jit
def forward_kernel(
    x_at, dt_at, logs_at, b_at, c_at, skip_at, start_at, y_at, final_at, states_at,
    length, chunks, heads, groups, width, size,
    q: tl.constexpr, wide: tl.constexpr, deep: tl.constexpr,
):  # fmt: skip
    """Outputs, the final state, and the state before every chunk."""
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    group = head // (heads // groups)
    i = tl.arange(0, q)
    skip = tl.load(skip_at + head)
    at, held = matrix(start_at, row * heads + head, width, size, wide, deep)
    state = tl.load(at, mask=held, other=0.0)
    for chunk in range(chunks):
        state = passed(state, logs_at, chunk, row, head, length, heads, q)
        at, held = matrix(states_at, (row * chunks + chunk) * heads + head, width, size, wide, deep)
        tl.store(at, state, mask=held)
        step = chunk * q + i
        place = (row * length + step) * heads + head
        dt = tl.load(dt_at + place, mask=step < length, other=0.0)
        between, into, out, through = decays(tl.load(logs_at + place, mask=step < length, other=0.0), q)
        at, of_x = tokens(x_at, chunk, row, head, length, heads, width, q, wide)
        x = tl.load(at, mask=of_x, other=0.0)
        at, of_b = tokens(b_at, chunk, row, group, length, groups, size, q, deep)
        b = tl.load(at, mask=of_b, other=0.0)
        at, of_b = tokens(c_at, chunk, row, group, length, groups, size, q, deep)
        c = tl.load(at, mask=of_b, other=0.0)
        values = dt[:, None] * x
        weights = tl.where(i[:, None] >= i[None, :], product(c, tl.trans(b)) * between, 0.0)
        y = product(weights, values) + into[:, None] * product(c, tl.trans(state)) + skip * x
        at, _ = tokens(y_at, chunk, row, head, length, heads, width, q, wide)
        tl.store(at, y, mask=of_x)
        state = through * state + product(tl.trans(out[:, None] * values), b)
    at, held = matrix(final_at, row * heads + head, width, size, wide, deep)
    tl.store(at, state, mask=held)


@triton.jit
def backward_kernel(
    x_at, dt_at, logs_at, b_at, c_at, skip_at, states_at, dy_at, dfinal_at,
    dx_at, toward_at, dlogs_at, db_at, dc_at, dstart_at,
    length, chunks, heads, groups, width, size,
    q: tl.constexpr, wide: tl.constexpr, deep: tl.constexpr,
):  # fmt: skip
    """Gradients of x, of dt as a factor of x, of the logarithms, of B and C for every head, and of the start."""
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    group = head // (heads // groups)
    i = tl.arange(0, q)
    lower, after = i[:, None] >= i[None, :], i[:, None] > i[None, :]
    skip = tl.load(skip_at + head)
    at, held = matrix(dfinal_at, row * heads + head, width, size, wide, deep)
    dstate = tl.load(at, mask=held, other=0.0)
    for back in range(chunks):
        chunk = chunks - 1 - back
        at, held = matrix(states_at, (row * chunks + chunk) * heads + head, width, size, wide, deep)
        state = tl.load(at, mask=held, other=0.0)
        step = chunk * q + i
        place = (row * length + step) * heads + head
        dt = tl.load(dt_at + place, mask=step < length, other=0.0)
        between, into, out, through = decays(tl.load(logs_at + place, mask=step < length, other=0.0), q)
        at, of_x = tokens(x_at, chunk, row, head, length, heads, width, q, wide)
        x = tl.load(at, mask=of_x, other=0.0)
        at, _ = tokens(dy_at, chunk, row, head, length, heads, width, q, wide)
        dy = tl.load(at, mask=of_x, other=0.0)
        at, of_b = tokens(b_at, chunk, row, group, length, groups, size, q, deep)
        b = tl.load(at, mask=of_b, other=0.0)
        at, _ = tokens(c_at, chunk, row, group, length, groups, size, q, deep)
        c = tl.load(at, mask=of_b, other=0.0)

        weights = tl.where(lower, product(c, tl.trans(b)) * between, 0.0)
        written = out[:, None] * product(b, tl.trans(dstate))
        early = dt * tl.sum(x * written, 1)
        dvalues = product(tl.trans(weights), dy) + written
        at, _ = tokens(dx_at, chunk, row, head, length, heads, width, q, wide)
        tl.store(at, dt[:, None] * dvalues + skip * dy, mask=of_x)
        tl.store(toward_at + place, tl.sum(x * dvalues, 1), mask=step < length)

        values = dt[:, None] * x
        dweights = tl.where(lower, product(dy, tl.trans(values)), 0.0)
        pairs = tl.cumsum(dweights * weights, 0, reverse=True)
        dscores = dweights * between
        entering = into[:, None] * dy
        read = product(entering, state)
        late = tl.cumsum(tl.sum(read * c, 1), 0, reverse=True)
        dlogs = tl.sum(tl.where(after, pairs + early[None, :], 0.0), 1) + late + through * tl.sum(state * dstate)
        tl.store(dlogs_at + place, dlogs, mask=step < length)
        at, of_b = tokens(dc_at, chunk, row, head, length, heads, size, q, deep)
        tl.store(at, read + product(dscores, b), mask=of_b)
        at, of_b = tokens(db_at, chunk, row, head, length, heads, size, q, deep)
        tl.store(at, product(tl.trans(dscores), c) + product(out[:, None] * values, dstate), mask=of_b)
        dstate = through * dstate + product(tl.trans(entering), c)
        dstate = passed(dstate, logs_at, chunk, row, head, length, heads, q)
    at, held = matrix(dstart_at, row * heads + head, width, size, wide, deep)
    tl.store(at, dstate, mask=held)


def _sizes(x: Tensor, B: Tensor) -> tuple[tuple[int, ...], dict[str, int]]:
    """What both kernels are told about shapes, and at which widths they are compiled."""
    (_, length, heads, width), (groups, size) = x.shape, B.shape[2:]
    compiled = {
        "q": CHUNK,
        "wide": max(16, triton.next_power_of_2(width)),
        "deep": max(16, triton.next_power_of_2(size)),
        "num_warps": 8 if max(width, size) > 64 else 4,
    }
    return (length, triton.cdiv(length, CHUNK), heads, groups, width, size), compiled


class Kernels:
    """The form by the kernels."""

    @property
    def q(self) -> int:
        return CHUNK

    @staticmethod
    def takes(*tensors: Tensor | None) -> bool:
        return True

    @staticmethod
    def suits(x: Tensor, B: Tensor) -> bool:
        """Whether the kernels take heads as wide as these."""
        return max(x.shape[-1], B.shape[-1]) <= WIDEST

    @staticmethod
    def _read(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, ...]:
        """What both kernels read, contiguous."""
        skip = torch.zeros_like(A) if D is None else D
        return tuple(t.contiguous() for t in (x, dt, logarithms(dt, A, resets), B, C, skip))

    @classmethod
    def forward(cls, *given: Any, keep: bool) -> tuple[Tensor, ...]:
        x, dt, A, B, C, D, start, resets = given
        sizes, compiled = _sizes(x, B)
        rows, _, heads, width = x.shape
        start = x.new_zeros(rows, heads, width, B.shape[3]) if start is None else start.contiguous()
        y, final = x.new_empty(x.shape), torch.empty_like(start)
        states = x.new_empty(rows, sizes[1], *start.shape[1:])
        read = cls._read(x, dt, A, B, C, D, resets)
        forward_kernel[(rows * heads,)](*read, start, y, final, states, *sizes, **compiled)
        return y, final, states

    @classmethod
    def backward(cls, dy: Tensor, dfinal: Tensor | None, *tensors: Any) -> tuple[Tensor, ...]:
        x, dt, A, B, C, D, _, resets, states = tensors
        sizes, compiled = _sizes(x, B)
        rows, length, heads, _ = x.shape
        dfinal = states.new_zeros(rows, *states.shape[2:]) if dfinal is None else dfinal.contiguous()
        dx, toward, dlogs = (x.new_empty(t.shape) for t in (x, dt, dt))
        dB, dC = (x.new_empty(rows, length, heads, B.shape[3]) for _ in range(2))
        dstart = torch.empty_like(dfinal)
        read = cls._read(x, dt, A, B, C, D, resets)
        made = (dx, toward, dlogs, dB, dC, dstart)
        backward_kernel[(rows * heads,)](*read, states, dy.contiguous(), dfinal, *made, *sizes, **compiled)
        ddt, dA, dD = of_decays(x, dt, A, dy, toward, dlogs, resets)
        dB, dC = (t.unflatten(2, (B.shape[2], -1)).sum(3) for t in (dB, dC))
        return dx, ddt, dA, dB, dC, dD, dstart
