"""The selective scan by the compiled kernel: float32 on the CPU, forward and backward; see ``native.cpp``."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from formwright.ops import native
from formwright.ops.rows import Rows

#: Slices of channels at most, each of which leaves its own sum over channels for the gradients of B and C.
SLICES = 8
#: Channels that are computed at once.
WIDTH = 16

rows = Rows.of


class Call(native.Call):
    """The struct of the same name in ``native.cpp``."""

    _fields_ = native.fields(
        (native.Tokens, "x delta B C z grad_y"),
        (c_void_p, "A D initial grad_final y final kept"),
        (c_void_p, "grad_x grad_delta grad_z grad_A grad_B grad_C grad_D grad_initial"),
        (c_void_p, "starts lengths chunks"),
        (c_int64, "rows tokens channels states slices"),
        (c_int, "softplus"),
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


def _call(tensors: Tensors, rows: Rows[list[int]], softplus: bool) -> tuple[Call, int]:
    """What both passes are told, and the number of chunks in all rows."""
    x, states = tensors.x, tensors.A.shape[1]
    groups = -(-x.shape[2] // WIDTH)
    call = Call(
        rows=len(rows.lengths), tokens=x.shape[0] * x.shape[1], channels=x.shape[2], states=states,
        slices=-(-groups // max(-(-groups // SLICES), 1)), softplus=softplus,
    )  # fmt: skip
    chunk = native.library().fw_selective_scan_chunk()
    firsts = [0]
    for length in rows.lengths:
        firsts.append(firsts[-1] + -(-length // chunk))
    chunks = firsts.pop()
    call.give(starts=rows.starts, lengths=rows.lengths, chunks=firsts, **tensors._asdict())
    return call, chunks


def forward(
    tensors: Tensors, rows: Rows[list[int]], softplus: bool, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the final states and, with ``keep``, the states before every chunk, which the backward pass starts from."""
    x, A, initial = tensors.x, tensors.A, tensors.initial
    call, chunks = _call(tensors, rows, softplus)
    y, final = rows.blank(x), torch.empty_like(initial, memory_format=torch.contiguous_format)
    kept = x.new_empty(chunks, A.shape[1], -(-A.shape[0] // WIDTH) * WIDTH) if keep else None
    call.give(y=y, final=final, kept=kept)
    call.run("fw_selective_scan")
    return y, final, kept


def backward(
    grad_y: Tensor, grad_final: Tensor | None, kept: Tensor, tensors: Tensors, rows: Rows[list[int]], softplus: bool
) -> list[Tensor | None]:
    """Gradients of ``tensors``, in their order: x, delta, A, B, C, D, z, initial."""
    call, _ = _call(tensors, rows, softplus)
    x, _, A, B, _, D, z, initial = tensors
    count = len(rows.lengths)
    grads: dict[str, Tensor | None] = {
        "grad_x": rows.blank(x),
        "grad_delta": rows.blank(x),
        "grad_A": x.new_empty(count, *A.shape),
        "grad_B": rows.blank(B, call.slices),
        "grad_C": rows.blank(B, call.slices),
        "grad_D": x.new_empty(count, A.shape[0]),
        "grad_z": None if z is None else rows.blank(x),
        "grad_initial": torch.empty_like(initial, memory_format=torch.contiguous_format),
    }
    call.give(grad_y=grad_y, grad_final=grad_final, kept=kept, **grads)
    call.run("fw_selective_scan_backward")
    for name in ("grad_A", "grad_B", "grad_C", "grad_D"):
        grads[name] = grads[name].sum(0)  # type: ignore[union-attr]
    if D is None:
        grads["grad_D"] = None
    return list(grads.values())
