"""PyTorch's fused attention kernel, made differentiable twice.

The kernel has no second derivative. So while gradients are being built for a further differentiation
(``create_graph``), the backward pass differentiates the written-out form instead; otherwise it runs the kernel's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """q (B, H, L, D), k and v (B, H, S, D) -> (B, H, L, D); ``mask`` broadcasts to (B, H, L, S), bool or added."""
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    plain = mask is not None and mask.requires_grad  # PyTorch writes this case out, so it needs no help
    if not wanted or plain or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return _Fused.apply(q, k, v, mask, causal, scale)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.causal, ctx.scale = causal, scale
        ctx.run = _run(ctx, q, k, v, mask)
        return ctx.run[1].detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, mask = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = [q, k, v]
            with sdpa_kernel(SDPBackend.MATH):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=ctx.causal, scale=ctx.scale)
        else:
            # The kernel's graph is dropped after its one use, so that memory is freed layer by layer.
            inputs, out = ctx.run or _run(ctx, q, k, v, mask)
            ctx.run = None
        needed = [t for t, wanted in zip(inputs, ctx.needs_input_grad) if wanted]
        found = iter(torch.autograd.grad(out, needed, grad, create_graph=torch.is_grad_enabled()))
        return *(next(found) if wanted else None for wanted in ctx.needs_input_grad[:3]), None, None, None


def _run(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """The kernel on detached inputs, with the graph of its own backward."""
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_(wanted) for t, wanted in zip((q, k, v), ctx.needs_input_grad))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=ctx.causal, scale=ctx.scale)
    return [q, k, v], out
