"""Combiner's plans over a grid of tokens, each O(L sqrt L) with both sides of the grid near sqrt(L).

``fixed``: own row, and every earlier (or other) row as a region. ``vertical``: own row and column, and of every other
column the cells above (and below). ``horizontal``: own row and column, and every earlier (other) row without the own
column. ``rowmajor``: own row, and every earlier (other) row, in which the token of the own column asks. Whole causal
texts are in :mod:`.runs`; what is causal here serves a stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from formwright.ops.combiner.grid import Group, Tokens, attend, pooled, pooled_others, sides


@dataclass(frozen=True)
class Laid:
    """Tokens (B, H, R, C, D) in the cells of a grid, and ``valid`` (B or 1, R, C): which cells hold one."""

    tokens: Tokens
    valid: Tensor
    causal: bool
    pool: str

    def ranks(self, axis: int) -> Tensor:
        return torch.arange(self.valid.shape[axis], device=self.valid.device)

    def column(self, x: Tensor) -> Tensor:
        """(B, H, R, C, D) -> (B, H, C, R, D)."""
        return x.transpose(2, 3)

    def others(self, rows: slice) -> Tensor:
        """(r, 1, R) bool for some rows: which rows their tokens see besides their own."""
        r = self.ranks(1)
        own = r[rows, None, None]
        return r < own if self.causal else r != own

    def other_columns(self) -> Tensor:
        """(C, C) bool."""
        c = self.ranks(2)
        return c != c[:, None]

    def own_row(self) -> Group:
        """The cells of a token's own row, up to itself where causal."""
        c, valid = self.ranks(2), self.valid[:, None, :, None]
        if not self.causal:
            return Group(self.tokens.k, self.tokens.v, lambda rows: valid[:, :, rows])
        earlier = c <= c[:, None]
        return Group(self.tokens.k, self.tokens.v, lambda rows: valid[:, :, rows] & earlier)

    def own_column(self) -> Group:
        """The other cells of a token's own column."""
        valid = self.valid.transpose(1, 2)[:, None, None]
        return Group(
            self.column(self.tokens.k),
            self.column(self.tokens.v),
            lambda rows: valid & self.others(rows),
            "column",
            "column",
        )


def blocks(laid: Laid) -> tuple[Tensor, Tensor]:
    """The key and value (B, H, R, D) of every row as a region; zeros or shared-out nothing where it is empty."""
    asker = pooled(laid.tokens.asked, laid.valid[:, None], laid.pool)
    inside = laid.valid[:, None, :, None]
    values = attend(asker, [Group(laid.tokens.k, laid.tokens.v, lambda rows: inside[:, :, rows])])
    return pooled(laid.tokens.offered, laid.valid[:, None], laid.pool).squeeze(3), values.squeeze(3)


def fixed(laid: Laid) -> Tensor:
    return attend(laid.tokens.q, [laid.own_row(), other_blocks(laid, *blocks(laid))])


def other_blocks(laid: Laid, keys: Tensor, values: Tensor) -> Group:
    """The regions of ``fixed`` that lie in the same grid."""
    held = laid.valid.any(-1)[:, None, None, None]
    return Group(keys, values, lambda rows: held & laid.others(rows), "all", "all")


def vertical(laid: Laid) -> Tensor:
    asker, held = pooled_others(laid.tokens.asked, laid.valid[:, None], laid.pool, 2)
    keys, _ = pooled_others(laid.tokens.offered, laid.valid[:, None], laid.pool, 2)
    values = attend(asker, [laid.own_column()])
    elsewhere = laid.other_columns()
    columns = Group(keys, values, lambda rows: held[:, :, rows, None] & elsewhere)
    return attend(laid.tokens.q, [laid.own_row(), laid.own_column(), columns])


def horizontal(laid: Laid) -> Tensor:
    asker, held = pooled_others(laid.tokens.asked, laid.valid[:, None], laid.pool, 3)
    keys, _ = pooled_others(laid.tokens.offered, laid.valid[:, None], laid.pool, 3)
    elsewhere, valid = laid.other_columns(), laid.valid[:, None, :, None]
    values = attend(asker, [Group(laid.tokens.k, laid.tokens.v, lambda rows: valid[:, :, rows] & elsewhere)])
    seen = held.transpose(2, 3)[:, :, None]
    rest = Group(laid.column(keys), laid.column(values), lambda rows: seen & laid.others(rows), "column", "column")
    return attend(laid.tokens.q, [laid.own_row(), laid.own_column(), rest])


def rowmajor(laid: Laid) -> Tensor:
    valid, held = laid.valid[:, None, :, None], laid.valid.any(-1)[:, None, None, None]
    values = attend(laid.tokens.q, [Group(laid.tokens.k, laid.tokens.v, lambda rows: valid[:, :, rows])])
    keys = pooled(laid.tokens.offered, laid.valid[:, None], laid.pool).squeeze(3)
    rest = Group(keys, laid.column(values), lambda rows: held & laid.others(rows), "all", "column")
    return attend(laid.tokens.q, [laid.own_row(), rest])


def mixture(laid: Laid) -> Tensor:
    """The mean of the two axial plans: of their outputs, which is the paper's mixture, not one joint softmax."""
    return (vertical(laid) + horizontal(laid)) / 2


PLANS = {
    "fixed": fixed,
    "axial-vertical": vertical,
    "axial-horizontal": horizontal,
    "axial-rowmajor": rowmajor,
    "mixture": mixture,
}


def pairs(plan: str, length: int, block: int | None) -> int:
    """Products of a query with a key, and as many of a weight with a value, of one head that sees all."""
    rows, columns = sides(length, block)
    cells = rows * columns
    if plan == "fixed":
        return cells * (columns + rows) + cells
    if plan == "axial-rowmajor":
        return cells * (columns + rows) + cells * columns
    vertical = cells * (2 * columns + rows) + cells * rows
    horizontal = cells * (columns + 2 * rows) + cells * columns
    return {"axial-vertical": vertical, "axial-horizontal": horizontal, "mixture": vertical + horizontal}[plan]
