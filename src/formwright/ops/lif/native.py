"""Spiking neurons by the compiled loop: float32 on the CPU; see ``native.cpp``."""

from __future__ import annotations

from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from formwright.ops import native

reachable = native.reachable


class Call(native.Call):
    """The struct of the same name in ``native.cpp``."""

    _fields_ = native.fields(
        (c_void_p, "lengths current start charged spikes last"),
        (c_int64, "rows steps channels"),
        (c_float, "rate threshold"),
    )


def forward(
    current: Tensor, start: Tensor, lengths: Tensor | None, tau: float, threshold: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> spikes, the last voltages, and with ``keep`` the voltages (B, L, C) before any reset."""
    spikes, last = torch.empty(current.shape), torch.empty(start.shape)
    charged = torch.empty(current.shape) if keep else None
    tensors = {"current": current, "start": start, "charged": charged, "spikes": spikes, "last": last}
    _run("fw_lif", lengths, tau, threshold, **tensors)
    return spikes, last, charged


def backward(
    charged: Tensor, lengths: Tensor | None, tau: float, threshold: float, grad_spikes: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor]:
    """-> the gradients of the currents and of the voltages at the start."""
    grad, grad_start = torch.empty(charged.shape), torch.empty(grad_last.shape)
    tensors = {"current": grad, "start": grad_start, "charged": charged, "spikes": grad_spikes, "last": grad_last}
    _run("fw_lif_backward", lengths, tau, threshold, **tensors)
    return grad, grad_start


def _run(entry: str, lengths: Tensor | None, tau: float, threshold: float, **tensors: Tensor | None) -> None:
    rows, steps, channels = tensors["spikes"].shape  # type: ignore[union-attr]
    call = Call(rows=rows, steps=steps, channels=channels, rate=1 / tau, threshold=threshold)
    call.give(lengths=None if lengths is None else lengths.to("cpu", torch.int64), **tensors)
    call.run(entry)
