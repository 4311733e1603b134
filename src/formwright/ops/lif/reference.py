"""The definition of leaky integrate-and-fire neurons, step by step, with a surrogate for the derivative of a spike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Slope of the sigmoid whose derivative stands in for that of the step.
SLOPE = 4.0


class Spike(torch.autograd.Function):
    """1 where x >= 0; its derivative is taken to be that of sigmoid(SLOPE x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        sigmoid = torch.sigmoid(SLOPE * ctx.saved_tensors[0])
        return grad * (SLOPE * sigmoid * (1 - sigmoid))


def lif_reference(
    current: Tensor,
    start: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    tau: float = 2.0,
    threshold: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """current (B, L, C), start (B, C) or zeros -> spikes (B, L, C) and the voltage after each row's last step (B, C).

    The reset is no path of the gradient.
    """
    rows, length, channels = current.shape
    voltage = current.new_zeros(rows, channels) if start is None else start
    here = None
    if lengths is not None:
        here = torch.arange(length, device=current.device) < lengths[:, None]
        current = current.masked_fill(~here[..., None], 0.0)
    spikes = []
    for step in range(length):
        charged = voltage + (current[:, step] - voltage) * (1 / tau)
        spike = Spike.apply(charged - threshold)
        after = charged.masked_fill(charged >= threshold, 0.0)
        voltage = after if here is None else torch.where(here[:, step, None], after, voltage)
        spikes.append(spike)
    fired = torch.stack(spikes, 1) if spikes else torch.zeros_like(current)
    return (fired if here is None else fired.masked_fill(~here[..., None], 0.0)), voltage
