"""Leaky integrate-and-fire neurons over the time axis: a current goes in, spikes of 0 and 1 come out.

    charged_t = voltage_{t-1} + (current_t - voltage_{t-1}) / tau
    spike_t = charged_t >= threshold,   voltage_t = 0 where it spikes, charged_t elsewhere

A step waits for the one before it, so this is one loop over time for many neurons side by side: compiled where that
was built (``native``), otherwise the definition, step by step. Going back, the derivative of a
spike is that of a sigmoid of slope 4 (Neftci, Mostafa and Zenke, 2019) and the reset counts as constant. Every neuron
of every row is computed by itself with the same operations, so a stream gives the spikes of one pass to the bit.
Cost: elementwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.ops.lif import native
from formwright.ops.lif.reference import lif_reference
from formwright.ops.lif.stepped import lif_stepped
from formwright.registry import Paper, register

__all__ = ["check", "lif", "lif_reference", "lif_stepped"]


@register("op", "lif", paper=Paper("Neftci, Mostafa and Zenke", 2019, "1901.09948"), summary="spiking neurons")
def lif(
    current: Tensor,
    start: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    tau: float = 2.0,
    threshold: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """current (B, L, C), start (B, C) or None -> spikes (B, L, C), and the voltage after each row's last step (B, C).

    ``lengths`` (B,): steps that each row brings, 0 included; anything may stand behind them, and nothing spikes there.
    Half precision is computed in float32; spikes have the dtype of ``current``, the voltage stays in float32. A
    current of NaN silences its neuron from there on. SpecError for tau below 1 or a threshold not above 0.
    """
    check(tau, threshold)
    wide = current.float() if current.dtype in (torch.float16, torch.bfloat16) else current
    first = None if start is None else start.to(wide.dtype)
    if _form(wide, first) is None:
        learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (wide, first))
        steps = lif_reference if learns else lif_stepped
        spikes, last = steps(wide, first, lengths, tau=tau, threshold=threshold)
    else:
        first = wide.new_zeros(wide.shape[0], wide.shape[2]) if first is None else first
        spikes, last = Neurons.apply(wide, first, lengths, tau, threshold)
    return spikes.to(current.dtype), last


def check(tau: float, threshold: float) -> None:
    """SpecError for settings that are none of a neuron."""
    if not 1 <= tau < float("inf"):
        raise SpecError(f"tau={tau} must be a number of at least 1: the steps in which a voltage leaks away")
    if not 0 < threshold < float("inf"):
        raise SpecError(f"threshold={threshold} must be a number above 0: the voltage at which a neuron spikes")


def _form(current: Tensor, start: Tensor | None) -> Any:
    """The module whose ``forward`` and ``backward`` run here, or None."""
    return native if native.reachable(current, start) else None


class Neurons(torch.autograd.Function):
    """The compiled loop, forwards and backwards; the definition where the derivative is itself to be differentiated."""

    @staticmethod
    def forward(
        ctx: Any, current: Tensor, start: Tensor, lengths: Tensor | None, tau: float, threshold: float
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        spikes, last, charged = _form(current, start).forward(current, start, lengths, tau, threshold, wanted)
        ctx.save_for_backward(current, start, lengths, charged)
        ctx.settings = tau, threshold
        return spikes, last

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        current, start, lengths, charged = ctx.saved_tensors
        tau, threshold = ctx.settings
        twice = torch.is_grad_enabled()
        form = None if twice else _form(grad_spikes, grad_last)
        if form is not None:
            return *form.backward(charged, lengths, tau, threshold, grad_spikes, grad_last), None, None, None
        with torch.enable_grad():
            given = [t if t.requires_grad else t.detach().requires_grad_() for t in (current, start)]
            outputs = lif_reference(given[0], given[1], lengths, tau=tau, threshold=threshold)
            grads = torch.autograd.grad(outputs, given, (grad_spikes, grad_last), create_graph=twice, allow_unused=True)
        return *grads, None, None, None
