"""Combiner written out: attention over an explicit partition of what each query sees, one query at a time.

A query attends to its ``direct`` tokens one by one and to each of its regions as a whole. One softmax is over the
direct tokens and the regions' pooled keys; inside a region a further softmax, of the region's own query, shares the
region's weight among its members. So every token of the support has a positive weight, and rows sum to 1.
:func:`combiner_reference` takes any plan by name, :func:`partition_attention` any partition at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Region:
    """Tokens seen as a whole. ``asker``: whose query shares the weight among them: the region's pooled query, nobody's
    (equal shares), or that of one token."""

    members: tuple[int, ...]
    asker: int | Literal["pooled", "nobody"] = "pooled"


@dataclass(frozen=True)
class Seen:
    """What one query sees."""

    direct: tuple[int, ...]
    regions: tuple[Region, ...] = ()


def partition_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    partition: Sequence[Seen],
    pool: Callable[[Tensor], Tensor],
    *,
    features: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """q, k, v (L, D) of one head and what each query sees -> output (L, D) and the effective matrix (L, L).

    ``pool`` maps (n, D) to (D,): applied to the features (default q and k themselves) of a region's members.
    """
    asked, offered = (q, k) if features is None else features
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = []
    for query, seen in zip(q, partition):
        direct = torch.tensor(seen.direct)
        regions = [torch.tensor(region.members) for region in seen.regions]
        keys = torch.stack([*k[direct], *(pool(offered[members]) for members in regions)])
        weights = torch.softmax(scale * keys @ query, 0)
        row = torch.zeros_like(q[:, 0]).index_add(0, direct, weights[: len(direct)])
        for region, members, weight in zip(seen.regions, regions, weights[len(direct) :]):
            if region.asker == "pooled":
                inner = pool(asked[members])
            elif region.asker == "nobody":
                inner = torch.zeros_like(query)
            else:
                inner = q[region.asker]
            row = row.index_add(0, members, weight * torch.softmax(scale * k[members] @ inner, 0))
        rows.append(row)
    matrix = torch.stack(rows) if rows else q.new_zeros(0, 0)
    return matrix @ v, matrix


def combiner_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: str,
    block: int | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
    pool: str = "max",
    features: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """q, k, v (B, L, H, D) -> output (B, L, H, D) and the effective matrices (B, H, L, L); zeros in the padding."""
    pooled = {"max": lambda t: t.amax(0), "mean": lambda t: t.mean(0)}[pool]
    asked, offered = (q, k) if features is None else features
    out, matrices = torch.zeros_like(q), q.new_zeros(len(q), q.shape[2], q.shape[1], q.shape[1])
    for row in range(len(q)):
        length = q.shape[1] if lengths is None else int(lengths[row])
        plans = partitions(plan, length, block, causal)
        for head in range(q.shape[2]):
            own_q, own_k, own_v, *own = (t[row, :length, head] for t in (q, k, v, asked, offered))
            for partition in plans:
                y, matrix = partition_attention(
                    own_q, own_k, own_v, partition, pooled, features=(own[0], own[1]), scale=scale
                )
                out[row, :length, head] += y / len(plans)
                matrices[row, head, :length, :length] += matrix / len(plans)
    return out, matrices


def partitions(plan: str, length: int, block: int | None, causal: bool) -> list[list[Seen]]:
    """The partitions that a plan's output is the average of: one, or the two of ``mixture``."""
    if plan == "logsparse":
        return [_logsparse(length, causal)]
    rows = rows_of(length, block, causal)
    made = {"fixed": _fixed, "vertical": _vertical, "horizontal": _horizontal, "rowmajor": _rowmajor}
    names = ("vertical", "horizontal") if plan == "mixture" else (plan.removeprefix("axial-"),)
    return [made[name](rows, causal) for name in names]


def rows_of(length: int, block: int | None, causal: bool) -> list[list[int]]:
    """Tokens in rows of ``block``; without one of 1, 2, 3 ... tokens where causal, else of about sqrt(length)."""
    rows: list[list[int]] = []
    start = 0
    while start < length:
        width = block or (len(rows) + 1 if causal else math.isqrt(length - 1) + 1)
        rows.append(list(range(start, min(start + width, length))))
        start += width
    return rows


def _others(count: int, own: int, causal: bool) -> list[int]:
    """Rows that a token of row ``own`` sees besides it."""
    return [r for r in range(count) if (r < own if causal else r != own)]


def _fixed(rows: list[list[int]], causal: bool) -> list[Seen]:
    found = []
    for s, row in enumerate(rows):
        regions = tuple(Region(tuple(rows[r])) for r in _others(len(rows), s, causal))
        found += [Seen(tuple(j for j in row if j <= i or not causal), regions) for i in row]
    return found


def _cross(rows: list[list[int]], s: int, u: int, causal: bool) -> tuple[int, ...]:
    """Own row (up to the token where causal) and own column without it."""
    own = rows[s][: u + 1] if causal else rows[s]
    return (*own, *(rows[r][u] for r in _others(len(rows), s, causal) if u < len(rows[r])))


def _vertical(rows: list[list[int]], causal: bool) -> list[Seen]:
    widest, found = max(map(len, rows), default=0), []
    for s, row in enumerate(rows):
        others = _others(len(rows), s, causal)
        for u in range(len(row)):
            columns = [tuple(rows[r][c] for r in others if c < len(rows[r])) for c in range(widest) if c != u]
            found.append(Seen(_cross(rows, s, u, causal), tuple(Region(column) for column in columns if column)))
    return found


def _horizontal(rows: list[list[int]], causal: bool) -> list[Seen]:
    found = []
    for s, row in enumerate(rows):
        for u in range(len(row)):
            rest = [tuple(rows[r][:u] + rows[r][u + 1 :]) for r in _others(len(rows), s, causal)]
            found.append(Seen(_cross(rows, s, u, causal), tuple(Region(members) for members in rest if members)))
    return found


def _rowmajor(rows: list[list[int]], causal: bool) -> list[Seen]:
    found = []
    for s, row in enumerate(rows):
        for u in range(len(row)):
            others = [rows[r] for r in _others(len(rows), s, causal)]
            regions = tuple(Region(tuple(other), other[u] if u < len(other) else "nobody") for other in others)
            found.append(Seen(tuple(row[: u + 1] if causal else row), regions))
    return found


def _logsparse(length: int, causal: bool) -> list[Seen]:
    """For each set bit t of the number p of tokens before: the aligned block of 2^t tokens with index (p >> t) - 1.

    Those blocks tile [0, p). The block of one token is direct. Where not causal the same from the other end.
    """

    def before(p: int) -> list[tuple[int, ...]]:
        bits = [t for t in range(p.bit_length()) if p >> t & 1]
        return [tuple(range(((p >> t) - 1) << t, (p >> t) << t)) for t in bits]

    found = []
    for i in range(length):
        groups = before(i)
        if not causal:
            groups += [tuple(length - 1 - j for j in group) for group in before(length - 1 - i)]
        direct = (i, *(group[0] for group in groups if len(group) == 1))
        found.append(Seen(direct, tuple(Region(group) for group in groups if len(group) > 1)))
    return found
