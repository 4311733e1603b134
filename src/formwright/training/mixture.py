"""A mixture of tasks: which task the next batch is of, drawn by the tasks' sizes.

    p_i ~ min(n_i, cap)^a        a = 1 proportional, 0 uniform, 1/T with a temperature T (Raffel et al., 2019),
                                 annealed 1 - 0.8 * (share of the run that is over) (Stickland and Murray, 2019)

The choice at an index depends on (seed, index) alone, and each task's own batches come in its own order, so a resumed
run goes on exactly. Cost: one draw a batch; going to a later index repeats the draws before it, not the batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from formwright.kit.errors import SpecError, all_of, unknown
from formwright.models.batch import Batch
from formwright.training.run import rows_of
from formwright.training.sources import Source, source_of

SAMPLERS = ("proportional", "uniform", "temperature", "annealed")
#: Stickland and Murray (1902.02671): the exponent goes from 1 to 0.2.
FALL = 0.8


def exponent(sampler: str, temperature: float = 2.0, progress: float = 0.0) -> float:
    """The power of a task's size that it is drawn by; ``progress`` is the share of the run that is over, 0 to 1."""
    if sampler not in SAMPLERS:
        raise SpecError(unknown("sampler of tasks", sampler, SAMPLERS))
    fixed = {"proportional": 1.0, "uniform": 0.0, "temperature": 1.0 / temperature}
    return fixed.get(sampler, 1.0 - FALL * min(1.0, max(0.0, progress)))


def shares(sizes: Mapping[str, int], power: float, cap: int | None = None) -> dict[str, float]:
    """Task -> its share of the draws."""
    raised = {name: min(size, cap or size) ** power for name, size in sizes.items()}
    return {name: value / sum(raised.values()) for name, value in raised.items()}


class Mixture(Source):
    """Batches of several tasks, each tagged with its task's name: the data of the ``multi-task`` objective.

    Args: tasks: name -> task, function, list of batches or source. sizes: name -> how many rows it has. sampler,
        temperature, cap: see the module. draws: batches of the whole run, which ``annealed`` needs. seed: of the
        choice, and of what tasks draw. split: of tasks.
    """

    def __init__(
        self,
        tasks: Mapping[str, Any],
        sizes: Mapping[str, int],
        *,
        sampler: str = "proportional",
        temperature: float = 2.0,
        cap: int | None = None,
        draws: int | None = None,
        seed: int = 0,
        split: str | None = None,
    ) -> None:
        problems = [] if tasks else ["a mixture needs at least one task"]
        problems += [f"mixture: sizes lacks task {name!r}" for name in tasks if name not in sizes]
        problems += [f"mixture: task {name!r} has size {sizes[name]}" for name in tasks if sizes.get(name, 1) < 1]
        if temperature <= 0 or (cap is not None and cap < 1):
            problems.append(f"mixture: temperature={temperature} must be above 0 and cap={cap} at least 1")
        if sampler == "annealed" and not draws:
            problems.append("mixture: the annealed sampler follows the run: say draws=N, its batches in all")
        all_of(SpecError, problems)
        exponent(sampler)
        self.sources = {name: source_of(data, seed, split) for name, data in tasks.items()}
        self.sizes = {name: int(sizes[name]) for name in tasks}
        self.sampler, self.temperature, self.cap, self.draws, self.seed = sampler, temperature, cap, draws, seed
        self._next, self._counts = 0, dict.fromkeys(tasks, 0)

    def shares(self, index: int) -> dict[str, float]:
        """Task -> its share of the draws at ``index``."""
        last = max(1, (self.draws or 1) - 1)
        return shares(self.sizes, exponent(self.sampler, self.temperature, index / last), self.cap)

    def task_at(self, index: int) -> str:
        """The task of the batch at ``index``, a function of (seed, index)."""
        chances = self.shares(index)
        at = np.random.default_rng([self.seed, index]).choice(len(chances), p=list(chances.values()))
        return list(chances)[int(at)]

    def draw(self, index: int) -> Batch:
        if index < self._next:
            self._next, self._counts = 0, dict.fromkeys(self.sources, 0)
        while self._next < index:
            self._counts[self.task_at(self._next)] += 1
            self._next += 1
        name = self.task_at(index)
        batch = self.sources[name].draw(self._counts[name])
        said = batch.meta or ({},) * rows_of(batch)
        return batch.replace(meta=tuple({**row, "task": name} for row in said))

    def fingerprint(self) -> dict[str, Any]:
        return {
            "sampler": [self.sampler, self.temperature, self.cap, self.draws, self.seed],
            "tasks": {n: {"size": self.sizes[n], **source.fingerprint()} for n, source in self.sources.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        return {name: source.state_dict() for name, source in self.sources.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, source in self.sources.items():
            source.load_state_dict(state.get(name, {}))
