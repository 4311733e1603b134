"""Combiner's causal plans over a grid as runs of keys, in reading order and down the columns.

What a token sees of its own row, and of regions that stand as cells do, is a run or two of neighbours; so is what it
sees of its column once cells are sorted by column. So a plan is one or two calls of
:func:`~formwright.ops.window_attention.window_attention` for the regions' values and for the tokens, joined by their
log sums, and no score is kept. Nothing here asks which tokens are real: none sees a later one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from formwright.ops.combiner.grid import Tokens, sides
from formwright.ops.window_attention import Spans, merged, spans, window_attention

Array = np.ndarray


class Cells:
    """Tokens in rows of ``block`` columns, or of 1, 2, 3 ... tokens without one; the last row is filled up.

    ``row``, ``column`` (T,): where each cell stands; ``start``, ``end`` (T,): the run of its row. ``order`` (T,): cells
    sorted by column; ``top``, ``deep`` (T,): in that order, where a cell's column starts and where the cell stands.
    """

    def __init__(self, length: int, block: int | None) -> None:
        self.even = block is not None
        if self.even:
            self.rows, self.columns = sides(length, block)
            widths = np.full(self.rows, self.columns)
        else:
            root = (math.isqrt(8 * length + 1) - 1) // 2
            self.rows = self.columns = root + (root * (root + 1) // 2 < length)
            widths = np.arange(1, self.rows + 1)
        ends = widths.cumsum()
        self.row = np.repeat(np.arange(self.rows), widths)
        self.start, self.end = (ends - widths)[self.row], ends[self.row]
        self.column = np.arange(self.total) - self.start
        self.order = np.lexsort((self.row, self.column))
        sizes = np.bincount(self.column)
        self.top, self.deep = (sizes.cumsum() - sizes)[self.column], np.argsort(self.order)

    @property
    def total(self) -> int:
        return len(self.row)

    def filled(self, x: Tensor) -> Tensor:
        """(B, L, H, D) -> (B, T, H, D), zeros behind the last token."""
        spare = self.total - x.shape[1]
        return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, spare)) if spare else x

    def down(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """(B, T, ...) sorted by column."""
        index = torch.from_numpy(self.order).to(tensors[0].device)
        return tuple(t.index_select(1, index) for t in tensors)

    def back(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The inverse of :meth:`down`."""
        index = torch.from_numpy(self.deep).to(tensors[0].device)
        return tuple(t.index_select(1, index) for t in tensors)

    def square(self, x: Tensor, fill: float) -> Tensor:
        """(B, T, H, D) -> (B, R, C, H, D), ``fill`` in cells that there are not."""
        if self.even:
            return self.unflat(x)
        r, c = np.indices((self.rows, self.columns))
        place, missing = (torch.from_numpy(t).to(x.device) for t in (r * (r + 1) // 2 + np.minimum(c, r), c > r))
        cells = self.unflat(x.index_select(1, place.flatten()))
        return cells.masked_fill(missing[:, :, None, None], fill)

    def flat(self, x: Tensor) -> Tensor:
        """(B, R, C, H, D) -> (B, T, H, D): the inverse of :meth:`square`."""
        cells = x.flatten(1, 2)
        if self.even:
            return cells
        return cells.index_select(1, torch.from_numpy(self.row * self.columns + self.column).to(x.device))

    def unflat(self, x: Tensor) -> Tensor:
        """(B, R C, H, D) -> (B, R, C, H, D)."""
        return x.unflatten(1, (self.rows, self.columns))

    @staticmethod
    def by_column(x: Tensor) -> Tensor:
        """(B, R, C, H, D) -> (B, C R, H, D)."""
        return x.transpose(1, 2).flatten(1, 2)

    def pooled(self, x: Tensor, pool: str) -> Tensor:
        """(B, T, H, D) -> (B, R, H, D): every row."""
        if pool == "max":
            return self.square(x, -math.inf).amax(2)
        return self.square(x, 0.0).sum(2) / self._each((self.end - self.start)[self.column == 0], x)

    def rest(self, x: Tensor, pool: str) -> Tensor:
        """(B, T, H, D) -> (B, R, C, H, D): every row without each column; zeros where that is nothing."""
        widths = (self.end - self.start)[self.column == 0][:, None]
        others = self._each(widths - (np.arange(self.columns) < widths), x)
        if pool == "mean":
            cells = self.square(x, 0.0)
            return (cells.sum(2, keepdim=True) - cells) / others.clamp(min=1)
        cells = self.square(x, -math.inf)
        most = cells.amax(2, keepdim=True)
        best = cells == most
        alone = best & (best.sum(2, keepdim=True) == 1)
        second = cells.masked_fill(best, -math.inf).amax(2, keepdim=True)
        return torch.where(alone, second, most).masked_fill(others == 0, 0.0)

    def above(self, x: Tensor, pool: str) -> Tensor:
        """(B, T, H, D) -> the same shape: for every cell the cells above it; zeros where there are none."""
        before = self._each(self.deep - self.top, x)
        if pool == "mean":
            running = self.square(x, 0.0).cumsum(1)
        else:
            running = torch.cummax(self.square(x, -math.inf), 1).values
        shifted = torch.cat((torch.zeros_like(running[:, :1]), running[:, :-1]), 1)
        found = self.flat(shifted).masked_fill(before == 0, 0.0)
        return found / before.clamp(min=1) if pool == "mean" else found

    def _each(self, counts: Array, like: Tensor) -> Tensor:
        """(...) -> (..., 1, 1) beside ``like``."""
        return torch.from_numpy(counts).to(like.device)[..., None, None]

    @functools.cached_property
    def own(self) -> Spans:
        """The own row up to the cell."""
        return _runs(self.total, (self.start, np.arange(self.total) + 1))

    @functools.cached_property
    def each_row(self) -> Spans:
        """For every row: its cells."""
        first = self.column == 0
        return _runs(self.total, (self.start[first], self.end[first]))

    @functools.cached_property
    def own_and_rows(self) -> Spans:
        """The own row up to the cell, and of R keys more those of earlier rows."""
        total = self.total
        return _runs(total + self.rows, (self.start, np.arange(total) + 1), (np.full(total, total), total + self.row))

    @functools.cached_property
    def own_and_columns(self) -> Spans:
        """The own row up to the cell, and of T keys more those of its row where there are cells above, less its own."""
        steps = np.arange(self.total)
        held = np.where(self.row == 0, self.start, self.end if self.even else self.end - 1)
        runs = ((self.start, np.minimum(steps, held)), (steps + 1, held))
        return _runs(
            2 * self.total, (self.start, steps + 1), *((self.total + low, self.total + high) for low, high in runs)
        )

    @functools.cached_property
    def others(self) -> Spans:
        """For R x C queries in reading order: their row without their column."""
        low, high = self._of_rows()
        own = low + np.tile(np.arange(self.columns), self.rows)
        return _runs(self.total, (low, np.minimum(own, high)), (own + 1, high))

    @functools.cached_property
    def before(self) -> Spans:
        """By column: the cells above."""
        return _runs(self.total, (self.top[self.order], np.arange(self.total)))

    @functools.cached_property
    def before_and_rows(self) -> Spans:
        """By column: the cells above, and of C x R keys more those of the own column in earlier rows."""
        low = self.total + self.column * self.rows
        # A row of one cell has no others: every row of a single column, else the first of rows of 1, 2, 3 ... cells.
        alone = self.row if self.columns == 1 else (self.column == 0) & (not self.even)
        rows = (low + alone)[self.order], (low + self.row)[self.order]
        return _runs(self.total + self.rows * self.columns, (self.top[self.order], np.arange(self.total)), rows)

    @functools.cached_property
    def whole_rows(self) -> Spans:
        """For R x C queries in reading order: their row."""
        return _runs(self.total, self._of_rows())

    def _of_rows(self) -> tuple[Array, Array]:
        first = self.column == 0
        return np.repeat(self.start[first], self.columns), np.repeat(self.end[first], self.columns)

    @functools.cached_property
    def rows_before(self) -> Spans:
        """By column, of C x R keys: those of the own column in earlier rows."""
        low = self.column * self.rows
        return _runs(self.rows * self.columns, (low[self.order], (low + self.row)[self.order]))


def _runs(total: int, *runs: tuple[Array, Array]) -> Spans:
    """Runs (low, high) of every query, each (L,), over ``total`` keys."""
    low, high = (np.stack([run[side] for run in runs], 1) for side in (0, 1))
    return spans(low, np.maximum(low, high), total)


@functools.lru_cache(maxsize=64)
def cells(length: int, block: int | None) -> Cells:
    return Cells(length, block)


def seen_by(q: Tensor, k: Tensor, v: Tensor, runs: Spans) -> tuple[Tensor, Tensor]:
    """Outputs and log sums of queries that are scaled already."""
    return window_attention(q, k, v, runs, scale=1.0)


def joint(near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor], grid: Cells) -> Tensor:
    """One softmax over what is seen in reading order and, sorted by column, down the columns."""
    out, logs = grid.back(*far)
    return merged(near, (out, logs))[0]


def regions(tokens: Tokens, grid: Cells, pool: str) -> tuple[Tensor, Tensor]:
    """The key and value (B, R, H, D) of every row as a region."""
    asker = grid.pooled(tokens.asked, pool)
    return grid.pooled(tokens.offered, pool), seen_by(asker, tokens.k, tokens.v, grid.each_row)[0]


def fixed(tokens: Tokens, grid: Cells, pool: str) -> tuple[Tensor, Tensor, Tensor]:
    """Also the regions' keys and values, which a stream keeps."""
    keys, values = regions(tokens, grid, pool)
    k, v = torch.cat((tokens.k, keys), 1), torch.cat((tokens.v, values), 1)
    return seen_by(tokens.q, k, v, grid.own_and_rows)[0], keys, values


def vertical(tokens: Tokens, grid: Cells, pool: str) -> Tensor:
    q, k, v, asker = grid.down(*tokens[:3], grid.above(tokens.asked, pool))
    (values,) = grid.back(seen_by(asker, k, v, grid.before)[0])
    keys = torch.cat((tokens.k, grid.above(tokens.offered, pool)), 1)
    near = seen_by(tokens.q, keys, torch.cat((tokens.v, values), 1), grid.own_and_columns)
    return joint(near, seen_by(q, k, v, grid.before), grid)


def horizontal(tokens: Tokens, grid: Cells, pool: str) -> Tensor:
    values = seen_by(grid.rest(tokens.asked, pool).flatten(1, 2), tokens.k, tokens.v, grid.others)[0]
    keys, values = grid.by_column(grid.rest(tokens.offered, pool)), grid.by_column(grid.unflat(values))
    q, k, v = grid.down(*tokens[:3])
    far = seen_by(q, torch.cat((k, keys), 1), torch.cat((v, values), 1), grid.before_and_rows)
    return joint(seen_by(tokens.q, tokens.k, tokens.v, grid.own), far, grid)


def rowmajor(tokens: Tokens, grid: Cells, pool: str) -> Tensor:
    # In rows that are too short for a column nobody asks: a query of zeros shares alike.
    asker = grid.square(tokens.q, 0.0).flatten(1, 2)
    values = grid.by_column(grid.unflat(seen_by(asker, tokens.k, tokens.v, grid.whole_rows)[0]))
    keys = grid.pooled(tokens.offered, pool).repeat(1, grid.columns, 1, 1)
    (q,) = grid.down(tokens.q)
    far = seen_by(q, keys, values, grid.rows_before)
    return joint(seen_by(tokens.q, tokens.k, tokens.v, grid.own), far, grid)


def mixture(tokens: Tokens, grid: Cells, pool: str) -> Tensor:
    """The mean of the two axial plans: of their outputs, which is the paper's mixture, not one joint softmax."""
    return (vertical(tokens, grid, pool) + horizontal(tokens, grid, pool)) / 2


PLANS: dict[str, Callable[[Tokens, Cells, str], Tensor]] = {
    "fixed": lambda tokens, grid, pool: fixed(tokens, grid, pool)[0],
    "axial-vertical": vertical,
    "axial-horizontal": horizontal,
    "axial-rowmajor": rowmajor,
    "mixture": mixture,
}

#: The runs of each plan's calls, of the regions and of the tokens.
CALLS = {
    "fixed": ("each_row", "own_and_rows"),
    "axial-vertical": ("before", "own_and_columns", "before"),
    "axial-horizontal": ("others", "own", "before_and_rows"),
    "axial-rowmajor": ("whole_rows", "own", "rows_before"),
}


def pairs(plan: str, length: int, block: int | None) -> int:
    """Products of a query with a key, and as many of a weight with a value, of one head, where written out."""
    if plan == "mixture":
        return pairs("axial-vertical", length, block) + pairs("axial-horizontal", length, block)
    grid = cells(length, block)
    return sum(getattr(grid, name).pairs(1) for name in CALLS[plan]) if length else 0
