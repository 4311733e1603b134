"""Blocks of queries with the keys they list, gathered; what is kept for the backward pass is one number a row.

The three products of the backward pass run over the same lists: probabilities are made again from the rows' log sums,
so neither they nor the scores are kept. A block holds at most ``NUMBERS`` gathered numbers, whatever the length.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Gathered numbers held at once.
NUMBERS = 1 << 21


def blocks(q: Tensor, index: Tensor) -> Iterator[slice]:
    """Slices of queries whose gathered keys stay within ``NUMBERS``."""
    each = max(1, q.shape[0] * q.shape[2] * index.shape[-1] * q.shape[-1])
    size = max(1, NUMBERS // each)
    for start in range(0, q.shape[1], size):
        yield slice(start, min(start + size, q.shape[1]))


def flat_rows(index: Tensor, keys: int, groups: int) -> Tensor:
    """(B, H, r, N) places of keys, -1 for none -> rows of keys laid out (B, G, S): the first where there is none."""
    batch, heads = index.shape[:2]
    group = torch.arange(heads, device=index.device) // (heads // groups)
    first = (torch.arange(batch, device=index.device)[:, None] * groups + group) * keys
    return index.clamp(min=0).long() + first[:, :, None, None]


def rows_of(k: Tensor) -> Tensor:
    """(B, S, G, D) -> (B G S, D)."""
    return k.transpose(1, 2).reshape(-1, k.shape[-1])


def scores_of(q: Tensor, keys: Tensor, index: Tensor, scale: float) -> Tensor:
    """q (B, H, r, D), keys (B, H, r, N, D) -> (B, H, r, N), -inf where nothing is listed."""
    found = (keys @ (q * scale)[..., None])[..., 0]
    return found.masked_fill(index < 0, float("-inf"))


def log_sums(scores: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials over the last axis; zero where nothing is listed."""
    sums = torch.logsumexp(scores, -1)
    return sums.masked_fill(sums == float("-inf"), 0.0)


def forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """-> the output (B, L, H, D) and the rows' log sums (B, H, L); differentiable by autograd as it stands."""
    keys, values = rows_of(k), rows_of(v)
    outs, logs = [], []
    for rows in blocks(q, index):
        listed = index[:, :, rows]
        places = flat_rows(listed, k.shape[1], k.shape[2])
        scores = scores_of(q[:, rows].transpose(1, 2), keys[places], listed, scale)
        sums = log_sums(scores)
        probs = torch.exp(scores - sums[..., None])
        outs.append((probs[..., None, :] @ values[places])[..., 0, :].transpose(1, 2))
        logs.append(sums)
    return torch.cat(outs, 1), torch.cat(logs, 2)


def backward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float, out: Tensor, sums: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = rows_of(k), rows_of(v)
    to_q, to_keys, to_values = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    shift = (out * grad).sum(-1).transpose(1, 2)  # the mean of each row's slopes under its probabilities
    for rows in blocks(q, index):
        listed = index[:, :, rows]
        places = flat_rows(listed, k.shape[1], k.shape[2])
        mine, theirs = q[:, rows].transpose(1, 2), keys[places]
        probs = torch.exp(scores_of(mine, theirs, listed, scale) - sums[:, :, rows, None])
        incoming = grad[:, rows].transpose(1, 2)
        slopes = (values[places] @ incoming[..., None])[..., 0]
        slopes = probs * (slopes - shift[:, :, rows, None]) * scale
        to_q[:, rows] = (slopes[..., None, :] @ theirs)[..., 0, :].transpose(1, 2)
        flat, width = places.flatten(), q.shape[-1]
        to_keys.index_add_(0, flat, (slopes[..., None] * mine[..., None, :]).reshape(-1, width))
        to_values.index_add_(0, flat, (probs[..., None] * incoming[..., None, :]).reshape(-1, width))
    return to_q, _unflat(to_keys, k), _unflat(to_values, v)


def _unflat(rows: Tensor, like: Tensor) -> Tensor:
    batch, keys, groups, width = like.shape
    return rows.reshape(batch, groups, keys, width).transpose(1, 2)
