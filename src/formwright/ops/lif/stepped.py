"""Spiking neurons where no gradient is wanted, in any dtype and on any device: three operations a step.

The voltage is held negated, because ``threshold`` keeps what lies above its bound and puts a value in the place of the
rest: of -charged above -threshold, the voltage of a neuron that does not spike.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def lif_stepped(
    current: Tensor, start: Tensor | None, lengths: Tensor | None, *, tau: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """As ``lif_reference``, up to rounding."""
    rows, length, channels = current.shape
    first = current.new_zeros(rows, channels) if start is None else start
    if length == 0:
        return torch.zeros_like(current), first
    voltage, charged = -first, []
    for step in torch.neg(current).unbind(1):
        charged.append(torch.add(voltage, step - voltage, alpha=1 / tau))
        voltage = F.threshold(charged[-1], -threshold, 0.0)
    reached = torch.stack(charged, 1)
    spikes = (reached <= -threshold).to(current.dtype)
    if lengths is None:
        return spikes, -voltage
    here = torch.arange(length, device=current.device) < lengths[:, None]
    last = reached[torch.arange(rows, device=current.device), (lengths - 1).clamp(min=0)]
    last = torch.where((lengths > 0)[:, None], -F.threshold(last, -threshold, 0.0), first)
    return spikes.masked_fill(~here[..., None], 0.0), last
