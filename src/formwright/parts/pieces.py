"""A long text in pieces: a mixer that streams reads it as a stream of its own inside one pass.

What a mixer makes on its way (projections, features, convolved tokens) is several times its input. For a text of many
thousand tokens that is more than the caches hold, and memory that the system hands out page by page at every call. A
piece at a time, all of it stays where the last piece had it, and only the output is as long as the text. The result is
that of one pass, since any split of a stream is.

Where a gradient is wanted, every token's values are kept anyway, so there the text stays whole; as it does where
somebody looks at what happens inside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from formwright.ops.native import watched
from formwright.parts.base import hooked
from formwright.parts.context import Context, StateLike

#: Tokens of a piece, of all rows together, and of one row at least: a multiple of every chunk that an op works in.
PIECE, LEAST = 1024, 256

Run = TypeVar("Run", bound=Callable[..., Tensor])


def piece_of(x: Tensor, longer: int = 1) -> int:
    """Tokens of a piece of x (B, L, ...), ``longer`` times the usual, or 0 where it stays whole: it is short, a
    gradient is wanted, or somebody traces or counts."""
    if torch.is_grad_enabled() or watched():
        return 0
    rows, length = x.shape[:2]
    size = max(LEAST, longer * PIECE // max(rows, 1) // LEAST * LEAST)
    return size if length > 2 * size else 0


def pieced(run: Run, longer: int = 1) -> Run:
    """For a method ``run(part, *tensors, ctx)`` whose part streams through ``ctx.slot`` and ``ctx.keep`` alone, tensors
    and result being (B, L, ...): the same, with long rows taken piece by piece. ``longer`` times the usual pieces suit
    a part that makes something anew for each."""

    @functools.wraps(run)
    def whole(part: Any, *given: Any) -> Tensor:
        *tensors, ctx = given
        size = piece_of(tensors[0], longer)
        if not size or not part.traits.streams or not unseen(part, ctx):
            return run(part, *given)
        return joined(functools.partial(run, part), tensors, ctx, size)

    return whole  # type: ignore[return-value]


def unseen(part: Any, ctx: Context) -> bool:
    """Whether nobody could tell that ``part`` and what it holds are called several times: padded rows, nothing drawn,
    noted or hooked into, and no slot that answers by all tokens of a call."""
    if part.training or ctx.offsets is not None or ctx.notes is not None or not ctx.visible.simple:
        return False
    return not any(hooked(module) or not getattr(module, "by_token", True) for module in part.modules())


def joined(run: Callable[..., Tensor], tensors: list[Tensor], ctx: Context, size: int) -> Tensor:
    """``run(*tensors, ctx)``, ``size`` tokens of each row at a time."""
    length, kept = tensors[0].shape[1], Kept(ctx.state)
    out = None
    for piece, inner in contexts(tensors[0], ctx.replace(state=kept), size):
        made = run(*(t[:, piece] for t in tensors), inner)
        out = made.new_empty(len(made), length, *made.shape[2:]) if out is None else out
        out[:, piece] = made
    assert out is not None
    kept.leave()
    return out


def contexts(x: Tensor, ctx: Context, size: int) -> Iterator[tuple[slice, Context]]:
    """(its tokens, its context) of every piece of the padded rows ``x``."""
    length = x.shape[1]
    for start in range(0, length, size):
        piece = slice(start, min(start + size, length))
        left = None if ctx.lengths is None else (ctx.lengths - start).clamp(0, piece.stop - start)
        found = {name: getattr(ctx, name) for name in ("positions", "origin", "coords")}
        places = {name: None if value is None else value[:, piece] for name, value in found.items()}
        yield piece, ctx.replace(lengths=left, marks={name: m[:, piece] for name, m in ctx.marks.items()}, **places)


class Kept:
    """What passes from piece to piece: over a stream's own state, which moves only when all pieces are through."""

    def __init__(self, state: StateLike | None) -> None:
        self.state = state
        self.values: dict[str, Tensor] = {}

    def get(self, key: str) -> Tensor | None:
        if key in self.values or self.state is None:
            return self.values.get(key)
        return self.state.get(key)

    def put(self, key: str, value: Tensor) -> None:
        self.values[key] = value

    def leave(self) -> None:
        """Hand everything to the stream, where there is one."""
        if self.state is not None:
            for key, value in self.values.items():
                self.state.put(key, value)
