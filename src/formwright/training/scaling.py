"""The loss scale of float16: gradients below 6e-8 would be lost, so they are carried back larger and divided again.

A step whose gradient overflows is skipped and halves the scale; ``PATIENCE`` used steps in a row double it
(Micikevicius et al., 2018, 1710.03740). The scale is a power of two, so it changes no digit. Cost: nothing; the norm
that the loop takes anyway tells of an overflow, on every process alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Used steps in a row after which the scale doubles, and the scales between which it stays.
PATIENCE, LOWEST, HIGHEST = 2000, 2.0**-10, 2.0**24


class LossScale:
    """``factor`` multiplies every loss before it goes back; 1, for good, in any precision but float16."""

    def __init__(self, precision: str) -> None:
        self.active = precision == "float16"
        self.factor = 2.0**16 if self.active else 1.0
        self.used = 0

    def step_used(self) -> None:
        self.used += 1
        if self.active and self.used >= PATIENCE:
            self.factor, self.used = min(self.factor * 2.0, HIGHEST), 0

    def overflowed(self) -> bool:
        """Halve the scale because a gradient was no number; False where that cannot be why."""
        if not self.active or self.factor <= LOWEST:
            return False
        self.factor, self.used = self.factor / 2.0, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor, "used": self.used} if self.active else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.factor, self.used = state.get("factor", self.factor), state.get("used", self.used)
