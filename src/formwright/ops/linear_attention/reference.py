"""Linear attention written out token by token: the definition that every faster form is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    state: Tensor | None = None,
    borders: Sequence[int] | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Shapes as in :func:`~formwright.ops.linear_attention.linear_attention`."""
    if borders is not None:
        found = [
            linear_attention_reference(
                *(t[:, start:stop] for t in (q, k, v)),
                causal=causal,
                state=None if state is None else state[index : index + 1],
                eps=eps,
            )
            for index, (start, stop) in enumerate(pairwise(borders))
        ]
        return torch.cat([o for o, _ in found], 1), torch.cat([last for _, last in found])
    rows, length, heads, inner = q.shape
    sums = q.new_zeros(rows, heads, inner, v.shape[-1] + 1) if state is None else state
    values = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    grown = []
    for t in range(length):
        sums = sums + k[:, t, :, :, None] * values[:, t, :, None]
        grown.append(sums)
    out = []
    for t in range(length):
        read = torch.einsum("bhd,bhde->bhe", q[:, t], grown[t] if causal else sums)
        out.append(read[..., :-1] / (read[..., -1:] + eps))
    return torch.stack(out, 1) if out else torch.zeros_like(v), sums
