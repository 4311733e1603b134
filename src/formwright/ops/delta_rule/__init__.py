"""The delta rule: a matrix memory that corrects what it stores before it answers.

    e_t = v_t - S_{t-1}^T k_t,    S_t = S_{t-1} + beta_t k_t e_t^T,    o_t = scale S_t^T q_t

One step of gradient descent of size beta on |S^T k - v|^2 / 2. Schlag et al., 2021 (2102.11174); in parallel over the
sequence by products of Householder-like matrices: Yang et al., 2024 (2406.06484). Cost: L (3 dk dv + C (3 dk + 2 dv))
multiply-accumulates a head in chunks of C tokens, linear in the length; state: dk x dv a head.

``reference`` is the recurrence and the attention map, ``chunked`` the form in matrix products (any device and type, and
single steps without a chunk), ``native`` the compiled one for float32 on the CPU, ``triton`` the one for GPUs. Half
precision is computed in float32. A token of rate 0 writes nothing; stable for rates within [0, 2 / |k|^2].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.ops import gpu
from formwright.ops.delta_rule.chunked import CHUNK, Chunked, chunkwise, documents
from formwright.ops.delta_rule.native import Compiled, suits
from formwright.ops.delta_rule.reference import delta_rule_map, delta_rule_reference
from formwright.registry import Paper, register

__all__ = ["delta_rule", "delta_rule_map", "delta_rule_reference"]


@register(
    "op", "delta_rule", paper=Paper("Yang et al.", 2024, "2406.06484"), summary="a matrix memory that corrects itself"
)
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    *,
    scale: float | None = None,
    borders: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """q, k (B, L, H, dk), v (B, L, H, dv), beta (B, L, H) -> outputs (B, L, H, dv), last state (B, H, dk, dv).

    ``state`` is what a stream starts from, zeros by default; ``scale`` is dk ** -0.5 by default. With ``borders``
    (0, ..., T) the inputs are documents laid end to end, B = 1, each with a state of its own: (documents, H, dk, dv).
    Outputs have the type of v; states are float32 at least.
    """
    _check(q, k, v, beta, state, borders)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kind = v.dtype
    if kind in (torch.float16, torch.bfloat16):
        q, k, v, beta = (t.float() for t in (q, k, v, beta))
    if state is None:
        rows = q.shape[0] if borders is None else len(borders) - 1
        state = q.new_zeros(rows, q.shape[2], q.shape[3], v.shape[3])
    out, last = _run(q, k, v, beta, state.to(q.dtype), scale, borders)
    return out.to(kind), last


def _run(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, scale: float, borders: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """The form that suits device, type and shape."""
    if suits(q, k, v, beta, state):
        return Compiled.apply(q, k, v, beta, state, scale, borders)
    if borders is not None:
        return documents(partial(_run, scale=scale, borders=None), (q, k, v, beta, state), borders)
    if gpu.reachable(q, k, v, beta, state) and q.shape[1] > 1:
        from formwright.ops.delta_rule.triton import Kernel
        from formwright.ops.delta_rule.triton import suits as fits

        if fits(q, v):
            return Kernel.apply(q, k, v, beta, state, scale)
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return (chunkwise if traced else Chunked.apply)(q, k, v, beta, state, scale, CHUNK)


def _check(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None, borders: Sequence[int] | None) -> None:
    if q.dim() != 4 or k.shape != q.shape or v.shape[:-1] != q.shape[:-1] or beta.shape != q.shape[:-1]:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip(("q", "k", "v", "beta"), (q, k, v, beta)))
        raise SpecError(f"delta_rule: q and k are (B, L, H, dk), v (B, L, H, dv), beta (B, L, H); given {shapes}")
    rows = q.shape[0] if borders is None else len(borders) - 1
    if borders is not None and (q.shape[0] != 1 or borders[0] != 0 or borders[-1] != q.shape[1]):
        raise SpecError(f"delta_rule: borders run from 0 to T={q.shape[1]} over one packed row; given {tuple(borders)}")
    wanted = (rows, q.shape[2], q.shape[3], v.shape[3])
    if state is not None and tuple(state.shape) != wanted:
        raise SpecError(f"delta_rule: the state must be {wanted} (rows, H, dk, dv), not {tuple(state.shape)}")
