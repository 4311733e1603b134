"""Attention by runs of keys, written out with the whole mask: the definition that faster forms are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from formwright.ops.window_attention.spans import Spans


def window_probs(
    q: Tensor, k: Tensor, seen: Spans, *, scale: float | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Probabilities (B, H, L, S) and log sums (B, H, L)."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("blhd,bshd->bhls", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = torch.from_numpy(seen.mask()).to(q.device)[None]
    if valid is not None:
        mask = mask & valid[:, None, None]
    blind = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~(mask | blind), float("-inf"))
    total = torch.logsumexp(scores, -1, keepdim=True)
    return torch.exp(scores - total).masked_fill(blind, 0.0), total.masked_fill(blind, float("-inf"))[..., 0]


def window_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, seen: Spans, *, scale: float | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`~formwright.ops.window_attention.window_attention`, in memory L x S."""
    if seen.total == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"))
    probs, logs = window_probs(q, k, seen, scale=scale, valid=valid)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bhls,bshd->blhd", probs, v), logs.transpose(1, 2)
