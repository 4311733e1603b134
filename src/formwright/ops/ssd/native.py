"""The state-space dual by the compiled kernels: float32 on the CPU, forward and backward; see ``native.cpp``."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from formwright.ops import native

#: Largest P N of a head whose states stay in the second-level cache.
WIDEST = 256 * 256
#: Slices of heads at most that leave gradients of B and C of their own; as many threads can work on one row.
SLICES = 8

_FLOATS = ("y", "final", "blocks", "states", "dblocks", "dx", "ddt", "dA", "dB", "dC", "dD", "dstart")


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, native.Tokens) for name in ("x", "dt", "B", "C", "dy")),
        *((name, c_void_p) for name in ("A", "D", "start", "dfinal", "resets", *_FLOATS)),
        *((name, c_int64) for name in ("rows", "length", "heads", "groups", "width", "size", "slices")),
    )


class _Run:
    """One call of the kernels: its struct and whatever its pointers point to."""

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, start: Tensor | None,
        resets: Tensor | None,
    ) -> None:  # fmt: skip
        rows, length, heads, width = x.shape
        groups, size = B.shape[2:]
        self.slices = min(heads // groups, -(-SLICES // max(rows * groups, 1)))
        self.call = _Call(
            rows=rows, length=length, heads=heads, groups=groups, width=width, size=size, slices=self.slices
        )
        resets = None if resets is None else resets.expand(rows, length)
        x, B, C = (t.flatten(2) for t in (x, B, C))
        self.held = native.give(self.call, x=x, dt=dt, A=A, B=B, C=C, D=D, start=start, resets=resets)

    def give(self, **tensors: Tensor | None) -> None:
        self.held += native.give(self.call, **tensors)

    def __call__(self, name: str) -> None:
        getattr(native.library(), name)(ctypes.byref(self.call), torch.get_num_threads())


class Compiled:
    """The form by the compiled kernels."""

    @staticmethod
    def takes(*tensors: Tensor | None) -> bool:
        """Whether plain pointers to all of these may be handed over; a wanted gradient is no hindrance."""
        return native.usable(*(t.detach() for t in tensors if t is not None))

    @staticmethod
    def suits(x: Tensor, B: Tensor) -> bool:
        """Whether heads of these sizes are faster here."""
        return x.shape[-1] * B.shape[-1] <= WIDEST

    @staticmethod
    def forward(*given: Any, keep: bool) -> tuple[Tensor, ...]:
        """y and the final state; with ``keep``, chunks of B, C and scores, and the states before every chunk."""
        (x, _, _, B, *_), run = given, _Run(*given)
        (rows, length, heads, width), (groups, size) = x.shape, B.shape[2:]
        y, final = x.new_empty(x.shape), x.new_empty(rows, heads, width, size)
        run.give(y=y, final=final)
        if length == 1 and not keep:
            run("fw_ssd")
            return y, final
        chunk = native.library().fw_ssd_chunk()
        chunks, wide, deep = -(-length // chunk), -(-width // 16) * 16, -(-size // 16) * 16
        blocks = x.new_empty(rows, groups, chunks, chunk, 2 * deep + chunk)
        states = x.new_empty(rows, heads, chunks, deep, wide) if keep else None
        run.give(blocks=blocks, states=states)
        run("fw_ssd")
        return (y, final) if states is None else (y, final, blocks, states)

    @staticmethod
    def backward(dy: Tensor, dfinal: Tensor | None, *tensors: Any) -> tuple[Tensor, ...]:
        """Gradients of x, Δ, A, B, C, D and the start, from those of y and the final state; tensors: given and kept."""
        *given, blocks, states = tensors
        (x, dt, _, B, *_), run = given, _Run(*given)
        (rows, _, heads, width), size = x.shape, B.shape[3]
        dx, ddt, dB, dC = (x.new_empty(t.shape) for t in (x, dt, B, B))
        dA, dD = x.new_empty(rows, heads), x.new_empty(rows, heads)
        dstart = x.new_empty(rows, heads, width, size)
        run.give(dy=dy.flatten(2), dfinal=dfinal, blocks=blocks, states=states)
        run.give(dblocks=x.new_empty(run.slices, *blocks.shape))
        run.give(dx=dx, ddt=ddt, dA=dA, dB=dB, dC=dC, dD=dD, dstart=dstart)
        run("fw_ssd_backward")
        return dx, ddt, dA.sum(0), dB, dC, dD.sum(0), dstart
