"""Weight tables: what a tensor is called here and there, written once and used in both directions.

A row pairs our name pattern with the published one. ``{i}`` stands for the layer, ``{p}`` for the prefix that a body
has inside a model with a head (``bert.``), and a final ``*`` for weight and bias. Where layouts differ the row names a
:class:`Change`, which knows both ways. A row whose tensors a model does not have (a bias it was built without) is
skipped, so that one table serves all configurations of a family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = list[Tensor]


@dataclass(frozen=True)
class Change:
    """Two functions between lists of tensors, each the other's inverse; they run on meta tensors, too."""

    to_ours: Callable[[Tensors], Tensors]
    to_theirs: Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Row:
    """Tensors ``ours`` are tensors ``theirs`` after ``change``."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    change: Change


def _turn(t: Tensor) -> Tensor:
    return t.t() if t.dim() == 2 else t


def _same(tensors: Tensors) -> Tensors:
    return tensors


def _turned(tensors: Tensors) -> Tensors:
    return [_turn(t) for t in tensors]


#: Nothing to do.
SAME = Change(_same, _same)
#: A matrix stored (in, out); a bias stays as it is.
TRANSPOSED = Change(_turned, _turned)
#: One leading axis of size 1 more on their side.
LIFTED = Change(lambda ts: [t[0] for t in ts], lambda ts: [t[None] for t in ts])


def fused(count: int, transposed: bool = False) -> Change:
    """``count`` equal projections stored one below the other as one."""

    def to_ours(tensors: Tensors) -> Tensors:
        whole = _turn(tensors[0]) if transposed else tensors[0]
        return list(whole.chunk(count, 0))

    def to_theirs(tensors: Tensors) -> Tensors:
        whole = torch.cat(tensors, 0)
        return [_turn(whole) if transposed else whole]

    return Change(to_ours, to_theirs)


def convolved(channels: int, side: int) -> Change:
    """A convolution over patches (W, C, p, p), here a matrix (W, C p p)."""
    return Change(
        lambda ts: [t.flatten(1) for t in ts], lambda ts: [t.reshape(t.shape[0], channels, side, side) for t in ts]
    )


def stacked(count: int) -> Change:
    """``count`` vectors (1, 1, W) that are the rows of one table (count, W) here."""
    return Change(
        lambda ts: [torch.cat([t.reshape(1, -1) for t in ts], 0)],
        lambda ts: [ts[0][index].reshape(1, 1, -1) for index in range(count)],
    )


def _names(pattern: str | tuple[str, ...]) -> tuple[str, ...]:
    return (pattern,) if isinstance(pattern, str) else tuple(pattern)


def table(*lines: tuple) -> tuple[Row, ...]:
    """Rows from (ours, theirs) or (ours, theirs, change); either side is a pattern or a tuple of patterns."""
    rows = []
    for line in lines:
        ours, theirs = _names(line[0]), _names(line[1])
        change = line[2] if len(line) > 2 else SAME
        endings = ("weight", "bias") if ours[0].endswith("*") else ("",)
        for ending in endings:
            rows.append(
                Row(
                    tuple(name.removesuffix("*") + ending for name in ours),
                    tuple(name.removesuffix("*") + ending for name in theirs),
                    change,
                )
            )
    return tuple(rows)


def bind(rows: Iterable[Row], prefix: str, known: Iterable[str]) -> list[Row]:
    """The rows written out for a model whose tensors are ``known``: every layer, the prefix filled in."""
    known = set(known)
    layers = 1 + max((int(n) for name in known for n in re.findall(r"(?:^|\.)b(\d+)\.", name)), default=-1)
    found = []
    for row in rows:
        for index in range(layers) if any("{i}" in name for name in row.ours) else (0,):
            ours = tuple(name.replace("{i}", str(index)) for name in row.ours)
            if all(name in known for name in ours):
                theirs = tuple(name.replace("{i}", str(index)).replace("{p}", prefix) for name in row.theirs)
                found.append(Row(ours, theirs, row.change))
    return found


def knows(rows: Iterable[Row], prefix: str, name: str) -> bool:
    """Whether ``name`` is a published name of one of the rows, in any layer."""
    for row in rows:
        for pattern in row.theirs:
            written = re.escape(pattern.replace("{p}", prefix).replace("{i}", "\0")).replace("\0", r"\d+")
            if re.fullmatch(written, name):
                return True
    return False
