"""The product and its loss a few rows at a time, forwards and backwards in the same pass over the logits.

With ``p = softmax(logits)`` and ``l = logsumexp(logits)`` the gradient of a row's logits is

    g = (1 + 2 z l) p - smoothing / V - (1 - smoothing) onehot(target)

so once a chunk's logits are there, ``g W`` and ``g^T x`` are two products on what still lies in the cache, and the
logits are overwritten by the next chunk's. Cost: three products a row, as without chunks; memory: one chunk of logits
and a gradient of the weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from formwright.ops import native
from formwright.ops.linear_cross_entropy.reference import linear_cross_entropy_reference


class Settings(NamedTuple):
    """``rows`` at a time; the rest as in the op."""

    smoothing: float
    z: float
    rows: int


class Chunked(torch.autograd.Function):
    """(settings, targets, x, weight, bias) -> the sum. No target is ignored here. The gradients are made beside the
    sum and only scaled in the backward pass; a second derivative goes through the definition."""

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, targets: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        total, grads = passes(settings, targets, x, weight, bias, ctx.needs_input_grad[2:])
        ctx.settings = settings
        ctx.save_for_backward(targets, x, weight, bias, *grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        targets, x, weight, bias, *grads = ctx.saved_tensors
        if torch.is_grad_enabled():
            smoothing, z, _ = ctx.settings

            def general(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
                return (linear_cross_entropy_reference(x, weight, targets, bias, smoothing=smoothing, z=z),)

            return None, None, *native.differentiated(general, [x, weight, bias], ctx.needs_input_grad[2:], (grad,))
        return None, None, *(None if made is None else made * grad.to(made.dtype) for made in grads)


def passes(
    settings: Settings, targets: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The sum and the gradients of x, weight and bias, None where not ``wanted``."""
    smoothing, z, rows = settings
    exact = torch.float32 if x.dtype.itemsize < 4 else x.dtype
    total = torch.zeros((), dtype=exact, device=x.device)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else None
    grad_weight = torch.zeros(weight.shape, dtype=exact, device=x.device) if wanted[1] else None
    grad_bias = torch.zeros(len(weight), dtype=exact, device=x.device) if bias is not None and wanted[2] else None
    room = x.new_empty(min(rows, len(x)), len(weight))
    for start in range(0, len(x), rows):
        part, own = x[start : start + rows], targets[start : start + rows, None]
        logits = torch.mm(part, weight.t(), out=room[: len(part)])
        logits = (logits if bias is None else logits.add_(bias)).to(exact)
        slope = logits.softmax(-1)
        # By the largest logit, whose probability is never too small for a logarithm.
        normal = logits.amax(-1, keepdim=True) - slope.amax(-1, keepdim=True).log()
        total += (normal - (1.0 - smoothing) * logits.gather(1, own)).sum()
        if smoothing:
            total -= smoothing * logits.mean(-1).sum()
        if z:
            total += z * normal.square().sum()
        if not any(wanted):
            continue
        if z:
            slope *= 1.0 + 2.0 * z * normal
        slope.scatter_add_(1, own, slope.new_full(own.shape, smoothing - 1.0))
        if smoothing:
            slope -= smoothing / len(weight)
        if grad_bias is not None:
            grad_bias += slope.sum(0)
        slope = slope.to(x.dtype)
        if grad_x is not None:
            torch.mm(slope, weight, out=grad_x[start : start + rows])
        if grad_weight is not None:
            accumulate(grad_weight, slope, part)
    made = [grad_x, grad_weight, grad_bias]
    return total, [None if grad is None else grad.to(x.dtype) for grad in made]


def accumulate(into: Tensor, slope: Tensor, part: Tensor) -> None:
    """``into += slope^T part``; sums over chunks are kept in float32 where the factors are narrower."""
    if into.dtype == slope.dtype:
        into.addmm_(slope.t(), part)
    else:
        into += slope.t() @ part
