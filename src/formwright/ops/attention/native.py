"""Packed attention by the compiled kernel: float32, any document lengths, causal or not; see ``native.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from formwright.ops import native

Spans = Sequence[tuple[int, int]]
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


def suits(width: int, spans: Spans) -> bool:
    """Whether the kernel takes heads of this width and documents of these lengths, on this machine."""
    ready = width % 16 == 0 and bool(native.library().fw_attention_ready())
    return ready and max((stop - start for start, stop in spans), default=0) <= LONGEST


def documents(spans: Spans) -> Call:
    """A call's documents, in order and covering 0 .. T; the rest of it is unset."""
    borders = (c_int64 * (len(spans) + 1))(0, *[stop for _, stop in spans])
    made = Call(offsets=ctypes.addressof(borders), documents=len(spans))
    made.held = borders  # a pointer keeps nothing alive
    return made


def fits(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> bool:
    """Whether the kernel takes tensors of these shapes and strides."""
    width = q.shape[-1]
    if v.shape[-1] != width or q.shape[1] == 0 or not suits(width, spans):
        return False
    return all(t.stride(-1) == 1 and t.stride(2) == width for t in (q, k, v)) and k.stride(1) == v.stride(1)


def packed_attention_native(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, causal: bool, rounded: bool = False
) -> Tensor | None:
    """q (1, T, H, D), k and v (1, T, G, D) -> (1, T, H, D), or None where the kernel does not apply.

    ``rounded`` as in :class:`Heads`.
    """
    if not native.usable(q, k, v) or not fits(q, k, v, spans):
        return None
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    call = _call(q, k, v, spans, scale, causal, rounded)
    call.y, call.y_row = y.data_ptr(), y.stride(1)
    native.library().fw_attention_packed(ctypes.byref(call), torch.get_num_threads())
    return y


def _call(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, causal: bool, rounded: bool = False) -> Call:
    """A call whose output is unset."""
    call = documents(spans)
    call.heads, call.groups, call.width = q.shape[2], k.shape[2], q.shape[3]
    call.scale, call.causal, call.rounded = scale, causal, rounded
    call.q, call.k, call.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
    call.q_row, call.kv_row = q.stride(1), k.stride(1)
    return call


class Backward(ctypes.Structure):
    """The struct of the same name in ``backward.hpp``."""

    _fields_ = (
        ("forward", Call),
        ("grad_y", c_void_p),
        ("grad_row", c_int64),
        *((name, c_void_p) for name in ("grad_q", "grad_k", "grad_v")),
    )


def packed_by_kernel(
    general: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, causal: bool
) -> Tensor | None:
    """As :func:`packed_attention_native`, with gradients where they are wanted; ``general`` (q, k, v -> y) gives the
    second ones."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        if not native.reachable(q, k, v) or not fits(q, k, v, spans):
            return None
        return PackedAttention.apply(general, spans, scale, causal, q, k, v)
    return packed_attention_native(q, k, v, spans, scale, causal)


class PackedAttention(torch.autograd.Function):
    """(general, spans, scale, causal, q, k, v) -> y by the kernel, in both passes; a second derivative goes through
    ``general`` (q, k, v -> y)."""

    @staticmethod
    def forward(
        ctx: Any, general: Callable, spans: Spans, scale: float, causal: bool, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        ctx.given = general, spans, scale, causal
        ctx.save_for_backward(q, k, v)
        y = packed_attention_native(q, k, v, spans, scale, causal)
        assert y is not None  # the caller has asked
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        general, spans, scale, causal = ctx.given
        q, k, v = ctx.saved_tensors
        if not torch.is_grad_enabled() and native.reachable(grad, q, k, v):
            return *[None] * 4, *_gradients(grad, q, k, v, spans, scale, causal)
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            wanted = ctx.needs_input_grad[4:]
            found = native.differentiated(lambda *t: (general(*t),), [q, k, v], wanted, (grad,))
        return *[None] * 4, *(made if graph or made is None else made.detach() for made in found)


def _gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, causal: bool) -> list[Tensor]:
    """The gradients of q, k and v."""
    grad = grad.contiguous()
    call, made = _call(q, k, v, spans, scale, causal), [torch.empty(t.shape) for t in (q, k, v)]
    back = Backward(call, grad.data_ptr(), grad.stride(1), *(t.data_ptr() for t in made))
    native.library().fw_attention_packed_backward(ctypes.byref(back), torch.get_num_threads())
    return made
