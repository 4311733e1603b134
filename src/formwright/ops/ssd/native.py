"""The state-space dual by the compiled kernels: float32 on the CPU, forward and backward; see ``native.cpp``."""

from __future__ import annotations

from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.ops import native
from formwright.ops.ssd.documents import begins

#: Largest P N of a head whose states stay in the second-level cache.
WIDEST = 256 * 256
#: Slices of heads at most that leave gradients of B and C of their own; as many threads can work on one row.
SLICES = 8

_FLOATS = ("y", "final", "blocks", "states", "dblocks", "dx", "ddt", "dA", "dB", "dC", "dD", "dstart")


class _Call(native.Call):
    _fields_ = (
        *((name, native.Tokens) for name in ("x", "dt", "B", "C", "dy")),
        *((name, c_void_p) for name in ("A", "D", "start", "dfinal", "resets", "borders", "firsts", *_FLOATS)),
        *((name, c_int64) for name in ("rows", "length", "heads", "groups", "width", "size", "slices")),
    )

    @classmethod
    def of(
        cls, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, start: Tensor | None,
        resets: Tensor | None,
    ) -> _Call:  # fmt: skip
        rows, length, heads, width = x.shape
        groups, size = B.shape[2:]
        slices = min(heads // groups, -(-SLICES // max(rows * groups, 1)))
        call = cls(rows=rows, length=length, heads=heads, groups=groups, width=width, size=size, slices=slices)
        call.give(x=x.flatten(2), dt=dt, A=A, B=B.flatten(2), C=C.flatten(2), D=D, start=start)
        call.give(resets=None if resets is None else resets.expand(rows, length))
        return call


class Compiled:
    """The form by the compiled kernels."""

    q = 0  # a document begins a chunk, wherever that is

    @staticmethod
    def takes(*tensors: Tensor | None) -> bool:
        """Whether plain pointers to all of these may be handed over; a wanted gradient is no hindrance."""
        return native.reachable(*tensors)

    @staticmethod
    def suits(x: Tensor, B: Tensor) -> bool:
        """Whether heads are no wider than what was measured: up to there this form was 2.2 to 6 times as fast as the
        chunked one, at every length from 1 to 4096."""
        return x.shape[-1] * B.shape[-1] <= WIDEST

    @staticmethod
    def forward(*given: Any, keep: bool) -> tuple[Tensor, ...]:
        """y and the final state; with ``keep``, chunks of B, C and scores, the states before every chunk, and where
        chunks begin."""
        (x, _, _, B, *_, resets), call = given, _Call.of(*given)
        (rows, length, heads, width), (groups, size) = x.shape, B.shape[2:]
        y, final = x.new_empty(x.shape), x.new_empty(rows, heads, width, size)
        call.give(y=y, final=final)
        if length == 1 and not keep:
            call.run("fw_ssd")
            return y, final
        chunk = native.library().fw_ssd_chunk()
        borders, firsts = _chunks(rows, length, resets, chunk)
        chunks, wide, deep = len(borders) - 1, -(-width // 16) * 16, -(-size // 16) * 16
        blocks = x.new_empty(chunks, groups, chunk, 2 * deep + chunk)
        states = x.new_empty(chunks, heads, deep, wide) if keep else None
        call.give(borders=borders, firsts=firsts, blocks=blocks, states=states)
        call.run("fw_ssd")
        return (y, final) if states is None else (y, final, blocks, states, borders, firsts)

    @staticmethod
    def backward(dy: Tensor, dfinal: Tensor | None, *tensors: Any) -> tuple[Tensor, ...]:
        """Gradients of x, Δ, A, B, C, D and the start, from those of y and the final state; tensors: given and kept."""
        *given, blocks, states, borders, firsts = tensors
        (x, dt, _, B, *_), call = given, _Call.of(*given)
        (rows, _, heads, width), size = x.shape, B.shape[3]
        dx, ddt, dB, dC = (x.new_empty(t.shape) for t in (x, dt, B, B))
        dA, dD = x.new_empty(rows, heads), x.new_empty(rows, heads)
        dstart = x.new_empty(rows, heads, width, size)
        call.give(dy=dy.flatten(2), dfinal=dfinal, borders=borders, firsts=firsts, blocks=blocks, states=states)
        call.give(dblocks=x.new_empty(call.slices, *blocks.shape))
        call.give(dx=dx, ddt=ddt, dA=dA, dB=dB, dC=dC, dD=dD, dstart=dstart)
        call.run("fw_ssd_backward")
        return dx, ddt, dA.sum(0), dB, dC, dD.sum(0), dstart


def _chunks(rows: int, length: int, resets: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """Tokens of all rows at which chunks begin, and how many tokens there are (chunks + 1); chunks before each row, and
    how many there are (rows + 1)."""
    if resets is None:  # lists, since five small operations of PyTorch would cost a short call a tenth of its time
        borders = [row * length + at for row in range(rows) for at in range(0, length, chunk)]
        each = -(-length // chunk)
        return torch.tensor([*borders, rows * length]), torch.tensor([row * each for row in range(rows + 1)])
    found = begins(resets.expand(rows, length), chunk)
    return F.pad(found.flatten(), (0, 1), value=True).nonzero()[:, 0], F.pad(found.sum(1).cumsum(0), (1, 0))
