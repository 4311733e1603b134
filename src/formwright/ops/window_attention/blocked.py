"""Attention by runs of keys in plain PyTorch: the keys of every tile of queries gathered, one product a group of tiles.

Memory is linear in the length: a product makes a few scores for every key there is, or those of one tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from formwright.ops.window_attention.spans import FEWEST, Group, Spans


def window_attention_blocked(
    q: Tensor, k: Tensor, v: Tensor, seen: Spans, scale: float, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See :func:`~formwright.ops.window_attention.window_attention`; half precision is worked in float32."""
    dtype, repeats = q.dtype, q.shape[2] // max(1, k.shape[2])
    work = torch.promote_types(dtype, torch.float32)
    q, k, v = q.to(work) * scale, k.to(work), v.to(work)
    if q.shape[1] == 0 or seen.total == 0:
        return q.new_zeros(*q.shape[:3], v.shape[-1]).to(dtype), q.new_full(q.shape[:3], float("-inf"))
    if seen.patterns > 1:
        heads = [(slice(h, h + 1), slice(h // repeats, h // repeats + 1)) for h in range(q.shape[2])]
        parts = [
            _pattern(q[:, :, own], k[:, :, kept], v[:, :, kept], seen.of(h), valid)
            for h, (own, kept) in enumerate(heads)
        ]
        out, total = (torch.cat(side, 2) for side in zip(*parts))
    else:
        out, total = _pattern(q, k, v, seen, valid)
    return out.to(dtype), total


def _pattern(q: Tensor, k: Tensor, v: Tensor, seen: Spans, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    outs, totals = [], []
    for group in seen.groups:
        count = max(1, FEWEST * seen.total // (group.queries.shape[1] * group.keys.shape[1]))
        for start in range(0, len(group.keys), count):
            out, total = _product(q, k, v, seen, Group(*(t[start : start + count] for t in group)), valid)
            outs.append(out)
            totals.append(total)
    order = torch.from_numpy(seen.order).to(q.device)
    return torch.cat(outs, 1)[:, order], torch.cat(totals, 1)[:, order]


def _product(q: Tensor, k: Tensor, v: Tensor, seen: Spans, group: Group, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The queries of some tiles, one after the other: (B, n T, H, D) and (B, n T, H)."""
    queries, keys = (torch.from_numpy(t).to(q.device) for t in (group.queries, group.keys))
    groups = k.shape[2]
    rows = q[:, queries].unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)  # (B, n, G, R, T, D)
    columns, values = (t[:, keys].transpose(2, 3) for t in (k, v))  # (B, n, G, K, D)
    mask = _mask(seen, group, q.device)[None, :, None, None]
    if valid is not None:
        mask = mask & valid[:, keys][:, :, None, None, None]
    scores = rows.flatten(3, 4) @ columns.transpose(-1, -2)
    scores = scores.unflatten(3, rows.shape[3:5]).masked_fill(~mask, float("-inf"))
    # The largest score only keeps exponents small, so no gradient passes; one that is -inf belongs to a blind query.
    most = scores.detach().amax(-1, keepdim=True)
    most = most.masked_fill(most == float("-inf"), 0.0)
    weights = torch.exp(scores - most)
    total = weights.sum(-1, keepdim=True)
    blind = total == 0
    total = total.masked_fill(blind, 1.0)
    out = (weights.flatten(3, 4) @ values).unflatten(3, rows.shape[3:5]) / total
    logs = (most + total.log()).masked_fill(blind, float("-inf"))
    out, logs = (t.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2) for t in (out, logs))
    return out, logs[..., 0]


def _mask(seen: Spans, group: Group, device: torch.device) -> Tensor:
    """(n, T, K): which of its tile's keys a query sees."""
    keys, run = (torch.from_numpy(t).to(device)[:, None] for t in (group.keys, group.run))
    low, high = (torch.from_numpy(t[0, group.queries]).to(device) for t in (seen.low, seen.high))
    mask = torch.zeros(*group.queries.shape, keys.shape[-1], dtype=torch.bool, device=device)
    for index in range(seen.low.shape[-1]):
        mask |= (run == index) & (keys >= low[..., index, None]) & (keys < high[..., index, None])
    return mask
