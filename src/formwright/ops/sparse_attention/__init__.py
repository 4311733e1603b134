"""Exact softmax attention of every query over a list of keys of its own.

    out_i = sum_t p_it v_j(i,t),   p_it = exp(scale q_i k_j(i,t) - log_i),

for lists that somebody else chose, such as matching codes of a product quantizer (Gui et al., 2023, 2310.10365).
``reference`` writes the mask out; ``gathered`` runs over blocks of queries. Cost: 2 N D multiply-accumulates a query
and head over N listed keys. Kept for the backward pass: the lists (2 bytes a key up to 32,768 keys) and one log sum a
row; probabilities are made again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from formwright.ops.sparse_attention import gathered
from formwright.ops.sparse_attention.reference import sparse_attention_reference
from formwright.registry import Paper, register

__all__ = ["narrow", "sparse_attention", "sparse_attention_reference"]


def narrow(index: Tensor, keys: int) -> Tensor:
    """``index`` in the smallest type that can name ``keys`` places and -1."""
    return index.to(torch.int16 if keys <= 1 << 15 else torch.int32)


@register(
    "op",
    "sparse_attention",
    paper=Paper("Gui et al.", 2023, "2310.10365"),
    summary="softmax attention over listed keys",
)
def sparse_attention(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float | None = None) -> Tensor:
    """q (B, L, H, D), k and v (B, S, G, D), index (B, H, L, N) whole numbers -> (B, L, H, D). G divides H.

    index: places of keys, distinct in a row; -1 lists nothing. Listed keys and values must be finite, and so must the
    first of each row. A query that lists nothing gives zeros. The lists carry no gradient.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not q.shape[1] or not k.shape[1] or not index.shape[-1]:
        return q * 0.0 + (k.sum() + v.sum()) * 0.0
    wide = torch.promote_types(q.dtype, torch.float32)
    out = _Listed.apply(q.to(wide), k.to(wide), v.to(wide), narrow(index, k.shape[1]), scale)
    return out.to(q.dtype)


class _Listed(torch.autograd.Function):
    """Its own backward; while gradients are built for a further one, that of the written-out blocks."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> Tensor:
        out, sums = gathered.forward(q, k, v, index, scale)
        ctx.save_for_backward(q, k, v, index, out, sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, index, out, sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = torch.autograd.grad(
                gathered.forward(q, k, v, index, ctx.scale)[0], (q, k, v), grad, create_graph=True, allow_unused=True
            )
        else:
            found = gathered.backward(q, k, v, index, ctx.scale, out, sums, grad)
        return *found, None, None
