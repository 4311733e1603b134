"""Attention by runs of keys, written out with the whole mask: the definition that faster forms are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from formwright.ops.window_attention.spans import Spans


def window_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, seen: Spans, *, scale: float | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`~formwright.ops.window_attention.window_attention`, in memory L x S."""
    if seen.total == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"))
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    scores = torch.einsum("blhd,bshd->bhls", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = torch.from_numpy(seen.mask()).to(q.device)[None]
    if valid is not None:
        mask = mask & valid[:, None, None]
    blind = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~(mask | blind), float("-inf"))
    total = torch.logsumexp(scores, -1, keepdim=True)
    probs = torch.exp(scores - total).masked_fill(blind, 0.0)
    out = torch.einsum("bhls,bshd->blhd", probs, v)
    return out, total.masked_fill(blind, float("-inf"))[..., 0].transpose(1, 2)
