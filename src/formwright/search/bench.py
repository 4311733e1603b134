"""The bench: how a candidate is made and judged, in this process or by a worker that was sent a copy.

It holds what every candidate starts from (the original, the task, the seed) and nothing of a search's own: no
directory and no decision. What a method gives depends on its arguments alone, so it does not matter who is asked. Cost:
making a candidate copies the original, judging it is one score of the task, healing it takes the steps it is given.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from formwright.search import evidence
from formwright.search.moves import drop_plan, losses, options_of, sparing
from formwright.surgery import apply, copy

#: Calibrate texts that distances are taken on, and that precision moves may run.
PROBES = 64
#: Steps that find out how fast healing is.
PILOT = 10
#: Peak learning rate of healing: short trainings do not forgive the default of long ones.
RATE = 4e-4


class Bench:
    """``precision`` is a list of precision moves (surgery, options), ``products`` the number format of healing."""

    def __init__(self, original: Any, task: Any, seed: int) -> None:
        self.original, self.task, self.seed = original, task, seed
        self.texts: list[str] = task.texts("calibrate")
        self.probes = self.texts[:: max(1, len(self.texts) // PROBES)][:PROBES]

    # ------------------------------------------------------------------ making

    def cut(self, drops: list[str], weights: Any = None, share: bool = False) -> Any:
        """The original without ``drops``, with the values of the model ``weights`` wherever it has them.

        share: its values are the original's own memory; for models that are not trained.
        """
        made = copy(self.original, share=share)
        if drops:
            apply(made, drop_plan(made, drops))
        if weights is not None:
            known = weights.state_dict()
            made.load_state_dict({name: known.get(name, value) for name, value in made.state_dict().items()})
            made.history += [entry for entry in weights.history if entry.kind == "event"]
        return made

    def precise(self, model: Any, precision: list[dict[str, Any]]) -> Any:
        """A copy of a model with the chosen precision moves applied; healing happens before, in float."""
        made = copy(model, share=True)
        for step in precision:
            apply(made, step["surgery"], self.probes or None, **options_of(step, made))
        return made

    def healed(
        self,
        drops: list[str],
        weights: Any,
        steps: int,
        minutes: float | None,
        products: str,
        judge: list[dict[str, Any]] | None,
    ) -> tuple[Any, dict[str, Any] | None]:
        """:meth:`cut`, trained to answer as the original until ``steps`` or ``minutes`` are over -> the model, and the
        score on select of its precise form where ``judge`` says by which precision moves."""
        made = self.cut(drops, weights)
        self.train(made, steps, products, minutes)
        return made, None if judge is None else self.score(self.precise(made, judge), "select")

    def train(self, model: Any, steps: int, products: str, minutes: float | None = None) -> None:
        from formwright.training import heal

        # The layers before the first cut make up for it too: worth more than the faster steps without them.
        options: dict[str, Any] = {"lr": RATE, "seed": self.seed, "precision": products, "whole": True}
        heal(model, self.original, self.texts, steps=steps, minutes=minutes, **options)

    def pace(self, drops: list[str], products: str) -> float:
        """Healing steps a second where this is asked, timed once on a copy."""
        scratch = self.cut(drops)
        self.train(scratch, 2, products)
        started = time.perf_counter()
        self.train(scratch, PILOT, products)
        return PILOT / (time.perf_counter() - started)

    def products(self) -> str:
        """bfloat16 where the processor multiplies it, float32 elsewhere."""
        return "bfloat16" if torch.cpu.get_capabilities().get("avx512_bf16") else "float32"

    # ------------------------------------------------------------------ judging

    def score(self, model: Any, split: str) -> dict[str, Any]:
        """The score of a model as plain data, with the seconds it took under ``clock``."""
        started = time.perf_counter()
        found = evidence.record(self.task.score(model, split))
        return {**found, "clock": time.perf_counter() - started}

    def share(self, value: float, original: float) -> float:
        """What a value of the task's metric keeps of another."""
        return evidence.kept(self.task, value, original)

    def judged(self, drops: list[str], precision: list[dict[str, Any]]) -> dict[str, Any]:
        """The score on select of the original without ``drops``, as it is."""
        return self.score(self.precise(self.cut(drops, share=True), precision), "select")

    def losses(self, items: list[str], precision: list[dict[str, Any]]) -> dict[str, float]:
        """The share of the metric on calibrate that is lost when each item alone is dropped."""
        model = self.precise(self.original, precision)
        return losses(model, items, lambda made: self.task.score(made, "calibrate").value, self.share)

    def spared(self, items: list[str], precision: list[dict[str, Any]]) -> dict[str, float]:
        """The share of the metric on calibrate that is lost by the precision moves when each item alone is left out."""
        base = self.task.score(self.original, "calibrate").value
        found = {}
        for item in items:
            made = self.precise(self.original, sparing(precision, [item]))
            found[item] = 1.0 - self.share(self.task.score(made, "calibrate").value, base)
        return found
