"""The short causal convolution by the compiled kernel: float32 on the CPU, forward and backward; see ``native.cpp``."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from formwright.ops import native
from formwright.ops.rows import Rows

#: Fields with a stride of their own between tokens.
STRIDED = ("x", "grad_y")


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, native.Tokens) for name in STRIDED),
        *((name, c_void_p) for name in ("weight", "bias", "initial", "grad_final")),
        *((name, c_void_p) for name in ("y", "final")),
        *((f"grad_{name}", c_void_p) for name in ("x", "taps", "initial")),
        *((name, c_void_p) for name in ("starts", "lengths")),
        *((name, c_int64) for name in ("rows", "tokens", "channels", "taps")),
        ("silu", c_int),
    )


class Tensors(NamedTuple):
    """What gradients flow to, in the order of the op's arguments."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial: Tensor


class _Run:
    """One call of the kernel: its struct and whatever its pointers point to."""

    def __init__(self, tensors: Tensors, rows: Rows, silu: bool) -> None:
        x, weight, bias, initial = tensors
        self.held: list[Any] = []
        self.call = _Call(
            rows=len(rows.lengths), tokens=x.shape[0] * x.shape[1], channels=x.shape[2],
            taps=weight.shape[1], silu=silu,
        )  # fmt: skip
        for name, values in (("starts", rows.starts), ("lengths", rows.lengths)):
            array = (c_int64 * len(values))(*values)
            self.held.append(array)
            setattr(self.call, name, ctypes.addressof(array))
        self.give(x=x, weight=weight.t(), bias=bias, initial=initial)

    def give(self, **tensors: Tensor | None) -> None:
        """Point the struct's fields to tensors: (B, L, C) with any stride between tokens, all others contiguous."""
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if name in STRIDED:
                tensor = native.even(tensor)
                setattr(self.call, name, native.Tokens(tensor.data_ptr(), tensor.stride(1)))
            else:
                tensor = tensor.contiguous()
                setattr(self.call, name, tensor.data_ptr())
            self.held.append(tensor)


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernel takes these tensors; a wanted gradient is no hindrance."""
    return native.usable(*(t.detach() for t in tensors if t is not None))


def native_conv(tensors: Tensors, rows: Rows, silu: bool) -> tuple[Tensor, Tensor]:
    """y and the window after each row."""
    run = _Run(tensors, rows, silu)
    y = rows.blank(tensors.x)
    final = torch.empty_like(tensors.initial, memory_format=torch.contiguous_format)
    run.give(y=y, final=final)
    native.library().fw_causal_conv(ctypes.byref(run.call), torch.get_num_threads())
    return y, final


def native_conv_backward(
    grad_y: Tensor, grad_final: Tensor | None, tensors: Tensors, rows: Rows, silu: bool
) -> list[Tensor | None]:
    """Gradients of ``tensors``, in their order."""
    run, x, taps = _Run(tensors, rows, silu), tensors.x, tensors.weight.shape[1]
    spans = -(-run.call.tokens // native.library().fw_causal_conv_span())
    grad_x, grad_taps = rows.blank(x), x.new_zeros(spans, taps + 1, x.shape[2])
    grad_initial = torch.zeros_like(tensors.initial, memory_format=torch.contiguous_format)
    run.give(grad_y=grad_y, grad_final=grad_final, grad_x=grad_x, grad_taps=grad_taps, grad_initial=grad_initial)
    native.library().fw_causal_conv_backward(ctypes.byref(run.call), torch.get_num_threads())
    total = grad_taps.sum(0)
    return [grad_x, total[:taps].t(), None if tensors.bias is None else total[taps], grad_initial]


class NativeConv(torch.autograd.Function):
    """(rows, silu, general, *tensors) -> y, final windows. ``general`` is the form of the same tensors that second
    derivatives go through."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, silu: bool, general: Any, *tensors: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*tensors)
        ctx.rows, ctx.silu, ctx.general = rows, silu, general
        ctx.set_materialize_grads(False)
        return native_conv(Tensors(*tensors), rows, silu)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None):  # type: ignore[override]
        tensors, wanted = Tensors(*ctx.saved_tensors), ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            grads = native.differentiated(ctx.general, list(tensors), wanted, (grad_y, grad_final))
        else:
            grad_y = torch.zeros_like(tensors.x) if grad_y is None else grad_y
            grads = native_conv_backward(grad_y, grad_final, tensors, ctx.rows, ctx.silu)
        return None, None, None, *(grad if want else None for grad, want in zip(grads, wanted))
