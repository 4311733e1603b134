"""How the tasks of multi-task learning weigh against each other.

uncertainty (Kendall, Gal and Cipolla, 2018, 1705.07115), with a trained s_i a task::

    sum over items of exp(-s_i) l / 2 + s_i / 2          smallest where exp(s_i) is the task's mean loss

average, dynamic weight averaging (Liu, Johns and Davison, 2019, 1803.10704), over windows t of steps::

    w_i = n exp(r_i / T) / sum over j of exp(r_j / T),   r_i = L_i(t - 1) / L_i(t - 2)

A weight stands still within a step, so micro-batches may be cut at will. Cost: nothing to speak of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError, unknown


class Fixed:
    """Calling it gives the loss of a task as it weighs: (name, total, count, models, step) -> total."""

    def __call__(self, name: str, total: Tensor, count: Tensor, models: Mapping[str, Any], step: int) -> Tensor:
        return total

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The opposite of :meth:`state_dict`."""


class Scales(nn.Module):
    """``s`` of each task as a trained scalar; ``rate`` makes it move so many times as fast as other parameters."""

    def __init__(self, names: Sequence[str], rate: float) -> None:
        super().__init__()
        if rate <= 0:
            raise SpecError(f"uncertainties: rate={rate} must be above 0")
        self.names, self.rate = list(names), rate
        self.scales = nn.Parameter(torch.zeros(len(self.names)))

    def s(self, name: str) -> Tensor:
        if name not in self.names:
            raise SpecError(unknown("task of the uncertainties", name, self.names))
        return self.rate * self.scales[self.names.index(name)]


class Uncertainty(Fixed):
    """See the module; s lives in ``models["weights"]``, since it is trained."""

    @staticmethod
    def module(names: Sequence[str], rate: float) -> Scales:
        return Scales(names, rate)

    def __call__(self, name: str, total: Tensor, count: Tensor, models: Mapping[str, Any], step: int) -> Tensor:
        s = models["weights"].s(name)
        return 0.5 * (torch.exp(-s) * total + s * count)


class Average(Fixed):
    """See the module. ``sums`` are (loss, count) by window and task; only the last three windows are kept."""

    def __init__(self, names: Sequence[str], window: int, temperature: float) -> None:
        if window < 1 or temperature <= 0:
            raise SpecError(f"multi-task: window={window} must be at least 1 and temperature={temperature} above 0")
        self.names, self.window, self.temperature = list(names), window, temperature
        self.sums: dict[int, dict[str, list[float]]] = {}

    def __call__(self, name: str, total: Tensor, count: Tensor, models: Mapping[str, Any], step: int) -> Tensor:
        now = step // self.window
        if now not in self.sums:
            self.sums = {t: sums for t, sums in self.sums.items() if now - 2 <= t < now} | {now: {}}
        held = self.sums[now].setdefault(name, [0.0, 0.0])
        weight = self.weights(now)[name]
        held[0] += float(total.detach())
        held[1] += float(count)
        return weight * total

    def weights(self, window: int) -> dict[str, float]:
        """Task -> its weight in a window; 1 for all until two windows before it are known."""
        rates = {}
        for name in self.names:
            last, before = (self._mean(window - back, name) for back in (1, 2))
            rates[name] = last / before if last is not None and before else 1.0
        largest = max(rates.values())
        shares = {name: math.exp((rate - largest) / self.temperature) for name, rate in rates.items()}
        return {name: len(self.names) * share / sum(shares.values()) for name, share in shares.items()}

    def _mean(self, window: int, name: str) -> float | None:
        total, count = self.sums.get(window, {}).get(name, (0.0, 0.0))
        return total / count if count else None

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {str(t): sums for t, sums in self.sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = {int(t): {name: list(pair) for name, pair in s.items()} for t, s in state["sums"].items()}
