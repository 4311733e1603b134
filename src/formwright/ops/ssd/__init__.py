"""The state-space dual (SSD) of Mamba-2: a linear recurrence with one decay a head, computed in matrix products.

``S_t = exp(Δ_t A) S_{t-1} + Δ_t x_t B_t^T``, ``y_t = S_t C_t + D x_t``. Dao and Gu, 2024 (2405.21060). ``reference`` is
the definition; :func:`ssd` runs in chunks, with a backward pass of its own that keeps one state a chunk. Where a second
derivative is asked for, the chunked form itself is differentiated. Cost: linear in length, see ``chunked``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.ops import gpu
from formwright.ops.native import differentiated
from formwright.ops.ssd.chunked import Chunked
from formwright.ops.ssd.documents import apart
from formwright.ops.ssd.native import Compiled
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
    Δ = 0 leaves the state as it is. ``resets`` (B, L) bool marks tokens that begin a document: nothing passes into it
    from before, not even what is no number (but under tracers and transforms, for which shapes may not depend on
    values). Half-precision inputs are computed in float32, in which the state stays; y has the dtype of ``x``.
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
    form = _form(given, Chunked(chunk_of(x.shape[1], chunk)))
    if resets is None or form.q == 0 or _traced() or resets.is_meta:
        y, final = _run(form, chunk, *given)
    else:
        y, final = apart(partial(_run, form, form.q), given, form.q)
    return y.to(x.dtype), final


def _run(form: Form, chunk: int, *given: Any) -> tuple[Tensor, Tensor]:
    if _by_hand(given):
        return _Ssd.apply(form, chunk, *given)
    y, final, *_ = form.forward(*given, keep=False)
    return y, final


def _differentiable(chunk: int, *given: Any) -> tuple[Tensor, Tensor]:
    """The form in PyTorch's operations, to which any derivative applies."""
    form = Chunked(chunk_of(given[0].shape[1], chunk))

    def run(*laid: Any) -> tuple[Tensor, Tensor]:
        y, final, *_ = form.forward(*laid, keep=True)
        return y, final

    return run(*given) if given[-1] is None else apart(run, list(given), form.q)


class Form(Protocol):
    """A way to compute: ``forward`` gives y, the final state, and what ``backward`` wants besides its inputs. ``q``:
    tokens at whose multiples documents must begin to be apart; 0 where they may begin anywhere."""

    @property
    def q(self) -> int: ...

    def takes(self, *tensors: Tensor | None) -> bool: ...

    def forward(self, *given: Any, keep: bool) -> tuple[Tensor, ...]: ...

    def backward(self, dy: Tensor, dfinal: Tensor | None, *tensors: Any) -> tuple[Tensor | None, ...]: ...


def _form(given: list[Any], general: Form) -> Form:
    """The form that suits type, device and shape."""
    x, B = given[0], given[3]
    if Compiled.takes(*given[:7]):
        return Compiled() if Compiled.suits(x, B) else general
    if gpu.reachable(*given[:7]) and x.dtype == torch.float32 and x.shape[1] > 1:
        from formwright.ops.ssd.triton import Kernels

        if Kernels.suits(x, B):
            return Kernels()
    return general


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _by_hand(given: Sequence[Tensor | None]) -> bool:
    """Whether the backward pass written by hand is called for; transforms and tracers differentiate the torch form."""
    return not _traced() and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: Form, chunk: int, *given: Any) -> tuple[Tensor, Tensor]:
        y, final, *kept = form.forward(*given, keep=True)
        ctx.form, ctx.chunk, ctx.kept = form, chunk, len(kept)
        ctx.save_for_backward(*given, *kept)
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        given, kept = ctx.saved_tensors[: -ctx.kept], ctx.saved_tensors[-ctx.kept :]
        wanted, form = ctx.needs_input_grad[2:], ctx.form
        general = Chunked(chunk_of(given[0].shape[1], ctx.chunk))
        dy, dfinal = grads
        if dy is None and dfinal is None:
            found: Any = [None] * len(given)
        elif torch.is_grad_enabled():
            found = differentiated(partial(_differentiable, ctx.chunk), given, wanted, grads)
        else:
            if not form.takes(dy, dfinal):
                form, kept = general, general.forward(*given, keep=True)[2:]
            dy = torch.zeros_like(given[0]) if dy is None else dy
            found = (*form.backward(dy, dfinal, *given, *kept), None)
        return None, None, *(grad if want else None for grad, want in zip(found, wanted))
