"""Softmax attention written out: the definition that every faster form is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    seen: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q (B, L, H, D), k and v (B, S, G, D), ``seen`` (B or 1, L, S) bool, ``bias`` broadcast to (B, H, L, S).

    Returns the output (B, L, H, D) and the probabilities (B, H, L, S). A query that sees nothing gives zeros.
    """
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    scores = torch.einsum("blhd,bshd->bhls", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], float("-inf"))
        blind = ~seen.any(-1)[:, None, :, None]
        scores = scores.masked_fill(blind, 0.0)
        probs = torch.softmax(scores, -1).masked_fill(~seen[:, None], 0.0)
    else:
        probs = torch.softmax(scores, -1)
    return torch.einsum("bhls,bshd->blhd", probs, v), probs
