"""A frozen linear and a low-rank change of it in one step: ``y = x W^T + b + s (x A^T) B^T``.

Hu et al., 2021 (2106.09685). The second product is added into the result of the first, and in the backward pass the
second part of the gradient of x into the first part, so that neither is ever a tensor of its own: two passes over
(n, out) and one over (n, in) less than term by term. Kept for the backward pass are ``x A^T`` and, only where A
trains, x. Exact to rounding; W and b get no gradient. Cost: out in + r (in + out) multiply-accumulates a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.ops.native import differentiated
from formwright.registry import Paper, register


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) or None, a (r, in), b (out, r) -> (..., out): term by term."""
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a) * scaling, b)


class LoraLinear(torch.autograd.Function):
    """Rows x (n, in) -> (n, out)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        inner = x @ a.t()
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, bias, a, b, inner)
        ctx.scaling = scaling
        return F.linear(x, weight, bias).addmm_(inner, b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, a, b, inner = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[place] for place in (0, 3, 4)]
        if torch.is_grad_enabled():
            made = _twice(ctx.scaling, weight, bias, (x, a, b, inner), wanted, grad)
            return made[0], None, None, made[1], made[2], None
        narrow = torch.mm(grad, b).mul_(ctx.scaling)
        to_x = torch.mm(grad, weight).addmm_(narrow, a) if wanted[0] else None
        to_a = torch.mm(narrow.t(), x) if wanted[1] else None
        to_b = torch.mm(grad.t(), inner).mul_(ctx.scaling) if wanted[2] else None
        return to_x, None, None, to_a, to_b, None


def _twice(
    scaling: float, weight: Tensor, bias: Tensor | None, saved: tuple, wanted: list[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients with a graph of their own. Where x was not kept, A is fixed and ``x A^T`` stands for it."""
    x, a, b, inner = saved
    if x is not None:
        return differentiated(
            lambda x, a, b: (lora_linear_reference(x, weight, bias, a, b, scaling),), [x, a, b], wanted, (grad,)
        )
    narrow = grad @ b * scaling
    return [grad @ weight + narrow @ a if wanted[0] else None, None, grad.t() @ inner * scaling if wanted[2] else None]


def usable(*tensors: Tensor | None) -> bool:
    """Whether the step runs on these: one dtype, no precision chosen by autocast, nobody tracing."""
    held = [t for t in tensors if t is not None]
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return False
    return len({t.dtype for t in held}) == 1 and not torch.is_autocast_enabled(held[0].device.type)


@register(
    "op", "lora-linear", paper=Paper("Hu et al.", 2021, "2106.09685"), summary="a linear and its LoRA in one step"
)
def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) or None, a (r, in), b (out, r) -> (..., out). Weight and bias are
    fixed: where they want a gradient, the definition is used, and so for anything that :func:`usable` refuses."""
    fixed = not torch.is_grad_enabled() or not (weight.requires_grad or (bias is not None and bias.requires_grad))
    if not fixed or not usable(x, weight, bias, a, b):
        return lora_linear_reference(x, weight, bias, a, b, scaling)
    rows = x.reshape(-1, x.shape[-1])
    return LoraLinear.apply(rows, weight, bias, a, b, scaling).view(*x.shape[:-1], weight.shape[0])
