"""Hooks: what watches or bends a run. All methods are optional, called in list order; each has state in the checkpoint.

``stage_start`` · for every step: ``batch`` (may return another), ``loss`` (may return other losses, before they go
back), ``gradients`` (means, before clipping), ``stepped`` · ``scored`` after every evaluation · ``stage_end``.
A hook reads the run (``run.step``, ``run.progress``, ``run.model``, ``run.losses``) and ends it with ``run.stop(why)``.
Where several processes train one model each has its hooks, and they must do the same. Hooks that only look on are in
:mod:`formwright.training.watchers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.models.batch import Batch, Loss, Score
from formwright.tasks.base import Task
from formwright.training.checkpoint import tensors_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from formwright.training.run import Run


class Hook:
    """See the module. ``watches``: it only looks on, so a checkpoint need not know of it."""

    watches = False

    def stage_start(self, run: Run) -> None: ...

    def batch(self, run: Run, batch: Batch) -> Batch | None: ...

    def loss(self, run: Run, losses: Mapping[str, Loss]) -> Mapping[str, Loss] | None: ...

    def gradients(self, run: Run) -> None: ...

    def stepped(self, run: Run) -> None: ...

    def scored(self, run: Run, name: str, score: Score) -> None: ...

    def stage_end(self, run: Run) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Evaluate(Hook):
    """Score the model on a task's split every ``every`` steps and at the end; the best step is RUN/best."""

    def __init__(self, task: Task, split: str = "select", every: int = 100) -> None:
        self.task, self.split, self.every = task, task.check_split(split), positive("every", every)
        self.best: float | None = None
        self.best_step: int | None = None
        self.scores: dict[str, float] = {}

    def stepped(self, run: Run) -> None:
        if run.step % self.every and not run.last:
            return
        score = self.task.score(run.model, self.split)
        score = replace(score, value=run.place.everyone(score.value)[0])  # processes may differ in the last bits
        sign = 1.0 if self.task.higher_is_better else -1.0
        if math.isfinite(score.value) and (self.best is None or sign * score.value > sign * self.best):
            self.best, self.best_step = score.value, run.step
            run.keep_as_best()
        self.scores = {self.task.metric or self.task.name: score.value}
        run.score(self.task.name, score)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "scores": self.scores}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_step, self.scores = state["best"], state["best_step"], dict(state["scores"])


class EarlyStopping(Hook):
    """Stop when ``patience`` evaluations in a row brought no score better than before by more than ``least``."""

    def __init__(self, patience: int = 3, least: float = 0.0, higher_is_better: bool = True) -> None:
        self.patience, self.least = positive("patience", patience), least
        self.sign = 1.0 if higher_is_better else -1.0
        self.best: float | None = None
        self.waited = 0

    def scored(self, run: Run, name: str, score: Score) -> None:
        value = self.sign * score.value
        if self.best is None or value > self.best + self.least:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            run.stop(f"no better score in {self.waited} evaluations")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


class EMA(Hook):
    """A moving average of the trained parameters, ``a <- d a + (1 - d) p`` a step (Polyak and Juditsky, 1992).

    d rises as (1 + step) / (10 + step) up to ``decay``, so that the start is forgotten. ``with ema.swapped(model):``
    runs the averages; with ``final`` the model keeps them when the run ends.
    """

    def __init__(self, decay: float = 0.999, final: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise SpecError(f"decay={decay} must be at least 0 and below 1")
        self.decay, self.final = decay, final
        self.averages: dict[str, Tensor] = {}

    def stage_start(self, run: Run) -> None:
        if not self.averages:
            self.averages = {name: value.detach().clone() for name, value in run.parameters.items()}
        self.averages = {name: run.place.like(value, run.parameters[name]) for name, value in self.averages.items()}

    def stepped(self, run: Run) -> None:
        decay = min(self.decay, (1 + run.step) / (10 + run.step))
        with torch.no_grad():
            averages = list(self.averages.values())
            torch._foreach_lerp_(averages, [run.parameters[name] for name in self.averages], 1.0 - decay)

    @contextmanager
    def swapped(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Within, ``parameters`` (by the run's names) hold the averages."""
        kept = {name: parameters[name].detach().clone() for name in self.averages}
        self._write(parameters, self.averages)
        try:
            yield
        finally:
            self._write(parameters, kept)

    @staticmethod
    def _write(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)

    def stage_end(self, run: Run) -> None:
        if self.final:
            self._write(run.parameters, self.averages)

    def state_dict(self) -> dict[str, Any]:
        # Copies: a checkpoint of tensors that go on changing would not be of one step.
        return {"averages": {name: value.clone() for name, value in self.averages.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.averages = dict(state["averages"])


class Average(Hook):
    """Keeps another model as a moving average of the model: what an objective calls an ``ema`` model."""

    def __init__(self, name: str, decay: float) -> None:
        self.name, self.decay = name, decay

    def stepped(self, run: Run) -> None:
        own = tensors_of(run.model)
        with torch.no_grad():
            for name, value in tensors_of(run.models[self.name]).items():
                now = run.place.whole(own[name])
                if value.is_floating_point():
                    value.lerp_(now.to(value.dtype), 1.0 - self.decay)
                else:
                    value.copy_(now)


def positive(name: str, value: int) -> int:
    if value < 1:
        raise SpecError(f"{name}={value} must be at least 1")
    return value
