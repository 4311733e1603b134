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
from formwright.ops.attention.native import Call, Heads

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
    _fields_ = (*((name, c_void_p) for name in ("residual", "gain", "shift")), ("eps", c_float))


@functools.lru_cache(maxsize=1)
def _library() -> Any:
    """The library with the types of what is called for every layer, which ctypes then converts by itself."""
    made, weight, tail = native.library(), ctypes.POINTER(_Weight), ctypes.POINTER(_Tail)
    made.fw_int8_linear.argtypes = (weight, c_int64, c_void_p, c_int64, ctypes.POINTER(c_void_p), tail, c_int, c_int)
    made.fw_int8_mlp.argtypes = (weight, weight, c_void_p, c_int64, c_void_p, tail, c_int, c_int)
    made.fw_int8_attention.argtypes = (
        weight, weight, ctypes.POINTER(Call), c_void_p, c_int64, c_void_p, c_void_p, tail, c_int,
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
    _library().fw_int8_linear(
        held, count, x.data_ptr(), rows, pointers, _tail(tail), ACTIVATIONS["none"], torch.get_num_threads()
    )
    return found


def mlp(x: Tensor, up: Term, down: Term, activation: str, tail: Tail | None = None) -> Tensor:
    """down(activation(up(x))) for x (T, K) contiguous; a block of rows' hidden values never leave the cache."""
    y = x.new_empty(x.shape[0], down.out)
    _library().fw_int8_mlp(
        up.pointers, down.pointers, x.data_ptr(), x.shape[0], y.data_ptr(),
        _tail(tail), ACTIVATIONS[activation], torch.get_num_threads(),
    )  # fmt: skip
    return y


def attention(x: Tensor, projections: Sequence[Term], out: Term, heads: Heads, tail: Tail | None = None) -> Tensor:
    """out(softmax(q k^T) v) for x (T, K) contiguous and the terms of q, k and v."""
    q, k = projections[0].out, projections[1].out
    shape = heads.call(q // heads.width, k // heads.width)
    room, y = x.new_empty(2 * x.shape[0] * (q + k)), x.new_empty(x.shape[0], out.out)
    _library().fw_int8_attention(
        (_Weight * 3)(*[term.pointers for term in projections]), out.pointers, shape,
        x.data_ptr(), x.shape[0], room.data_ptr(), y.data_ptr(), _tail(tail), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _tail(tail: Tail | None) -> _Tail:
    if tail is None:
        return _Tail(None, None, None, 0.0)
    return _Tail(tail.residual.data_ptr(), _pointer(tail.gain), _pointer(tail.shift), tail.eps)
