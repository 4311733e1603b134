"""What the surgeries of a model do beside its training: found by the loop itself, so that none can be forgotten.

A surgery may need to act at every step (AdaLoRA gives out its budget of ranks, diff pruning fixes its mask). It says so
by :meth:`~formwright.surgery.base.Surgery.companion`; this hook calls them all and keeps their state in checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from formwright.surgery.base import Companion, Plan, surgery
from formwright.training.hooks import Hook

if TYPE_CHECKING:
    from formwright.training.run import Run


def companions(model: Any) -> list[Hook]:
    """One hook for all companions of the model's surgeries; none where there are none."""
    plans = [Plan.from_dict(entry.data) for entry in getattr(model, "history", ()) if entry.kind == "surgery"]
    found = [surgery(plan.surgery).companion(model, plan) for plan in plans]
    held = [companion for companion in found if companion is not None]
    return [Companions(held)] if held else []


class Companions(Hook):
    """See the module."""

    def __init__(self, held: list[Companion]) -> None:
        self.held = held

    def gradients(self, run: Run) -> None:
        for companion in self.held:
            companion.gradients(run)

    def stepped(self, run: Run) -> None:
        for companion in self.held:
            companion.stepped(run)

    def state_dict(self) -> dict[str, Any]:
        return {str(index): companion.state_dict() for index, companion in enumerate(self.held)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for index, companion in enumerate(self.held):
            companion.load_state_dict(state[str(index)])
