"""8-bit linears by the compiled kernels: quantising, products, bias, kept columns, activation, residual and norm in one
pass; see ``native.cpp``. Integers are those of the definition at 127 levels on every instruction set."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from formwright.ops import native
from formwright.ops.attention.native import Call, Heads, documents

#: Activations that are applied to a product while it is in registers, by the library's numbers.
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu-tanh": 2, "relu": 3, "silu": 4}


class Tail(NamedTuple):
    """The rest of a residual sublayer: ``residual + y``, normalised where there is a ``gain``."""

    residual: Tensor
    gain: Tensor | None = None
    shift: Tensor | None = None
    eps: float = 0.0


class _Weight(ctypes.Structure):
    _fields_ = (
        ("out", c_int64),
        ("in_", c_int64),
        *((name, c_void_p) for name in ("packed", "scale", "bias")),
        ("outliers", c_int64),
        *((name, c_void_p) for name in ("columns", "kept")),
    )


class _Tail(ctypes.Structure):
    _fields_ = (("residual", c_void_p), ("norm", native.Norm))


class _Step(ctypes.Structure):
    _fields_ = (
        ("weights", _Weight * 4),
        ("norm", native.Norm),
        *((name, c_int64) for name in ("heads", "groups", "width")),
        ("scale", c_float),
        *((name, c_int) for name in ("causal", "rounded", "activation", "joins", "before")),
    )


@functools.lru_cache(maxsize=1)
def _library() -> Any:
    """The library with the types of what is called for every layer, which ctypes then converts by itself."""
    made, weight, tail = native.library(), ctypes.POINTER(_Weight), ctypes.POINTER(_Tail)
    made.fw_int8_linear.argtypes = (weight, c_int64, c_void_p, c_int64, ctypes.POINTER(c_void_p), tail, c_int)
    made.fw_int8_steps.argtypes = (
        ctypes.POINTER(_Step), c_int64, ctypes.POINTER(Call), c_void_p, c_int64, c_void_p, c_void_p, c_int,
    )  # fmt: skip
    return made


class NativeWeight:
    """A weight q_w (O, K) int8 with steps (O,) laid out for the kernels of the instruction set in use."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.out, self.in_ = weight.shape
        made, shape = native.library(), (c_int64(self.out), c_int64(self.in_))
        self.packed = torch.empty(made.fw_int8_packed_bytes(*shape), dtype=torch.int8)
        source = weight.contiguous()
        made.fw_int8_pack(c_void_p(source.data_ptr()), *shape, c_void_p(self.packed.data_ptr()))
        self.scale = scale.float().contiguous()


class Term:
    """A weight with its bias (O,) and the float weights (n, O) of the ``outliers`` (n,) among the inputs, as pointers
    to memory that it keeps alive."""

    __slots__ = ("bias", "held", "out", "pointers")

    def __init__(
        self,
        weight: NativeWeight,
        bias: Tensor | None = None,
        outliers: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> None:
        self.out, self.bias, self.held = weight.out, _pointer(bias), (weight, bias, outliers, columns)
        self.pointers = _Weight(
            weight.out, weight.in_, weight.packed.data_ptr(), weight.scale.data_ptr(), self.bias,
            0 if outliers is None else len(outliers), _pointer(outliers), _pointer(columns),
        )  # fmt: skip


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def linear(x: Tensor, terms: Sequence[Term], tail: Tail | None = None) -> list[Tensor]:
    """x (T, K) contiguous -> (T, O) for each of the terms, which have the same outliers; ``tail`` for a single one."""
    count, rows = len(terms), x.shape[0]
    held = (_Weight * count)(*[term.pointers for term in terms])
    found = [x.new_empty(rows, term.out) for term in terms]
    pointers = (c_void_p * count)(*[y.data_ptr() for y in found])
    _library().fw_int8_linear(held, count, x.data_ptr(), rows, pointers, _tail(tail), torch.get_num_threads())
    return found


class Norm(NamedTuple):
    """The LayerNorm of a sublayer, by its gain (W,), shift (W,) and epsilon: it ends it, or comes ``before`` it."""

    gain: Tensor
    shift: Tensor | None
    eps: float
    before: bool = False


class Step:
    """A whole sublayer for the compiled kernels, over rows x (..., W) -> (..., W).

    Attention where ``heads`` are given, with the terms of q, k, v and o; otherwise ``activation`` between the terms of
    up and down. ``joins``: the residual is added. ``key`` says what it was made of.
    """

    __slots__ = ("call", "held", "key", "mixes", "out", "reads")

    def __init__(
        self,
        key: Any,
        terms: Sequence[Term],
        norm: Norm | None,
        *,
        joins: bool = True,
        heads: Heads | None = None,
        activation: str = "none",
    ) -> None:
        self.key, self.out = key, terms[-1].out
        # A detached tensor keeps its memory, so that nothing else can come to stand at an address in the key.
        gain, shift = (None if norm is None or t is None else t.detach() for t in (norm or (None, None))[:2])
        self.held = (*terms, gain, shift)
        width, scale, causal, rounded = heads or Heads(1, 1.0, False)
        sizes = [term.out // width for term in terms[:2]] if heads else [0, 0]
        #: Values a row that its attention mixes, and of the queries, keys and values that it reads.
        self.mixes, self.reads = width * sizes[0], width * (sizes[0] + 2 * sizes[1])
        eps, before = (0.0, False) if norm is None else norm[2:]
        self.call = _Step(
            (_Weight * 4)(*[term.pointers for term in terms]), native.Norm.of(gain, shift, eps), *sizes, width, scale,
            causal, rounded, ACTIVATIONS[activation], joins, before,
        )  # fmt: skip

    @staticmethod
    def takes(x: Tensor) -> bool:
        """Whether steps run on this tensor now."""
        return native.usable(x) and x.numel() > 0

    @staticmethod
    def run(steps: Sequence[Step], x: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
        """x (..., W) through ``steps`` one after another; steps that attend do so within ``spans``, the documents of
        the rows in order."""
        x, rows = x.contiguous(), x.numel() // x.shape[-1]
        room = x.new_empty(rows * (max(step.mixes for step in steps) + max(step.reads for step in steps)))
        y = x.new_empty(*x.shape[:-1], steps[-1].out)
        _library().fw_int8_steps(
            (_Step * len(steps))(*[step.call for step in steps]), len(steps), documents(spans),
            x.data_ptr(), rows, room.data_ptr(), y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return y


def _tail(tail: Tail | None) -> _Tail:
    if tail is None:
        return _Tail(None, native.Norm.of())
    return _Tail(tail.residual.data_ptr(), native.Norm.of(*tail[1:]))
