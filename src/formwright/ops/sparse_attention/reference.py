"""The definition: softmax over a mask that the index lists write out."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_attention_reference(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> Tensor:
    """As :func:`~formwright.ops.sparse_attention.sparse_attention`, through a mask (B, H, L, S)."""
    shared = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    seen = torch.zeros(*index.shape[:3], k.shape[2] + 1, dtype=torch.bool, device=q.device)
    places = torch.where(index < 0, k.shape[2], index.long())  # what lists no key falls into a column of its own
    seen = seen.scatter(-1, places, True)[..., :-1]
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    probs = torch.softmax(scores, -1).masked_fill(~seen, 0.0)  # a row that sees nothing is zeros, not NaN
    return (probs @ v).transpose(1, 2)
