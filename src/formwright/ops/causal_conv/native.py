"""The short causal convolution by the compiled kernel: float32 on the CPU, forward and backward; see ``native.cpp``."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from formwright.ops import native
from formwright.ops.rows import Rows

rows = Rows.of


class Call(native.Call):
    """The struct of the same name in ``native.cpp``."""

    _fields_ = native.fields(
        (native.Tokens, "x grad_y"),
        (c_void_p, "weight bias initial grad_final y final"),
        (c_void_p, "grad_x grad_taps grad_initial starts lengths"),
        (c_int64, "rows tokens channels taps"),
        (c_int, "silu"),
    )


class Tensors(NamedTuple):
    """What gradients flow to, in the order of the op's arguments."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial: Tensor


def _call(tensors: Tensors, rows: Rows[list[int]], silu: bool) -> Call:
    x, weight, bias, initial = tensors
    call = Call(
        rows=len(rows.lengths), tokens=x.shape[0] * x.shape[1], channels=x.shape[2], taps=weight.shape[1], silu=silu
    )
    call.give(starts=rows.starts, lengths=rows.lengths, x=x, weight=weight.t(), bias=bias, initial=initial)
    return call


def forward(tensors: Tensors, rows: Rows[list[int]], silu: bool, *, keep: bool) -> tuple[Tensor, Tensor, None]:
    """y and the window after each row. Nothing is kept: the backward pass computes the sums again."""
    call = _call(tensors, rows, silu)
    y = rows.blank(tensors.x)
    final = torch.empty_like(tensors.initial, memory_format=torch.contiguous_format)
    call.give(y=y, final=final)
    call.run("fw_causal_conv")
    return y, final, None


def backward(
    grad_y: Tensor, grad_final: Tensor | None, kept: None, tensors: Tensors, rows: Rows[list[int]], silu: bool
) -> list[Tensor | None]:
    """Gradients of ``tensors``, in their order."""
    call, x, taps = _call(tensors, rows, silu), tensors.x, tensors.weight.shape[1]
    spans = -(-call.tokens // native.library().fw_causal_conv_span())
    grad_x, grad_taps = rows.blank(x), x.new_zeros(spans, taps + 1, x.shape[2])
    grad_initial = torch.zeros_like(tensors.initial, memory_format=torch.contiguous_format)
    call.give(grad_y=grad_y, grad_final=grad_final, grad_x=grad_x, grad_taps=grad_taps, grad_initial=grad_initial)
    call.run("fw_causal_conv_backward")
    total = grad_taps.sum(0)
    return [grad_x, total[:taps].t(), None if tensors.bias is None else total[taps], grad_initial]
