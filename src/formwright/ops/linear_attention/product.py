"""The causal product, which is all that causal linear attention and its gradients need.

    out_t = a_t S_0 + sum_{s <= t} (a_t . b_s) c_s,   S = S_0 + sum_s b_s c_s^T

With ``reverse`` time runs backwards (s >= t). The gradients of a, b, c and S_0 are three more such products, so one
kernel does the whole backward pass, and a second derivative is the same thing once more. The PyTorch form works chunk
by chunk: products of tokens inside a chunk, and across chunks the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.ops import gpu
from formwright.ops.linear_attention.native import causal_product_native

#: Tokens of a chunk in the PyTorch form.
CHUNK = 128

Run = Callable[..., tuple[Tensor, Tensor]]


def causal_product(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    start: Tensor | None = None,
    borders: Sequence[int] | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """a and b (B, L, H, D), c (B, L, H, E), start (B, H, D, E) or None -> out (B, L, H, E), last state (B, H, D, E).

    With ``borders`` (0, ..., L) the one row holds documents end to end, each with a state of its own.
    """
    tensors = [t for t in (a, b, c, start) if t is not None]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return _forward(a, b, c, start, borders, reverse)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return chunked(a, b, c, start, borders, reverse)
    return _CausalProduct.apply(a, b, c, start, borders, reverse)


def _forward(
    a: Tensor, b: Tensor, c: Tensor, start: Tensor | None, borders: Sequence[int] | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The fastest form for these tensors, without gradients."""
    if gpu.reachable(a, b, c, start) and a.dtype == torch.float32 and a.shape[-1] <= 256:
        from formwright.ops.linear_attention.triton import causal_product_triton

        return causal_product_triton(a, b, c, start, borders, reverse)
    done = causal_product_native(a, b, c, start, borders, reverse)
    return chunked(a, b, c, start, borders, reverse) if done is None else done


class _CausalProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, c: Tensor, start: Tensor | None, borders: Sequence[int] | None, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, b, c, start)
        ctx.borders, ctx.reverse = borders, reverse
        ctx.set_materialize_grads(False)  # the last state is seldom used, and its gradient then costs nothing
        return _forward(a, b, c, start, borders, reverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, last: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        a, b, c, start = ctx.saved_tensors
        grad = torch.zeros_like(c) if grad is None else grad
        need_a, need_b, need_c, need_start = ctx.needs_input_grad[:4]
        of_a = of_b = of_c = of_start = None
        if need_a:
            of_a, _ = causal_product(grad, c, b, _turned(start), ctx.borders, ctx.reverse)
        if need_b:
            of_b, _ = causal_product(c, grad, a, _turned(last), ctx.borders, not ctx.reverse)
        if need_c or need_start:
            of_c, of_start = causal_product(b, a, grad, last, ctx.borders, not ctx.reverse)
        return of_a, of_b, of_c if need_c else None, of_start if need_start else None, None, None


def _turned(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.transpose(-1, -2)


def by_document(
    run: Run, tensors: Sequence[Tensor], start: Tensor | None, borders: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """``run(*tensors, start)``, for documents end to end once for neighbours of equal length."""
    if borders is None:
        return run(*tensors, start)
    outs, states, place, row = [], [], 0, 0
    for length, group in groupby(stop - first for first, stop in pairwise(borders)):
        count = len(list(group))
        pieces = [t[0, place : place + count * length].reshape(count, length, *t.shape[2:]) for t in tensors]
        out, state = run(*pieces, None if start is None else start[row : row + count])
        outs.append(out.flatten(0, 1))
        states.append(state)
        place, row = place + count * length, row + count
    if not outs:
        _, b, c = tensors
        return c[:, :0], c.new_zeros(0, c.shape[2], b.shape[3], c.shape[3])
    return torch.cat(outs)[None], torch.cat(states)


def chunked(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    start: Tensor | None = None,
    borders: Sequence[int] | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`causal_product` in PyTorch operations, which may be traced and differentiated."""
    if not reverse:
        return by_document(_chunked, (a, b, c), start, borders)

    def backwards(a: Tensor, b: Tensor, c: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        out, state = _chunked(a.flip(1), b.flip(1), c.flip(1), start)
        return out.flip(1), state

    return by_document(backwards, (a, b, c), start, borders)


def _chunked(a: Tensor, b: Tensor, c: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, length, heads, inner = a.shape
    begun = c.new_zeros(rows, heads, inner, c.shape[-1]) if start is None else start
    if length == 0:
        return c[:, :0], begun
    size = min(CHUNK, length)
    a, b, c = (_chunks(t, size) for t in (a, b, c))
    grown = b.transpose(-1, -2) @ c
    states = torch.cat((begun[:, :, None], grown), 2).cumsum(2)
    out = (a @ b.transpose(-1, -2)).tril() @ c + a @ states[:, :, :-1]
    return out.flatten(2, 3).transpose(1, 2)[:, :length], states[:, :, -1]


def _chunks(t: Tensor, size: int) -> Tensor:
    """(B, L, H, D) -> (B, H, chunks, size, D), with zeros behind the last token."""
    t = F.pad(t, (0, 0, 0, 0, 0, -t.shape[1] % size))
    return t.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)


def causal_product_macs(length: int, inner: int, outer: int) -> int:
    """Multiply-accumulates of one row and head in the PyTorch form."""
    size = max(1, min(CHUNK, length))
    padded = -(-length // size) * size
    return padded * (size * (inner + outer) + 2 * inner * outer)
