"""One token of neighbouring Mamba layers, from the first norm to the last sum with the stream, in one call.

The same mathematics as a pass of a single token through the part's own pieces, which stay the definition: for a few
rows its time is that of reading the weights, and a call for each piece would take longer than that. ``native`` shares
the four passes over a layer's weights among threads. Gu and Dao, "Mamba", 2023 (2312.00752). Cost: one
multiply-accumulate a weight and row, and about 9 operations a row, channel and state.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from formwright.ops import native
from formwright.registry import Paper, register

__all__ = ["MOST", "Layer", "Memory", "Weights", "mamba_step"]

#: Rows above which products of matrices are faster.
MOST = 8


class Weights(NamedTuple):
    """norm (W,), in (2 E, W), conv (E, K), x (rank + 2 N, E), dt (E, rank), dt_bias and D (E,), A_log (E, N) and out
    (W, E).

    The norm is the gain of an RMSNorm before the layer, or None. The projections have no bias but those in, out and of
    the convolution.
    """

    norm: Tensor | None
    in_weight: Tensor
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    x: Tensor
    dt: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    out_weight: Tensor
    out_bias: Tensor | None


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in Weights._fields),
        *((name, c_int64) for name in ("width", "inner", "states", "taps", "rank")),
        ("eps", c_float),
        ("joins", c_int),
    )


class Layer:
    """A layer for the compiled kernels: pointers to its weights, whose memory it keeps.

    ``eps`` is that of the norm; with ``joins`` the stream is added to what the layer makes of it. ``key`` says what it
    was made of.
    """

    __slots__ = ("address", "call", "held", "key", "memory", "window")

    def __init__(self, weights: Weights, eps: float, joins: bool) -> None:
        self.key = self.key_of(weights, eps, joins)
        # A detached tensor keeps its memory, so that nothing else can come to stand at an address in the key.
        self.held = [None if t is None else t.detach() for t in weights]
        (inner, states), taps, rank = weights.A_log.shape, weights.conv.shape[1], weights.dt.shape[1]
        #: What a row remembers: the window of the convolution and the state of the scan.
        self.window, self.memory = (taps - 1, inner), (inner, states)
        pointers = [None if t is None else t.data_ptr() for t in weights]
        self.call = _Layer(*pointers, weights.in_weight.shape[1], inner, states, taps, rank, eps, joins)
        self.address = ctypes.addressof(self.call)

    @staticmethod
    def key_of(weights: Weights, eps: float, joins: bool) -> tuple:
        return (*[None if t is None else t.data_ptr() for t in weights], eps, joins)

    @staticmethod
    def takes(weights: Weights) -> bool:
        """Whether a layer can be made of these, which have passed ``native.usable``."""
        return all(t is None or t.is_contiguous() for t in weights)


class Memory(NamedTuple):
    """What a layer remembers of its rows: window (B, K-1, E) and h (B, E, N), float32 and contiguous."""

    window: Tensor
    h: Tensor


@register("op", "mamba_step", paper=Paper("Gu and Dao", 2023, "2312.00752"), summary="Mamba layers for one token")
def mamba_step(x: Tensor, layers: Sequence[Layer], memories: Sequence[Memory]) -> tuple[Tensor, list[Memory]]:
    """x (B, 1, W), float32, through ``layers`` one after another -> y (B, 1, W) and the next memories.

    Needs the compiled kernels: ask ``native.usable`` first. Best up to ``MOST`` rows.
    """
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    after = [Memory(torch.empty_like(window), torch.empty_like(h)) for window, h in memories]
    places = [t.data_ptr() for old, new in zip(memories, after) for t in (*old, *new)]
    native.library().fw_mamba_step(
        (c_void_p * len(layers))(*[layer.address for layer in layers]), (c_void_p * len(places))(*places),
        c_int64(len(layers)), c_void_p(x.data_ptr()), c_int64(len(x)), c_void_p(y.data_ptr()), torch.get_num_threads(),
    )  # fmt: skip
    return y, after
