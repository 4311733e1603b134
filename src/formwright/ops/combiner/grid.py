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
        return Tokens._make(map(change, self))


@dataclass(frozen=True)
class Grid:
    """``valid`` (B or 1, R, C): the cells that hold a token. ``place`` (B or 1, R * C): the token of each cell, and
    ``cell`` (B or 1, L) the cell of each token; None where tokens stand in reading order without gaps."""

    valid: Tensor
    length: int
    place: Tensor | None = None
    cell: Tensor | None = None

    def lay(self, x: Tensor) -> Tensor:
        """(B, L, H, D) -> (B, H, R, C, D), zeros in empty cells."""
        rows, columns = self.valid.shape[1:]
        if self.place is None:
            cells = F.pad(x, (0, 0, 0, 0, 0, rows * columns - x.shape[1]))
        elif len(self.place) == 1:
            cells = x.index_select(1, self.place[0])
        else:
            cells = x.gather(1, self.place[:, :, None, None].expand(-1, -1, *x.shape[2:]))
        cells = cells.unflatten(1, (rows, columns)).permute(0, 3, 1, 2, 4)
        return cells.masked_fill(~self.valid[:, None, :, :, None], 0.0)

    def read(self, y: Tensor) -> Tensor:
        """(B, H, R, C, D) -> (B, L, H, D)."""
        cells = y.permute(0, 2, 3, 1, 4).flatten(1, 2)
        if self.cell is None:
            return cells[:, : self.length]
        if len(self.cell) == 1:
            return cells.index_select(1, self.cell[0])
        return cells.gather(1, self.cell[:, :, None, None].expand(-1, -1, *cells.shape[2:]))


def sides(length: int, block: int | None, causal: bool) -> tuple[int, int]:
    """(rows, columns) of the grid of ``length`` tokens; see :func:`grid`."""
    if block is None and causal:
        rows = (math.isqrt(8 * length + 1) - 1) // 2
        rows += rows * (rows + 1) // 2 < length
        return rows, rows
    columns = min(block or _root(length), max(length, 1))
    return -(-length // columns), columns


def grid(length: int, lengths: Tensor | None, block: int | None, causal: bool, device: torch.device) -> Grid:
    """``length`` tokens, ``lengths`` (B,) of them real, in rows of ``block``.

    Without a block the rows are as long as suits the method: where causal, row r holds r + 1 tokens, so that both sides
    grow as sqrt(2 length) and no token's row depends on what comes later; else all are ceil(sqrt(own length)) long.
    """
    rows, columns = sides(length, block, causal)
    if block is None and not causal and lengths is not None:
        rows = columns
    r, c = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
    steps = torch.arange(length, device=device)
    real = length if lengths is None else lengths[:, None, None]
    place = cell = None
    if block is None and causal:
        place = (r * (r + 1) // 2 + c)[None]
        inside = (c <= r) & (place < real)
        row = ((torch.sqrt(8.0 * steps.double() + 1) - 1) / 2).long()
        cell = (row * columns + steps - row * (row + 1) // 2)[None]
    elif block is None and lengths is not None:
        width = lengths.double().sqrt().ceil().long().clamp(min=1)[:, None]
        place = r * width[..., None] + c
        inside = (c < width[..., None]) & (place < real)
        cell = (steps // width * columns + steps % width).clamp(max=rows * columns - 1)
    else:
        inside = (r * columns + c)[None] < real
    if place is not None:
        place = place.clamp(max=length - 1).flatten(1)
    return Grid(inside, length, place, cell)


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


def pooled_others(features: Tensor, valid: Tensor, pool: str, dim: int, both: bool) -> tuple[Tensor, Tensor]:
    """For every cell the pool of the valid ones before it along ``dim``, or on both sides of it -> values, any."""
    valid = valid[..., None]
    count = _before(valid.long(), dim, torch.cumsum, 0)
    if both:
        count = count + _after(valid.long(), dim, torch.cumsum, 0)
    if pool == "mean":
        clean = features.masked_fill(~valid, 0.0)
        total = _before(clean, dim, torch.cumsum, 0.0)
        if both:
            total = total + _after(clean, dim, torch.cumsum, 0.0)
        return total / count.clamp(min=1), count[..., 0] > 0
    clean = features.masked_fill(~valid, -math.inf)
    most = _before(clean, dim, _running_maximum, -math.inf)
    if both:
        most = torch.maximum(most, _after(clean, dim, _running_maximum, -math.inf))
    return most.masked_fill(count == 0, 0.0), count[..., 0] > 0


def _running_maximum(x: Tensor, dim: int) -> Tensor:
    return torch.cummax(x, dim).values


def _before(x: Tensor, dim: int, running: Callable[[Tensor, int], Tensor], start: float) -> Tensor:
    """``running`` over what lies before each place, ``start`` at the first."""
    first = torch.full_like(x.narrow(dim, 0, 1), start)
    return torch.cat((first, running(x, dim).narrow(dim, 0, x.shape[dim] - 1)), dim)


def _after(x: Tensor, dim: int, running: Callable[[Tensor, int], Tensor], start: float) -> Tensor:
    return _before(x.flip(dim), dim, running, start).flip(dim)
