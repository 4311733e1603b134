"""The two layouts of recurrent ops: rows padded on the right, or documents end to end.

Padded tensors are (B, L, ...) with ``lengths`` (B,) valid tokens each, packed ones (1, T, ...) with ``offsets`` (S+1,).
Whatever is remembered has one entry a row: B of them, or S.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from formwright.kit.errors import SpecError


def row_count(x: Tensor, offsets: Tensor | None) -> int:
    """Rows of padded ``x`` (B, L, ...), or documents of a packed one."""
    return x.shape[0] if offsets is None else offsets.shape[0] - 1


#: Numbers of rows: a list for loops on the CPU, or a tensor on a device.
Numbers = TypeVar("Numbers", list[int], Tensor)
Tuple = TypeVar("Tuple", bound=Any)


@dataclass
class Rows(Generic[Numbers]):
    """Where rows begin among the B L tokens of a tensor, how many each has, and whether that makes all of them."""

    starts: Numbers
    lengths: Numbers
    full: bool

    @staticmethod
    def of(x: Tensor, lengths: Tensor | None, offsets: Tensor | None) -> Rows[list[int]]:
        """SpecError where ``lengths`` or ``offsets`` name tokens that ``x`` (B, L, ...) does not have."""
        if offsets is not None:
            borders = offsets.tolist()
            if borders != sorted(borders) or borders[:1] != [0] or borders[-1] != x.shape[1]:
                raise SpecError(f"offsets must rise from 0 to the {x.shape[1]} tokens of the packed row")
            return Rows(borders[:-1], [stop - start for start, stop in pairwise(borders)], True)
        count, length = x.shape[:2]
        each = [length] * count if lengths is None else lengths.tolist()
        if any(not 0 <= own <= length for own in each):
            raise SpecError(f"lengths must be 0 to {length}, the tokens that a row of this call has")
        return Rows([row * length for row in range(count)], each, lengths is None)

    @staticmethod
    def on_device(x: Tensor, lengths: Tensor | None, offsets: Tensor | None) -> Rows[Tensor]:
        """The same as int64 tensors beside ``x``. Nothing waits for a device to say what they hold, so numbers that do
        not fit are cut to the tokens that there are."""
        count, length = x.shape[:2]
        if offsets is not None:
            borders = offsets.to(x.device, torch.int64).clamp(0, length)
            return Rows(borders[:-1], borders.diff().clamp(min=0), True)
        starts = torch.arange(0, count * length, length, device=x.device)
        if lengths is None:
            return Rows(starts, torch.full_like(starts, length), True)
        return Rows(starts, lengths.to(x.device, torch.int64).clamp(0, length), False)

    def blank(self, like: Tensor, *more: int) -> Tensor:
        """Memory for a result of the shape of ``like`` (behind ``more`` axes): zero where some tokens are padding."""
        made = like.new_empty if self.full else like.new_zeros
        return made(*more, *like.shape)


def even(t: Tensor) -> Tensor:
    """(B, L, F) whose last axis is contiguous and whose tokens lie at one distance, across rows too."""
    even = t.shape[0] <= 1 or t.stride(0) == t.shape[1] * t.stride(1)
    return t if even and (t.stride(2) == 1 or t.shape[2] <= 1) else t.contiguous()


def laid_out(tensors: Tuple, strided: str) -> Tuple:
    """A named tuple of tensors: fields named in ``strided`` are :func:`even`, others contiguous, None stays."""
    given = {name: t for name, t in tensors._asdict().items() if t is not None}
    return tensors._replace(
        **{name: even(t) if name in strided.split() else t.contiguous() for name, t in given.items()}
    )


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
