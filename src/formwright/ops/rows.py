"""The two layouts of recurrent ops: rows padded on the right, or documents end to end.

Padded tensors are (B, L, ...) with ``lengths`` (B,) valid tokens each, packed ones (1, T, ...) with ``offsets`` (S+1,).
Whatever is remembered has one entry a row: B of them, or S.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from formwright.kit.errors import SpecError


def row_count(x: Tensor, offsets: Tensor | None) -> int:
    """Rows of padded ``x`` (B, L, ...), or documents of a packed one."""
    return x.shape[0] if offsets is None else offsets.shape[0] - 1


class Rows(NamedTuple):
    """Where rows begin among the B L tokens of a tensor, how many each has, and whether that makes all of them."""

    starts: list[int]
    lengths: list[int]
    full: bool

    @classmethod
    def of(cls, x: Tensor, lengths: Tensor | None, offsets: Tensor | None) -> Rows:
        if offsets is not None:
            borders = offsets.tolist()
            if borders != sorted(borders) or borders[:1] != [0] or borders[-1] != x.shape[1]:
                raise SpecError(f"offsets must rise from 0 to the {x.shape[1]} tokens of the packed row")
            return cls(borders[:-1], [stop - start for start, stop in pairwise(borders)], True)
        count, length = x.shape[:2]
        each = [length] * count if lengths is None else lengths.tolist()
        if any(not 0 <= own <= length for own in each):
            raise SpecError(f"lengths must be 0 to {length}, the tokens that a row of this call has")
        return cls([row * length for row in range(count)], each, lengths is None)

    def blank(self, like: Tensor, *more: int) -> Tensor:
        """Memory for a result of the shape of ``like`` (behind ``more`` axes): zero where some tokens are padding."""
        made = like.new_empty if self.full else like.new_zeros
        return made(*more, *like.shape)


def valid(x: Tensor, lengths: Tensor) -> Tensor:
    """(B, L) bool: which tokens of padded ``x`` are real."""
    return torch.arange(x.shape[1], device=x.device)[None] < lengths[:, None]


def clear(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Padded ``x`` with zeros in the padding, whatever stood there."""
    if lengths is None:
        return x
    return x.masked_fill(~valid(x, lengths).reshape(*x.shape[:2], *[1] * (x.dim() - 2)), 0.0)


def unpack(x: Tensor, offsets: Tensor) -> Tensor:
    """Packed (1, T, ...) -> padded (S, longest document, ...); the padding repeats other tokens."""
    sizes = offsets.diff()
    longest = int(sizes.max()) if len(sizes) else 0
    index = offsets[:-1, None] + torch.arange(longest, device=x.device)[None]
    return x[0][index.clamp(max=max(x.shape[1] - 1, 0))]


def repack(x: Tensor, offsets: Tensor) -> Tensor:
    """Padded (S, longest document, ...) -> packed (1, T, ...)."""
    return x[valid(x, offsets.diff())][None]


def check_rows(op: str, x: Tensor, lengths: Tensor | None, offsets: Tensor | None, kept: Tensor | None) -> None:
    """Complain where the layout of ``x`` or the rows of what is remembered do not fit."""
    if offsets is not None and (lengths is not None or x.shape[0] != 1):
        raise SpecError(f"{op}: offsets are for one packed row (1, T, ...) without lengths, not for {tuple(x.shape)}")
    if lengths is not None and lengths.shape != x.shape[:1]:
        raise SpecError(f"{op}: lengths has shape {tuple(lengths.shape)}, but there are {x.shape[0]} rows")
    rows = row_count(x, offsets)
    if kept is not None and kept.shape[0] != rows:
        raise SpecError(f"{op}: the initial state has {kept.shape[0]} rows, but the input has {rows}")
