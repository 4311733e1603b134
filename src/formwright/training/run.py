"""One run of training as an object: the steps, what hooks see of them, and what goes into a checkpoint.

A step draws micro-batches, carries the gradients of their summed losses back, divides once by the sum of their counts,
clips, and moves the parameters. All noise is keyed by (seed, step, micro-batch) and the caller's random generators are
left as they were. Cost beside the model's own: one pass over the gradients and one over the optimizer's state a step.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from formwright.kit.errors import DataError, FormwrightError, SpecError
from formwright.models.batch import Batch, Loss, Score
from formwright.objectives.base import Gen
from formwright.parts.context import keyed_generator
from formwright.training import checkpoint
from formwright.training.checkpoint import RunDirectory
from formwright.training.hooks import Hook
from formwright.training.optimizers import adamw, load_state_tensors, set_lr, state_tensors
from formwright.training.parameters import chosen, only
from formwright.training.recipe import Recipe
from formwright.training.schedules import factor
from formwright.training.sources import Source

#: Seconds between checkpoints where ``save_every`` is not given.
SAVE_SECONDS = 120.0


class Diverged(FormwrightError):
    """The loss or its gradient is no number any more; the sentence names the step and what is kept."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the step was finished and, given a run directory, a checkpoint written; ``str()`` says how to go on."""


class Run:
    """A run as hooks see it. ``step`` counts finished steps, ``losses`` are the last step's means by name."""

    def __init__(
        self,
        models: Mapping[str, Any],
        objective: Any,
        source: Source,
        recipe: Recipe,
        hooks: Sequence[Hook],
        directory: RunDirectory | None,
        keep: int,
        save_every: int | None,
    ) -> None:
        self.models, self.model = dict(models), models["model"]
        self.objective, self.source, self.recipe = objective, source, recipe
        self.hooks, self.directory, self.keep, self.save_every = list(hooks), directory, keep, save_every
        self.step = self.drawn = 0
        self.lr = self.gradient = 0.0
        self.losses: dict[str, float] = {}
        self.curve: list[tuple[int, float]] = []
        self.why = ""
        self._seconds, self._since, self._saved_at = 0.0, time.perf_counter(), -1
        self._saved_time, self._best = time.perf_counter(), False
        trained = ["model", *(name for name, kind in objective.others.items() if kind == "trained")]
        self.parameters: dict[str, nn.Parameter] = {}
        for name in trained:
            patterns = recipe.trainable if name == "model" else ("*",)
            self.parameters |= {f"{name}.{key}": p for key, p in chosen(self.models[name], patterns).items()}
        if not self.parameters:
            raise SpecError(
                f"nothing would be trained: trainable={list(recipe.trainable)} leaves no parameter that may"
            )
        wide = [key for key, p in self.parameters.items() if not p.is_floating_point()]
        if wide:
            raise SpecError(f"{wide[0]} is not a float tensor, so it cannot be trained")
        self.optimizer = adamw(self.parameters, recipe)
        self.trained = trained

    # ------------------------------------------------------------------ what hooks read and call

    @property
    def seconds(self) -> float:
        """Training time so far, earlier processes of a resumed run included."""
        return self._seconds + time.perf_counter() - self._since

    @property
    def progress(self) -> float:
        """0 to 1: the further of steps and minutes."""
        steps, minutes = self.recipe.steps, self.recipe.minutes
        by_steps = 0.0 if steps is None else (self.step + 1) / (steps + 1)
        by_time = 0.0 if minutes is None else self.seconds / (60.0 * minutes)
        return min(1.0, max(by_steps, by_time))

    @property
    def last(self) -> bool:
        """Whether no step follows."""
        return bool(self.why)

    def stop(self, why: str) -> None:
        """End the run after this step."""
        self.why = self.why or why

    def keep_as_best(self) -> None:
        """Write a checkpoint after this step and point RUN/best at it."""
        self._best = True

    def score(self, name: str, score: Score) -> None:
        """Tell every hook of a score."""
        for hook in self.hooks:
            hook.scored(self, name, score)

    # ------------------------------------------------------------------ one step

    def advance(self) -> None:
        """One step: micro-batches, gradients, clipping, the optimizer, hooks."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        rows = taken = 0
        target = self.recipe.batch
        while rows < target if target is not None else taken < self.recipe.accumulation:
            batch = self.source.draw(self.drawn).to(self.model.device)
            self.drawn += 1
            for hook in self.hooks:
                batch = hook.batch(self, batch) or batch
            gen = Gen(step_seed(self.recipe.seed, self.step, taken), self.step, self.progress)
            with private_random(gen.seed, self.model.device), self._precision():
                self.objective.backward(self.models, batch, gen, lambda losses: self._back(losses, sums, counts))
            rows, taken = rows + rows_of(batch), taken + 1
        self._finish(sums, counts)

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.recipe.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16)

    def _back(self, losses: Mapping[str, Loss], sums: dict[str, Tensor], counts: dict[str, Tensor]) -> None:
        for hook in self.hooks:
            losses = hook.loss(self, losses) or losses
        if set(losses) != {"model"}:
            raise SpecError(f"this loop has one optimizer, 'model'; the objective gives losses for {', '.join(losses)}")
        loss = losses["model"]
        if not loss.total.requires_grad:
            raise SpecError("the loss does not depend on anything that may train; check trainable=")
        loss.total.backward()
        counts["loss"] = counts.get("loss", 0) + loss.count.detach().double()
        for name, value in {"loss": loss.total, **loss.parts}.items():
            sums[name] = sums.get(name, 0) + value.detach().double()

    def _finish(self, sums: dict[str, Tensor], counts: dict[str, Tensor]) -> None:
        count = max(float(counts["loss"]), 1e-12)
        self.losses = {name: float(value) / count for name, value in sums.items()}
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, 1.0 / count)
        for hook in self.hooks:
            hook.gradients(self)
        norm = nn.utils.get_total_norm(gradients)
        self.gradient = float(norm)
        if not math.isfinite(self.losses["loss"]) or not math.isfinite(self.gradient):
            raise Diverged(self._diverged())
        if self.recipe.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.recipe.clip, norm)
        self.lr = self.recipe.lr * factor(self.recipe.schedule, self.progress, self.recipe.warmup, self.recipe.floor)
        set_lr(self.optimizer, self.lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        before, self.step = self.seconds, self.step + 1
        self.curve.append((self.step, self.losses["loss"]))
        self._check_end(before / self.step)
        for hook in self.hooks:
            hook.stepped(self)

    def _check_end(self, per_step: float) -> None:
        if self.recipe.steps is not None and self.step >= self.recipe.steps:
            self.stop("all steps done")
        elif self.recipe.minutes is not None and self.seconds + per_step / 2 >= 60.0 * self.recipe.minutes:
            self.stop("the time is up")

    def _diverged(self) -> str:
        kept = ""
        if self.directory is not None:
            steps = self.directory.checkpoints()
            kept = f" {self.directory.at(steps[-1])} is kept." if steps else " No checkpoint was written before."
        return (
            f"step {self.step + 1}: the loss is {self.losses['loss']:g} and its gradient {self.gradient:g}, so the run "
            f"stops before using them.{kept} Try a lower lr (now {self.recipe.lr:g}), more warmup, or a smaller clip."
        )

    # ------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write the checkpoint of this step, unless it is there already."""
        if self.directory is None or (self._saved_at == self.step and not self._best):
            return
        kept = ["model", *(name for name, kind in self.objective.others.items() if kind != "frozen")]
        models = {
            f"{name}.{key}": value for name in kept for key, value in checkpoint.tensors_of(self.models[name]).items()
        }
        state = {
            "drawn": self.drawn,
            "seconds": self.seconds,
            "why": self.why,
            "losses": self.losses,
            "objective": self.objective.state_dict(),
            "data": self.source.state_dict(),
            "hooks": [{"hook": type(hook).__name__, "state": hook.state_dict()} for hook in self.hooks],
        }
        optimizer = state_tensors(self.optimizer, self.parameters)
        self.directory.save(self.step, models, optimizer, state, keep=self.keep, best=self._best)
        self._saved_at, self._saved_time, self._best = self.step, time.perf_counter(), False

    def due(self) -> bool:
        """Whether a checkpoint is to be written now."""
        if self._best:
            return True
        if self.save_every is not None:
            return self.step % self.save_every == 0
        return time.perf_counter() - self._saved_time >= SAVE_SECONDS

    def load(self, step: int) -> None:
        """Go back to the checkpoint of ``step``."""
        assert self.directory is not None
        models, optimizer, state = self.directory.load(step, self.model.device)
        kinds = [entry["hook"] for entry in state["hooks"]]
        if kinds != [type(hook).__name__ for hook in self.hooks]:
            raise DataError(f"the run was started with hooks {', '.join(kinds) or 'none'}; resume it with the same")
        for name in {key.partition(".")[0] for key in models}:
            own = {key.partition(".")[2]: value for key, value in models.items() if key.partition(".")[0] == name}
            checkpoint.fill(self.models[name], own, str(self.directory.at(step)))
        load_state_tensors(self.optimizer, self.parameters, optimizer)
        self.objective.load_state_dict(state["objective"])
        self.source.load_state_dict(state["data"])
        for hook, entry in zip(self.hooks, state["hooks"]):
            hook.load_state_dict(entry["state"])
        self.directory.rewind(step)
        self.step = self._saved_at = step
        self.drawn, self.losses, self._seconds = state["drawn"], dict(state["losses"]), state["seconds"]
        # A run that ended by itself stays ended; one that was interrupted goes on.
        self.why = state["why"]

    # ------------------------------------------------------------------ the whole

    def go(self) -> None:
        """Steps until the end; every exit leaves the last whole checkpoint."""
        self._since = self._saved_time = time.perf_counter()
        training = {name: self.models[name].training for name in self.models}
        others = [module for module in self.models.values() if isinstance(module, nn.Module)]
        for name, module in self.models.items():
            module.train(name in self.trained and self.recipe.dropout)
        for hook in self.hooks:
            hook.stage_start(self)
        if self.recipe.steps == self.step:
            self.stop("all steps done")
        try:
            with only(others, list(self.parameters.values())), held_interrupt() as asked:
                while not self.last:
                    self.advance()
                    if asked() and not self.last:
                        self.save()
                        raise Interrupted(self._interrupted())
                    if self.last or self.due():
                        self.save()
                self.save()
        finally:
            for name, module in self.models.items():
                module.train(training[name])
            for hook in self.hooks:
                hook.stage_end(self)

    def _interrupted(self) -> str:
        if self.directory is None:
            return f"stopped by Ctrl-C after step {self.step}; nothing was written (out=RUN keeps checkpoints)"
        return (
            f"stopped by Ctrl-C after step {self.step}; {self.directory.at(self.step)} is saved. "
            f"Go on with the same call and resume=True (on the command line: --resume {self.directory.path})"
        )


def step_seed(seed: int, step: int, part: int = 0) -> int:
    """The seed of one micro-batch, a function of (run seed, step, micro-batch)."""
    return keyed_generator(seed, f"step {step}.{part}").initial_seed()


def rows_of(batch: Batch) -> int:
    """Rows of a batch, documents where it is packed."""
    for offsets in batch.offsets.values():
        return len(offsets) - 1
    return len(next(iter(batch.inputs.values())))


@contextlib.contextmanager
def private_random(seed: int, device: torch.device) -> Iterator[None]:
    """Within, PyTorch's own generators start from ``seed``; the caller's are put back."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)
        yield


@contextlib.contextmanager
def held_interrupt() -> Iterator[Any]:
    """Within, a first Ctrl-C is noted (ask the yielded function) so that a step can be finished; a second is raised."""
    asked = False

    def note(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
