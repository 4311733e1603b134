"""A frozen linear and a low-rank change of it in one step: ``y = x W^T + b + s (x A^T) B^T``.

Hu et al., 2021 (2106.09685). The second product is added into the result of the first, and in the backward pass the
second part of the gradient of x into the first part, so that neither is ever a tensor of its own: two passes over
(n, out) and one over (n, in) less than term by term. Kept for the backward pass are x and ``x A^T``; where A is fixed,
the definition keeps ``x A^T`` alone, so it is used. Exact to rounding; W and b get no gradient. Cost:
out in + r (in + out) multiply-accumulates a row.
"""

from __future__ import annotations

import functools
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
        ctx.save_for_backward(x, weight, bias, a, b, inner)
        ctx.scaling = scaling
        return F.linear(x, weight, bias).addmm_(inner, b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, a, b, inner = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[place] for place in (0, 3, 4)]
        if torch.is_grad_enabled():
            general = functools.partial(_general, weight=weight, bias=bias, scaling=ctx.scaling)
            to_x, to_a, to_b = differentiated(general, [x, a, b], wanted, (grad,))
            return to_x, None, None, to_a, to_b, None
        narrow = torch.mm(grad, b).mul_(ctx.scaling)
        return (
            torch.mm(grad, weight).addmm_(narrow, a) if wanted[0] else None,
            None,
            None,
            torch.mm(narrow.t(), x) if wanted[1] else None,
            torch.mm(grad.t(), inner).mul_(ctx.scaling) if wanted[2] else None,
            None,
        )


def _general(x: Tensor, a: Tensor, b: Tensor, *, weight: Tensor, bias: Tensor | None, scaling: float) -> tuple[Tensor]:
    return (lora_linear_reference(x, weight, bias, a, b, scaling),)


def usable(*tensors: Tensor | None) -> bool:
    """Whether the step runs on these: one dtype, no precision chosen by autocast, nobody tracing."""
    held = [t for t in tensors if t is not None]
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return False
    return len({t.dtype for t in held}) == 1 and not torch.is_autocast_enabled(held[0].device.type)


@register(
    "op", "lora_linear", paper=Paper("Hu et al.", 2021, "2106.09685"), summary="a linear and its LoRA in one step"
)
def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) or None, a (r, in), b (out, r) -> (..., out). Weight and bias are
    fixed: where they want a gradient, the definition is used, and so for anything that :func:`usable` refuses."""
    plain = weight.requires_grad or (bias is not None and bias.requires_grad) or not a.requires_grad
    if (torch.is_grad_enabled() and plain) or not usable(x, weight, bias, a, b):
        return lora_linear_reference(x, weight, bias, a, b, scaling)
    rows = x.reshape(-1, x.shape[-1])
    return LoraLinear.apply(rows, weight, bias, a, b, scaling).view(*x.shape[:-1], weight.shape[0])
