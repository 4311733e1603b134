"""The state-space dual (SSD) of Mamba-2: a linear recurrence with one decay a head, computed in matrix products.

``S_t = exp(Δ_t A) S_{t-1} + Δ_t x_t B_t^T``, ``y_t = S_t C_t + D x_t``. Dao and Gu, 2024 (2405.21060). ``reference`` is
the definition; :func:`ssd` runs in chunks, with a backward pass of its own that keeps one state a chunk. Where a second
derivative is asked for, the chunked form itself is differentiated. Cost: linear in length, see ``chunked``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.ops.ssd.chunked import chunked_backward, chunked_forward
from formwright.ops.ssd.reference import ssd_quadratic, ssd_reference
from formwright.registry import Paper, register

__all__ = ["CHUNK", "chunk_of", "ssd", "ssd_quadratic", "ssd_reference"]

#: Tokens of a chunk: products inside it then cost a head of width 64 as much as half of those with its state do.
CHUNK = 64


def chunk_of(length: int, chunk: int = CHUNK) -> int:
    """The chunk that a call of ``length`` tokens runs in."""
    return max(1, min(chunk, length))


@register("op", "ssd", paper=Paper("Dao and Gu", 2024, "2405.21060"), summary="Mamba-2's recurrence in matrix products")
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    start: Tensor | None = None,
    resets: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """x (B, L, H, P), Δ ``dt`` (B, L, H), A (H), B and C (B, L, G, N), D (H) -> y (B, L, H, P), state (B, H, P, N).

    Head h reads group h G // H. ``start`` (B, H, P, N) is the state before the first token (default zero); a token with
    Δ = 0 leaves the state as it is. ``resets`` (B, L) bool marks tokens that begin a document: no state passes into
    them. Half-precision inputs are computed in float32, in which the state stays; y has the dtype of ``x``.
    SpecError where G does not divide H.
    """
    if x.shape[2] % B.shape[2]:
        raise SpecError(f"ssd: {B.shape[2]} groups of B and C must divide {x.shape[2]} heads; give another number")
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    given: Any = [None if t is None else t.to(kind) for t in (x, dt, A, B, C, D, start)]
    if x.shape[1] == 0:
        empty = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1], dtype=kind)
        return torch.zeros_like(x), empty if start is None else given[-1]  # type: ignore[return-value]
    given.append(resets)
    q = chunk_of(x.shape[1], chunk)
    y, final = _Ssd.apply(q, *given) if _by_hand(given) else chunked_forward(*given, q=q)[:2]
    return y.to(x.dtype), final


def _by_hand(given: list[Tensor | None]) -> bool:
    """Whether the backward pass written by hand is called for; transforms and tracers differentiate the torch form."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: int, *given: Any) -> tuple[Tensor, Tensor]:
        y, final, before = chunked_forward(*given, q=q)
        ctx.q = q
        ctx.save_for_backward(*given, before)
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        tensors, before = ctx.saved_tensors[:-1], ctx.saved_tensors[-1]
        dy, dfinal = grads
        wanted = ctx.needs_input_grad[1:]
        if dy is None and dfinal is None:
            found: tuple[Tensor | None, ...] = (None,) * 7
        elif torch.is_grad_enabled():
            found = _differentiated(wanted, tensors, grads, ctx.q)
        else:
            dy = torch.zeros_like(tensors[0]) if dy is None else dy
            found = chunked_backward(dy, dfinal, *tensors, before=before, q=ctx.q)
        return (None, *(grad if wanted[index] else None for index, grad in enumerate(found)), None)


def _differentiated(wanted: Any, tensors: Any, grads: tuple[Any, ...], q: int) -> tuple[Tensor | None, ...]:
    """The same gradients as a graph, for second derivatives."""
    outputs = chunked_forward(*tensors, q=q)[:2]
    held = [index for index, grad in enumerate(grads) if grad is not None]
    places = [index for index in range(7) if wanted[index]]
    made = torch.autograd.grad(
        [outputs[index] for index in held],
        [tensors[index] for index in places],
        [grads[index] for index in held],
        create_graph=True,
        allow_unused=True,
    )
    found = dict(zip(places, made))
    return tuple(found.get(index) for index in range(7))
