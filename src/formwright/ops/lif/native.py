"""Spiking neurons by the compiled loop: float32 on the CPU; see ``native.cpp``."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from formwright.ops import native

usable = native.usable


class Call(ctypes.Structure):
    """The same struct as in ``native.cpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("lengths", "current", "start", "charged", "spikes", "last")),
        *((name, c_int64) for name in ("rows", "steps", "channels")),
        *((name, c_float) for name in ("rate", "threshold")),
    )


def forward(
    current: Tensor, start: Tensor, lengths: Tensor | None, tau: float, threshold: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> spikes, the last voltages, and with ``keep`` the voltages (B, L, C) before any reset."""
    spikes, last = torch.empty(current.shape), torch.empty(start.shape)
    charged = torch.empty(current.shape) if keep else None
    _run("fw_lif", current, start, lengths, charged, spikes, last, tau, threshold)
    return spikes, last, charged


def backward(
    charged: Tensor, lengths: Tensor | None, tau: float, threshold: float, grad_spikes: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor]:
    """-> the gradients of the currents and of the voltages at the start."""
    grad, grad_start = torch.empty(charged.shape), torch.empty(grad_last.shape)
    _run("fw_lif_backward", grad, grad_start, lengths, charged, grad_spikes, grad_last, tau, threshold)
    return grad, grad_start


def _run(
    entry: str,
    current: Tensor,
    start: Tensor,
    lengths: Tensor | None,
    charged: Tensor | None,
    spikes: Tensor,
    last: Tensor,
    tau: float,
    threshold: float,
) -> None:
    sizes = None if lengths is None else lengths.to("cpu", torch.int64)
    held = [None if t is None else t.contiguous() for t in (sizes, current, start, charged, spikes, last)]
    call = Call(*(None if t is None else t.data_ptr() for t in held), *spikes.shape, 1 / tau, threshold)
    getattr(native.library(), entry)(ctypes.byref(call), torch.get_num_threads())
