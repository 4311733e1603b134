"""The delta rule on a GPU: one program a row and head, which walks its chunks with the state on the chip.

The mathematics is that of ``chunked``; products are in full float32, because the solve of a chunk loses what lower
precision drops. The forward pass stores the state before every chunk, and the backward pass makes the rest again from
it. This module needs the package triton and is imported only where a tensor is on a GPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from formwright.ops.delta_rule.chunked import again, chunkwise

#: Tokens of a chunk.
CHUNK = 32
#: Widest head whose state fits a program.
WIDEST = 128


def suits(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels take heads as wide as these."""
    return max(q.shape[-1], v.shape[-1]) <= WIDEST


@triton.jit
def product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def solved(overlap, size: tl.constexpr):
    """(I + overlap)^-1 for a strictly lower triangle, row after row."""
    rows = tl.arange(0, size)
    inverse = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
    for row in range(1, size):
        factors = tl.sum(tl.where(rows[:, None] == row, overlap, 0.0), 0)
        taken = tl.sum(factors[:, None] * inverse, 0)
        inverse = tl.where(rows[:, None] == row, inverse - taken[None, :], inverse)
    return inverse


@triton.jit
def tokens(at, chunk, row, head, length, heads, width, size: tl.constexpr, wide: tl.constexpr):
    """Pointers to and mask of a chunk's (size, wide) entries of one head in (B, L, heads, width)."""
    step, lane = chunk * size + tl.arange(0, size), tl.arange(0, wide)
    place = ((row * length + step) * heads + head) * width
    return at + place[:, None] + lane[None, :], (step < length)[:, None] & (lane < width)[None, :]


@triton.jit
def matrix(at, index, keys, values, wide_k: tl.constexpr, wide_v: tl.constexpr):
    """Pointers to and mask of the state (wide_k, wide_v) at ``index`` of (..., keys, values)."""
    i, j = tl.arange(0, wide_k), tl.arange(0, wide_v)
    place = index * keys * values + i[:, None] * values + j[None, :]
    return at + place, (i < keys)[:, None] & (j < values)[None, :]


@triton.jit
def forward_kernel(
    q_at, k_at, v_at, beta_at, state_at, out_at, last_at, states_at,
    length, chunks, heads, keys, values, scale,
    size: tl.constexpr, wide_k: tl.constexpr, wide_v: tl.constexpr,
):  # fmt: skip
    """Outputs, the last state, and the state before every chunk."""
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    i = tl.arange(0, size)
    at, inside = matrix(state_at, row * heads + head, keys, values, wide_k, wide_v)
    state = tl.load(at, mask=inside, other=0.0)
    for chunk in range(chunks):
        at, inside = matrix(states_at, (row * chunks + chunk) * heads + head, keys, values, wide_k, wide_v)
        tl.store(at, state, mask=inside)
        q_p, of_k = tokens(q_at, chunk, row, head, length, heads, keys, size, wide_k)
        k_p, _ = tokens(k_at, chunk, row, head, length, heads, keys, size, wide_k)
        v_p, of_v = tokens(v_at, chunk, row, head, length, heads, values, size, wide_v)
        out_p, _ = tokens(out_at, chunk, row, head, length, heads, values, size, wide_v)
        step = chunk * size + i
        b = tl.load(beta_at + (row * length + step) * heads + head, mask=step < length, other=0.0)
        q, k = tl.load(q_p, mask=of_k, other=0.0) * scale, tl.load(k_p, mask=of_k, other=0.0)
        v = tl.load(v_p, mask=of_v, other=0.0)
        overlap = tl.where(i[:, None] > i[None, :], b[:, None] * product(k, tl.trans(k)), 0.0)
        corrected = solved(overlap, size) * b[None, :]
        written = product(corrected, v - product(k, state))
        weights = tl.where(i[:, None] >= i[None, :], product(q, tl.trans(k)), 0.0)
        tl.store(out_p, product(q, state) + product(weights, written), mask=of_v)
        state += product(tl.trans(k), written)
    at, inside = matrix(last_at, row * heads + head, keys, values, wide_k, wide_v)
    tl.store(at, state, mask=inside)


@triton.jit
def backward_kernel(
    q_at, k_at, v_at, beta_at, states_at, d_out_at, d_last_at,
    d_q_at, d_k_at, d_v_at, d_beta_at, d_state_at,
    length, chunks, heads, keys, values, scale,
    size: tl.constexpr, wide_k: tl.constexpr, wide_v: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, v, beta and the first state; see ``chunked_backward`` for the formulas."""
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    i = tl.arange(0, size)
    at, inside = matrix(d_last_at, row * heads + head, keys, values, wide_k, wide_v)
    d_state = tl.load(at, mask=inside, other=0.0)
    for back in range(chunks):
        chunk = chunks - 1 - back
        at, inside = matrix(states_at, (row * chunks + chunk) * heads + head, keys, values, wide_k, wide_v)
        state = tl.load(at, mask=inside, other=0.0)
        q_p, of_k = tokens(q_at, chunk, row, head, length, heads, keys, size, wide_k)
        k_p, _ = tokens(k_at, chunk, row, head, length, heads, keys, size, wide_k)
        v_p, of_v = tokens(v_at, chunk, row, head, length, heads, values, size, wide_v)
        d_out_p, _ = tokens(d_out_at, chunk, row, head, length, heads, values, size, wide_v)
        step = chunk * size + i
        rate = (row * length + step) * heads + head
        b = tl.load(beta_at + rate, mask=step < length, other=0.0)
        q, k = tl.load(q_p, mask=of_k, other=0.0) * scale, tl.load(k_p, mask=of_k, other=0.0)
        d_out = tl.load(d_out_p, mask=of_v, other=0.0)

        pairs = tl.where(i[:, None] > i[None, :], product(k, tl.trans(k)), 0.0)
        inverse = solved(b[:, None] * pairs, size)
        read = tl.load(v_p, mask=of_v, other=0.0) - product(k, state)
        written = product(inverse * b[None, :], read)
        weights = tl.where(i[:, None] >= i[None, :], product(q, tl.trans(k)), 0.0)

        d_written = product(tl.trans(weights), d_out) + product(k, d_state)
        through = product(tl.trans(inverse), d_written)
        d_v = b[:, None] * through
        error = read - product(pairs, written)
        d_weights = tl.where(i[:, None] >= i[None, :], product(d_out, tl.trans(written)), 0.0)
        d_pairs = tl.where(i[:, None] > i[None, :], product(d_v, tl.trans(written)), 0.0)
        d_q = product(d_out, tl.trans(state)) + product(d_weights, k)
        d_k = product(tl.trans(d_weights), q) - product(d_pairs + tl.trans(d_pairs), k)
        d_k += product(written, tl.trans(d_state)) - product(d_v, tl.trans(state))
        d_state += product(tl.trans(q), d_out) - product(tl.trans(k), d_v)

        at, _ = tokens(d_q_at, chunk, row, head, length, heads, keys, size, wide_k)
        tl.store(at, scale * d_q, mask=of_k)
        at, _ = tokens(d_k_at, chunk, row, head, length, heads, keys, size, wide_k)
        tl.store(at, d_k, mask=of_k)
        at, _ = tokens(d_v_at, chunk, row, head, length, heads, values, size, wide_v)
        tl.store(at, d_v, mask=of_v)
        tl.store(d_beta_at + rate, tl.sum(through * error, 1), mask=step < length)
    at, inside = matrix(d_state_at, row * heads + head, keys, values, wide_k, wide_v)
    tl.store(at, d_state, mask=inside)


def _sizes(q: Tensor, v: Tensor, scale: float) -> tuple[tuple[Any, ...], dict[str, int]]:
    """What both kernels are told about shapes, and at which widths they are compiled."""
    length, heads, keys = q.shape[1:]
    wide = {
        "wide_k": max(16, triton.next_power_of_2(keys)),
        "wide_v": max(16, triton.next_power_of_2(v.shape[-1])),
        "num_warps": 8 if max(keys, v.shape[-1]) > 64 else 4,
    }
    return (length, triton.cdiv(length, CHUNK), heads, keys, v.shape[-1], scale), {"size": CHUNK, **wide}


class Kernel(torch.autograd.Function):
    """Both passes by the kernels; under ``create_graph`` the form in PyTorch is differentiated instead."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v, beta, state = (t.contiguous() for t in (q, k, v, beta, state))
        sizes, wide = _sizes(q, v, scale)
        rows, heads = q.shape[0], q.shape[2]
        out, last = torch.empty_like(v), torch.empty_like(state)
        states = state.new_empty(rows, sizes[1], *state.shape[1:])
        forward_kernel[(rows * heads,)](q, k, v, beta, state, out, last, states, *sizes, **wide)
        ctx.save_for_backward(q, k, v, beta, state, states)
        ctx.scale = scale
        return out, last

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, states = ctx.saved_tensors
        if torch.is_grad_enabled():
            run = partial(chunkwise, scale=ctx.scale)
            return *again(run, inputs, ctx.needs_input_grad, d_out, d_last), None
        q, v = inputs[0], inputs[2]
        sizes, wide = _sizes(q, v, ctx.scale)
        grads = [torch.empty_like(t) for t in inputs]
        given = (*inputs[:4], states, d_out.contiguous(), d_last.contiguous())
        backward_kernel[(q.shape[0] * q.shape[2],)](*given, *grads, *sizes, **wide)
        return *grads, None
