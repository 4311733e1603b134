"""Exact softmax attention where every query sees a few runs of keys: windows, blocks, global tokens, listed blocks.

    out_i = sum_j p_ij v_j,   p_ij = exp(scale q_i k_j - log_i),   log_i = log sum_j exp(scale q_i k_j),

j over the runs of query i (:mod:`~formwright.ops.window_attention.spans` makes them). Patterns whose keys are not
neighbours are runs after a permutation, and :func:`merged` adds the parts of a row seen in two ways; so this op is
under local, strided, dilated and block-sparse attention alike, and under attention over keys held in several places.

``reference`` writes the mask out, ``blocked`` gathers the keys of tiles of queries in plain PyTorch, ``native`` and
``triton`` keep nothing but a running softmax. Cost: 2 D multiply-accumulates a query and key that tiles take, a little
more than the pairs that are seen; memory linear in the length. A row does not depend on the other rows of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from formwright.ops import gpu
from formwright.ops.window_attention import native
from formwright.ops.window_attention.blocked import window_attention_blocked
from formwright.ops.window_attention.reference import window_attention_reference, window_probs
from formwright.ops.window_attention.spans import Spans, causally, chunked, joined, leading, listed, sliding, spans
from formwright.registry import Paper, register

__all__ = [
    "Spans",
    "causally",
    "chunked",
    "joined",
    "leading",
    "listed",
    "merged",
    "sliding",
    "spans",
    "window_attention",
    "window_attention_blocked",
    "window_attention_reference",
    "window_probs",
]


@register(
    "op",
    "window_attention",
    paper=Paper("Beltagy et al.", 2020, "2004.05150"),
    summary="softmax attention over windows, blocks, global and listed keys",
)
def window_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Spans, *, scale: float | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q (B, L, H, D), k and v (B, S, G, D) -> the output (B, L, H, D) and the rows' log sums (B, L, H).

    G divides H; log sums are float32 at least. ``seen`` is for L queries and S keys. ``valid`` (B, S) bool hides keys;
    hidden keys and values must be finite. A query that sees nothing gives zeros and a log sum of -inf.
    """
    if (q.shape[1], k.shape[1]) != (seen.length, seen.total):
        wanted = f"{seen.length} queries and {seen.total} keys"
        raise ValueError(f"window_attention: the runs are for {wanted}, not for {q.shape[1]} and {k.shape[1]}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if native.usable(q, k, v, seen):
        return _Runs.apply(q, k, v, valid, seen, scale, native)
    if _on_gpu(q, k, v, seen):
        from formwright.ops.window_attention import triton

        return _Runs.apply(q, k, v, valid, seen, scale, triton)
    return window_attention_blocked(q, k, v, seen, scale, valid)


def _on_gpu(q: Tensor, k: Tensor, v: Tensor, seen: Spans) -> bool:
    """Whether the kernels for a GPU take these: of one type, with something to see."""
    return gpu.reachable(q, k, v) and q.dtype == k.dtype == v.dtype and seen.low.shape[-1] > 0


def merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the (output, log sum) of each; commutative and associative."""
    (out, log), (out2, log2) = one, other
    most = torch.maximum(log, log2).detach()
    most = most.masked_fill(most == float("-inf"), 0.0)
    weight, weight2 = torch.exp(log - most), torch.exp(log2 - most)
    total = weight + weight2
    blind = total == 0
    total = total.masked_fill(blind, 1.0)
    share, share2 = (weight / total)[..., None], (weight2 / total)[..., None]
    joint = out.to(log.dtype) * share + out2.to(log.dtype) * share2
    return joint.to(out.dtype), (most + total.log()).masked_fill(blind, float("-inf"))


class _Runs(torch.autograd.Function):
    """A kernel with its own backward; while gradients are built for a further one, the blocked form's."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, seen: Spans, scale: float, kernel: Any
    ) -> tuple[Tensor, Tensor]:
        out, logs = kernel.forward(q, k, v, seen, scale, valid)
        ctx.save_for_backward(q, k, v, valid, out, logs)
        ctx.rest = (seen, scale, kernel)
        return out, logs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_logs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, valid, out, logs = ctx.saved_tensors
        seen, scale, kernel = ctx.rest
        if torch.is_grad_enabled() or not kernel.usable(q, k, grad, seen):
            found = _written_out(ctx, q, k, v, valid, grad, grad_logs)
        else:
            delta = (out * grad).sum(-1, dtype=logs.dtype) - grad_logs
            found = kernel.backward(q, k, v, seen, scale, valid, logs, grad, delta)
        return *found, None, None, None, None


def _written_out(
    ctx: Any, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, grad: Tensor, grad_logs: Tensor
) -> list[Tensor | None]:
    seen, scale, _ = ctx.rest
    wanted = ctx.needs_input_grad[:3]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [t if again else t.detach().requires_grad_(need) for t, need in zip((q, k, v), wanted)]
        results = window_attention_blocked(inputs[0], inputs[1], inputs[2], seen, scale, valid)
        needed = [t for t, need in zip(inputs, wanted) if need]
        found = iter(torch.autograd.grad(results, needed, (grad, grad_logs), create_graph=again))
    return [next(found) if need else None for need in wanted]
