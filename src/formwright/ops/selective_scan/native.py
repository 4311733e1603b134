"""The selective scan by the compiled kernel: float32 on the CPU, forward and backward; see ``native.cpp``."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from formwright.ops import native
from formwright.ops.rows import Rows

#: Slices of channels at most, each of which leaves its own sum over channels for the gradients of B and C.
SLICES = 8
#: Channels that are computed at once.
WIDTH = 16


#: Fields with a stride of their own between tokens.
STRIDED = ("x", "delta", "B", "C", "z", "grad_y")


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, native.Tokens) for name in STRIDED),
        *((name, c_void_p) for name in ("A", "D", "initial", "grad_final")),
        *((name, c_void_p) for name in ("y", "final", "kept")),
        *((f"grad_{name}", c_void_p) for name in ("x", "delta", "z", "A", "B", "C", "D", "initial")),
        *((name, c_void_p) for name in ("starts", "lengths", "chunks")),
        *((name, c_int64) for name in ("rows", "tokens", "channels", "states", "slices")),
        ("softplus", c_int),
    )


class Tensors(NamedTuple):
    """What gradients flow to, in the order of the op's arguments."""

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    initial: Tensor


class _Run:
    """One call of the kernel: its struct and whatever its pointers point to."""

    def __init__(self, tensors: Tensors, rows: Rows, softplus: bool) -> None:
        x, states = tensors.x, tensors.A.shape[1]
        self.held: list[Any] = []
        groups = -(-x.shape[2] // WIDTH)
        self.slices = -(-groups // max(-(-groups // SLICES), 1))
        self.call = _Call(
            rows=len(rows.lengths), tokens=x.shape[0] * x.shape[1], channels=x.shape[2],
            states=states, slices=self.slices, softplus=softplus,
        )  # fmt: skip
        chunk = native.library().fw_selective_scan_chunk()
        firsts = [0]
        for length in rows.lengths:
            firsts.append(firsts[-1] + -(-length // chunk))
        self.chunks = firsts.pop()
        for name, values in (("starts", rows.starts), ("lengths", rows.lengths), ("chunks", firsts)):
            array = (c_int64 * len(values))(*values)
            self.held.append(array)
            setattr(self.call, name, ctypes.addressof(array))
        self.give(**tensors._asdict())

    def give(self, **tensors: Tensor | None) -> None:
        """Point the struct's fields to tensors: (B, L, F) with any stride between tokens, all others contiguous."""
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


def native_scan(
    tensors: Tensors, rows: Rows, softplus: bool, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the final states and, with ``keep``, the states before every chunk, which the backward pass starts from."""
    x, A, initial, run = tensors.x, tensors.A, tensors.initial, _Run(tensors, rows, softplus)
    y, final = rows.blank(x), torch.empty_like(initial, memory_format=torch.contiguous_format)
    kept = x.new_empty(run.chunks, A.shape[1], -(-A.shape[0] // WIDTH) * WIDTH) if keep else None
    run.give(y=y, final=final, kept=kept)
    native.library().fw_selective_scan(ctypes.byref(run.call), torch.get_num_threads())
    return y, final, kept


def native_scan_backward(
    grad_y: Tensor, grad_final: Tensor | None, kept: Tensor, tensors: Tensors, rows: Rows, softplus: bool
) -> list[Tensor | None]:
    """Gradients of ``tensors``, in their order: x, delta, A, B, C, D, z, initial."""
    run = _Run(tensors, rows, softplus)
    x, _, A, B, _, D, z, initial = tensors
    count = len(rows.lengths)
    grads: dict[str, Tensor | None] = {
        "grad_x": rows.blank(x),
        "grad_delta": rows.blank(x),
        "grad_A": x.new_empty(count, *A.shape),
        "grad_B": rows.blank(B, run.slices),
        "grad_C": rows.blank(B, run.slices),
        "grad_D": x.new_empty(count, A.shape[0]),
        "grad_z": None if z is None else rows.blank(x),
        "grad_initial": torch.empty_like(initial, memory_format=torch.contiguous_format),
    }
    run.give(grad_y=grad_y, grad_final=grad_final, kept=kept, **grads)
    native.library().fw_selective_scan_backward(ctypes.byref(run.call), torch.get_num_threads())
    for name in ("grad_A", "grad_B", "grad_C", "grad_D"):
        grads[name] = grads[name].sum(0)  # type: ignore[union-attr]
    if D is None:
        grads["grad_D"] = None
    return list(grads.values())


class NativeScan(torch.autograd.Function):
    """(rows, softplus, general, *tensors) -> y, final states. ``general`` is the form of the same tensors that second
    derivatives go through."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, softplus: bool, general: Any, *tensors: Any) -> tuple[Tensor, Tensor]:
        y, final, kept = native_scan(Tensors(*tensors), rows, softplus, keep=True)
        ctx.save_for_backward(*tensors, kept)
        ctx.rows, ctx.softplus, ctx.general = rows, softplus, general
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None):  # type: ignore[override]
        *tensors, kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            grads = native.differentiated(ctx.general, tensors, wanted, (grad_y, grad_final))
        else:
            grad_y = torch.zeros_like(tensors[0]) if grad_y is None else grad_y
            grads = native_scan_backward(grad_y, grad_final, kept, Tensors(*tensors), ctx.rows, ctx.softplus)
        return None, None, None, *(grad if want else None for grad, want in zip(grads, wanted))
