"""Combiner-Fixed call by call: the tokens of the current block, and a key and a value for every finished one.

Exactly what one pass gives, for rows that stand at different places. A short call makes scores for its new tokens only,
so a step costs O(block + L / block).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from formwright.ops.combiner import runs
from formwright.ops.combiner.grid import Grid, Group, Tokens, attend
from formwright.ops.combiner.plans import Laid, blocks, other_blocks


class Call(NamedTuple):
    """Where a call stands: tokens ``seen`` before it (B,), ``new`` ones (B,), tokens of a block."""

    seen: Tensor
    new: Tensor
    block: int

    @property
    def finished(self) -> Tensor:
        """Blocks that each row finishes in this call."""
        return (self.seen + self.new) // self.block - self.seen // self.block

    def rows(self) -> int:
        """Blocks that this call touches, the current one included, of the row that touches most."""
        after = self.seen + self.new
        touched = (after + self.block - 1) // self.block - self.seen // self.block
        return max(1, int(touched.max())) if len(touched) else 1


def fixed_start(tokens: Tokens, block: int, pool: str) -> tuple[Tensor, Tensor, Tensor]:
    """A stream's first call, tokens (B, L, H, D) that begin in the first column: as :func:`fixed_stream` gives it."""
    length = tokens.q.shape[1]
    cells = runs.cells(length, block)
    out, keys, values = runs.fixed(tokens.each(cells.filled), cells, pool)
    return out[:, :length], keys, values


def fixed_stream(
    near: Tokens,
    past: tuple[Tensor, Tensor],
    call: Call,
    length: int,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs (B, length, H, D) of a call's tokens, and keys and values (B, R, H, D) of the blocks it touches.

    near (B, S, H, D): the current block's tokens and then the new ones, the last of every row in the last column.
    past: keys and values (B, N, H, D) of the blocks finished before, aligned on the right as well.
    """
    width = near.q.shape[1]
    cells = _cells(call, call.rows(), width, length)
    laid = Laid(near.each(cells.lay), cells.valid, True, pool)
    keys, values = blocks(laid)
    held = torch.arange(past[0].shape[1], device=call.seen.device) - past[0].shape[1]
    before = (held >= -(call.seen // call.block)[:, None])[:, None, None, None]
    finished = Group(past[0].transpose(1, 2), past[1].transpose(1, 2), lambda _: before, "all", "all")
    if length > call.block:
        out = cells.read(attend(laid.tokens.q, [laid.own_row(), other_blocks(laid, keys, values), finished]))
    else:
        out = _short(laid, (keys, values), finished, cells)
    return out, keys.transpose(1, 2), values.transpose(1, 2)


def _cells(call: Call, rows: int, width: int, length: int) -> Grid:
    """The grid that begins with each row's current block; ``cell`` is that of each new token."""
    begun = call.seen % call.block  # tokens of the current block that came before
    columns = call.block if rows > 1 else min(call.block, width)
    total = (begun + call.new)[:, None]
    steps = torch.arange(rows * columns, device=call.seen.device)[None]
    place = (width - total + steps).clamp(0, max(width - 1, 0))
    valid = (steps < total).unflatten(1, (rows, columns))
    cell = begun[:, None] + torch.arange(length, device=call.seen.device)
    return Grid(valid, length, place, cell.clamp(max=rows * columns - 1))


def _short(
    laid: Laid,
    regions: tuple[Tensor, Tensor],
    finished: Group,
    cells: Grid,
) -> Tensor:
    """Scores of the new tokens alone: they stand in one row of their own, and see the cells of the grid."""
    assert cells.cell is not None
    rows, columns = cells.valid.shape[1:]
    q = cells.read(laid.tokens.q).transpose(1, 2)[:, :, None]
    own, steps = cells.cell[:, :, None], torch.arange(rows * columns, device=laid.tokens.q.device)
    near = (steps // columns == own // columns) & (steps <= own) & cells.valid.flatten(1)[:, None]
    regions_before = torch.arange(rows, device=laid.tokens.q.device) < own // columns
    groups = [
        Group(laid.tokens.k.flatten(2, 3), laid.tokens.v.flatten(2, 3), lambda _: near[:, None, None], "all", "all"),
        Group(*regions, lambda _: regions_before[:, None, None], "all", "all"),
        finished,
    ]
    return attend(q, groups).squeeze(2).transpose(1, 2)
