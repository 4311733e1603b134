"""Tokens in rows and columns, and one softmax over several groups of keys for every cell: what the fast plans share.

A group's keys stand per row, per column, or once for all cells. Scores are made for a few rows at a time, so memory
stays linear in the length; a query that sees nothing gives a finite value that nobody reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

#: Scores of one head that are made at once.
BUDGET = 1 << 16

Axis = Literal["row", "column", "all"]


class Tokens(NamedTuple):
    """Queries (scaled), keys, values, and what is pooled into the queries (scaled) and keys of regions."""

    q: Tensor
    k: Tensor
    v: Tensor
    asked: Tensor
    offered: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """What is pooled is mostly the queries and keys themselves, and those are not changed twice."""
        q, k, v = map(change, self[:3])
        asked = q if self.asked is self.q else change(self.asked)
        return Tokens(q, k, v, asked, k if self.offered is self.k else change(self.offered))


def scaled(q: Tensor, k: Tensor, v: Tensor, features: tuple[Tensor, Tensor] | None, scale: float | None) -> Tokens:
    """Tokens of a head width's or a given ``scale``; ``features`` are pooled in place of q and k."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    asked, offered = (q, k) if features is None else features
    turned = q * scale
    return Tokens(turned, k, v, turned if asked is q else asked * scale, offered)


@dataclass(frozen=True)
class Grid:
    """``valid`` (B or 1, R, C): the cells that hold a token. ``place`` (B, R * C): the token of each cell, and ``cell``
    (B, L) the cell of each token; None where tokens stand in reading order without gaps."""

    valid: Tensor
    length: int
    place: Tensor | None = None
    cell: Tensor | None = None

    def lay(self, x: Tensor) -> Tensor:
        """(B, L, H, D) -> (B, H, R, C, D), zeros in empty cells."""
        rows, columns = self.valid.shape[1:]
        if self.place is None:
            cells = F.pad(x, (0, 0, 0, 0, 0, rows * columns - x.shape[1]))
        else:
            cells = x.gather(1, self.place[:, :, None, None].expand(-1, -1, *x.shape[2:]))
        cells = cells.unflatten(1, (rows, columns)).permute(0, 3, 1, 2, 4)
        return cells.masked_fill(~self.valid[:, None, :, :, None], 0.0)

    def read(self, y: Tensor) -> Tensor:
        """(B, H, R, C, D) -> (B, L, H, D)."""
        cells = y.permute(0, 2, 3, 1, 4).flatten(1, 2)
        if self.cell is None:
            return cells[:, : self.length]
        return cells.gather(1, self.cell[:, :, None, None].expand(-1, -1, *cells.shape[2:]))


def sides(length: int, block: int | None) -> tuple[int, int]:
    """(rows, columns) of the grid of ``length`` tokens; see :func:`grid`."""
    columns = min(block or _root(length), max(length, 1))
    return -(-length // columns), columns


def grid(length: int, lengths: Tensor | None, block: int | None, device: torch.device) -> Grid:
    """``length`` tokens, ``lengths`` (B,) of them real, in rows of ``block``, or of ceil(sqrt(own length))."""
    rows, columns = sides(length, block)
    if block is not None or lengths is None:
        r, c = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
        return Grid((r * columns + c)[None] < (length if lengths is None else lengths[:, None, None]), length)
    r, c = torch.arange(columns, device=device)[:, None], torch.arange(columns, device=device)
    steps = torch.arange(length, device=device)
    width = lengths.double().sqrt().ceil().long().clamp(min=1)[:, None]
    place = r * width[..., None] + c
    inside = (c < width[..., None]) & (place < lengths[:, None, None])
    cell = (steps // width * columns + steps % width).clamp(max=columns * columns - 1)
    return Grid(inside, length, place.clamp(max=length - 1).flatten(1), cell)


def _root(length: int) -> int:
    """ceil(sqrt(length)), at least 1."""
    return math.isqrt(max(length, 1) - 1) + 1


class Group(NamedTuple):
    """Keys and values of one kind: (B, H, R, n, D) per row, (B, H, C, n, D) per column, (B, H, n, D) for all cells.

    ``seen``: rows -> bool, broadcast to (B, H, rows, C, n).
    """

    keys: Tensor
    values: Tensor
    seen: Callable[[slice], Tensor]
    key_axis: Axis = "row"
    value_axis: Axis = "row"


def attend(q: Tensor, groups: list[Group]) -> Tensor:
    """q (B, H, R, C, D), already scaled, -> (B, H, R, C, D): one softmax over the keys of all groups."""
    count = sum(group.keys.shape[-2] for group in groups)
    step = max(1, BUDGET // max(1, q.shape[3] * count))
    found = [_attend(q, groups, slice(start, start + step)) for start in range(0, max(q.shape[2], 1), step)]
    return found[0] if len(found) == 1 else torch.cat(found, 2)


def _attend(q: Tensor, groups: list[Group], rows: slice) -> Tensor:
    q = q[:, :, rows]
    scores = [
        _product(q, group.keys.transpose(-1, -2), group.key_axis, rows).masked_fill(~group.seen(rows), -math.inf)
        for group in groups
    ]
    joint = torch.cat(scores, -1) if len(scores) > 1 else scores[0]
    blind = joint.detach().amax(-1, keepdim=True) == -math.inf
    weights = torch.softmax(joint.masked_fill(blind, 0.0), -1).split([s.shape[-1] for s in scores], -1)
    mixed = [_product(w, group.values, group.value_axis, rows) for w, group in zip(weights, groups)]
    return torch.stack(mixed).sum(0) if len(mixed) > 1 else mixed[0]


def _product(x: Tensor, other: Tensor, axis: Axis, rows: slice) -> Tensor:
    """(B, H, r, C, a) times what stands per row, per column or once -> (B, H, r, C, b)."""
    if axis == "row":
        return x @ other[:, :, rows]
    if axis == "column":
        return (x.transpose(2, 3) @ other).transpose(2, 3)
    return (x.flatten(2, 3) @ other).unflatten(2, x.shape[2:4])


def pooled(features: Tensor, valid: Tensor, pool: str) -> Tensor:
    """(..., C, D) over the cells that are ``valid`` (..., C) -> (..., 1, D); zeros where there are none."""
    valid = valid[..., None]
    if pool == "mean":
        return features.masked_fill(~valid, 0.0).sum(-2, keepdim=True) / valid.sum(-2, keepdim=True).clamp(min=1)
    most = features.masked_fill(~valid, -math.inf).amax(-2, keepdim=True)
    return most.masked_fill(~valid.any(-2, keepdim=True), 0.0)


def pooled_others(features: Tensor, valid: Tensor, pool: str, dim: int) -> tuple[Tensor, Tensor]:
    """For every cell the pool of the valid ones before and after it along ``dim`` -> values, whether there are any."""
    valid = valid[..., None]
    count = _beside(valid.long(), dim, torch.cumsum, torch.add, 0)
    if pool == "mean":
        total = _beside(features.masked_fill(~valid, 0.0), dim, torch.cumsum, torch.add, 0.0)
        return total / count.clamp(min=1), count[..., 0] > 0
    most = _beside(features.masked_fill(~valid, -math.inf), dim, _running_maximum, torch.maximum, -math.inf)
    return most.masked_fill(count == 0, 0.0), count[..., 0] > 0


def _running_maximum(x: Tensor, dim: int) -> Tensor:
    return torch.cummax(x, dim).values


def _beside(
    x: Tensor,
    dim: int,
    running: Callable[[Tensor, int], Tensor],
    both: Callable[[Tensor, Tensor], Tensor],
    start: float,
) -> Tensor:
    """``running`` over what lies before each place and over what lies after it, from ``start``, put together."""
    first, count = torch.full_like(x.narrow(dim, 0, 1), start), x.shape[dim] - 1

    def before(t: Tensor) -> Tensor:
        return torch.cat((first, running(t, dim).narrow(dim, 0, count)), dim)

    return both(before(x), before(x.flip(dim)).flip(dim))
