"""One run of training as an object: the steps, what hooks see of them, and what goes into a checkpoint.

A step draws micro-batches, carries the gradients of their summed losses back, divides once by the sum of their counts,
clips, and moves the parameters. All noise is keyed by (seed, step, micro-batch) and the caller's random generators are
left as they were. What depends on where this happens (one process or several) is asked of the run's place. Cost beside
the model's own: one pass over the gradients and one over the optimizer's state a step.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from formwright.kit.errors import DataError, SpecError
from formwright.models.batch import Batch, Loss, Score
from formwright.objectives.base import Gen
from formwright.training import checkpoint
from formwright.training.checkpoint import RunDirectory
from formwright.training.ending import Diverged, Interrupted, held_interrupt
from formwright.training.hooks import Hook
from formwright.training.noise import private_random, step_seed
from formwright.training.offload import Interleaved
from formwright.training.optimizers import adamw, load_state_tensors, set_lr, state_tensors
from formwright.training.parameters import chosen, only
from formwright.training.place import Place
from formwright.training.recipe import Recipe
from formwright.training.scaling import LossScale
from formwright.training.schedules import factor
from formwright.training.sources import Source
from formwright.training.tally import Tally, check_full, rows_of, tokens_of

#: Seconds between checkpoints where ``save_every`` is not given.
SAVE_SECONDS = 120.0


#: Hooks that checkpoints of format 1 named although they only look on.
ONCE_NAMED = ("JsonLog", "Live")


class Run:
    """A run as hooks see it. ``step`` counts finished steps, ``losses`` are the last step's means by name.

    ``models`` are those that the run works on: the caller's, or shards of copies of them (see
    :mod:`formwright.training.place`). ``parameters`` are those that move, by name.
    """

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
        place: Place | None = None,
    ) -> None:
        self.objective, self.source, self.recipe = objective, source, recipe
        self.hooks, self.directory, self.keep, self.save_every = list(hooks), directory, keep, save_every
        self.place = place or Place()
        self.trained = ["model", *(name for name, kind in objective.others.items() if kind == "trained")]
        self.models = self.place.enter(models, self.trained)
        self.model = self.models["model"]
        self.parameters = self._chosen()
        self.optimizer, self.scale = adamw(self.parameters, recipe), LossScale(recipe.precision)
        self.step = self.drawn = self.tokens = 0
        self.lr = self.gradient = 0.0
        self.losses: dict[str, float] = {}
        self.curve: list[tuple[int, float]] = []
        self.why = ""
        # The training time that all processes agree on, as of the last step, and where the last checkpoint was.
        self.moment = self._saved_moment = self._seconds = 0.0
        self._since, self._saved_at, self._best = time.perf_counter(), -1, False

    def _chosen(self) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for name in self.trained:
            patterns = self.recipe.trainable if name == "model" else ("*",)
            found |= {f"{name}.{key}": p for key, p in chosen(self.models[name], patterns).items()}
        if not found:
            raise SpecError(
                f"nothing would be trained: trainable={list(self.recipe.trainable)} leaves no parameter that may"
            )
        wide = [key for key, p in found.items() if not p.is_floating_point()]
        if wide:
            raise SpecError(f"{wide[0]} is not a float tensor, so it cannot be trained")
        return found

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
        by_time = 0.0 if minutes is None else self.moment / (60.0 * minutes)
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
        tally, taken, target = Tally(), 0, self.recipe.batch
        while tally.rows < target if target is not None else taken < self.recipe.accumulation:
            batch, tokens = self._draw()
            gen = Gen(step_seed(self.recipe.seed, self.step, taken + self.place.rank), self.step, self.progress)
            with private_random(gen.seed, self.model.device), self._precision():
                self.objective.backward(self.models, batch, gen, lambda losses: self._back(losses, tally))
            tally.fed(self.place, rows_of(batch), tokens)
            taken += self.place.size
        self._finish(tally)

    def _draw(self) -> tuple[Batch, int]:
        """This process's next micro-batch, as hooks leave it, and how many tokens it has."""
        index = self.drawn + self.place.rank
        self.drawn += self.place.size
        batch = check_full(self.source.draw(index), index)
        tokens = tokens_of(batch)
        batch = batch.to(self.model.device)
        for hook in self.hooks:
            batch = hook.batch(self, batch) or batch
        return batch, tokens

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.recipe.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=getattr(torch, self.recipe.precision))

    def _back(self, losses: Mapping[str, Loss], tally: Tally) -> None:
        for hook in self.hooks:
            losses = hook.loss(self, losses) or losses
        if set(losses) != {"model"}:
            raise SpecError(f"this loop has one optimizer, 'model'; the objective gives losses for {', '.join(losses)}")
        loss = losses["model"]
        if not loss.total.requires_grad:
            raise SpecError("the loss does not depend on anything that may train; check trainable=")
        (loss.total * self.scale.factor if self.scale.active else loss.total).backward()
        tally.add(loss)

    def _finish(self, tally: Tally) -> None:
        self.losses, count = tally.means(self.place)
        small = self.place.sum_gradients(list(self.parameters.values()))
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, small / (max(count, 1e-12) * self.scale.factor))
        for hook in self.hooks:
            hook.gradients(self)
        norm = self.place.whole(nn.utils.get_total_norm(gradients))
        self.gradient = float(norm)
        if self._usable() and count:  # a step that has nothing to predict moves nothing
            if self.recipe.clip is not None:
                nn.utils.clip_grads_with_norm_(self.parameters.values(), self.recipe.clip, norm)
            self.lr = self.recipe.lr * factor(
                self.recipe.schedule, self.progress, self.recipe.warmup, self.recipe.floor
            )
            set_lr(self.optimizer, self.lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.tokens = self.step + 1, self.tokens + tally.tokens
        self.curve.append((self.step, self.losses["loss"]))
        self.moment = max(self.place.everyone(self.seconds))
        self._check_end(self.moment / self.step)
        for hook in self.hooks:
            hook.stepped(self)

    def _move(self) -> None:
        recipe = self.recipe
        self.lr = recipe.lr * factor(recipe.schedule, self.progress, recipe.warmup, recipe.floor)
        set_lr(self.optimizer, self.lr)
        self.optimizer.step()

    def _usable(self) -> bool:
        """Whether the gradient may be used; False where only its scale was too large. Diverged for any other."""
        if math.isfinite(self.losses["loss"]):
            if math.isfinite(self.gradient):
                self.scale.step_used()
                return True
            if self.scale.overflowed():
                return False
        raise Diverged(self._diverged())

    def _check_end(self, per_step: float) -> None:
        if self.recipe.steps is not None and self.step >= self.recipe.steps:
            self.stop("all steps done")
        elif self.recipe.minutes is not None and self.moment + per_step / 2 >= 60.0 * self.recipe.minutes:
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
        directory, whole = self.directory, self.place.whole
        if directory is None or (self._saved_at == self.step and not self._best):
            return
        kept = ["model", *(name for name, kind in self.objective.others.items() if kind != "frozen")]
        models = {
            f"{name}.{key}": whole(value)
            for name in kept
            for key, value in checkpoint.tensors_of(self.models[name]).items()
        }
        optimizer = {key: whole(value) for key, value in state_tensors(self.optimizer, self.parameters).items()}
        state = checkpoint.mapped(self._state(), whole)
        self.place.on_main(lambda: directory.save(self.step, models, optimizer, state, keep=self.keep, best=self._best))
        self._saved_at, self._saved_moment, self._best = self.step, self.moment, False

    def _state(self) -> dict[str, Any]:
        return {
            "drawn": self.drawn,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "scale": self.scale.state_dict(),
            "why": self.why,
            "losses": self.losses,
            "objective": self.objective.state_dict(),
            "data": self.source.state_dict(),
            "hooks": [{"hook": type(hook).__name__, "state": hook.state_dict()} for hook in self._bending()],
        }

    def _bending(self) -> list[Hook]:
        return [hook for hook in self.hooks if not hook.watches]

    def due(self) -> bool:
        """Whether a checkpoint is to be written now."""
        if self._best:
            return True
        if self.save_every is not None:
            return self.step % self.save_every == 0
        return self.moment - self._saved_moment >= SAVE_SECONDS

    def load(self, step: int) -> None:
        """Go back to the checkpoint of ``step``."""
        directory = self.directory
        assert directory is not None
        models, optimizer, state = directory.load(step, self.model.device)
        bent = [entry for entry in state["hooks"] if entry["hook"] not in ONCE_NAMED]
        if [entry["hook"] for entry in bent] != [type(hook).__name__ for hook in self._bending()]:
            names = ", ".join(entry["hook"] for entry in bent)
            raise DataError(f"the run was started with hooks {names or 'none'}; resume it with the same")
        self.restore(models, step)
        load_state_tensors(self.optimizer, self.parameters, optimizer, self.place.like)
        self.objective.load_state_dict(state["objective"])
        self.source.load_state_dict(state["data"])
        for hook, entry in zip(self._bending(), bent):
            hook.load_state_dict(entry["state"])
        self.scale.load_state_dict(state.get("scale", {}))
        self.place.on_main(lambda: directory.rewind(step))
        self.step = self._saved_at = step
        self.drawn, self.losses, self.tokens = state["drawn"], dict(state["losses"]), state.get("tokens", 0)
        self.moment = self._saved_moment = self._seconds = state["seconds"]
        # A run that ended by itself stays ended; one that was interrupted goes on.
        self.why = state["why"]

    def restore(self, models: Mapping[str, torch.Tensor], step: int) -> None:
        """Fill the models with the tensors of a checkpoint."""
        assert self.directory is not None
        for name in {key.partition(".")[0] for key in models}:
            own = {key.partition(".")[2]: value for key, value in models.items() if key.partition(".")[0] == name}
            checkpoint.fill(self.models[name], own, str(self.directory.at(step)), self.place.like)

    def restore_best(self) -> None:
        """Fill the models with the best checkpoint's tensors, where the run has one."""
        if self.directory is not None and self.directory.best in self.directory.checkpoints():
            best = self.directory.best
            self.restore(self.directory.load(best, self.model.device)[0], best)

    # ------------------------------------------------------------------ the whole

    def go(self) -> None:
        """Steps until the end; every exit leaves the last whole checkpoint."""
        self._since = time.perf_counter()
        modules = [module for module in self.models.values() if isinstance(module, nn.Module)]
        with self._training():
            for hook in self.hooks:
                hook.stage_start(self)
            if self.recipe.steps == self.step:
                self.stop("all steps done")
            try:
                with only(modules, list(self.parameters.values())), held_interrupt() as asked:
                    self._steps(asked)
            finally:
                for hook in self.hooks:
                    hook.stage_end(self)
                if isinstance(self.optimizer, Interleaved):
                    self.optimizer.close()

    def _steps(self, asked: Callable[[], bool]) -> None:
        while not self.last:
            self.advance()
            if any(self.place.everyone(asked())) and not self.last:
                self.save()
                raise Interrupted(self._interrupted())
            if self.last or self.due():
                self.save()
        self.save()

    @contextlib.contextmanager
    def _training(self) -> Iterator[None]:
        """Within, the models are in the mode that they train in; afterwards in their own."""
        modes = {name: model.training for name, model in self.models.items()}
        towers = [tower for name in self.trained for tower in towers_of(self.models[name])]
        spans = [tower.recompute for tower in towers]
        for name, model in self.models.items():
            model.train(name in self.trained and self.recipe.dropout)
        for tower in towers:
            tower.recompute = self.place.spans(self.recipe.gradient_checkpointing or tower.recompute)
        try:
            yield
        finally:
            for name, model in self.models.items():
                model.train(modes[name])
            for tower, span in zip(towers, spans):
                tower.recompute = span

    def _interrupted(self) -> str:
        if self.directory is None:
            return f"interrupted after step {self.step}; nothing was written (out=RUN keeps checkpoints)"
        return (
            f"interrupted after step {self.step}; {self.directory.at(self.step)} is saved. "
            f"Go on with the same call and resume=True (on the command line: --resume {self.directory.path})"
        )


def towers_of(model: Any) -> list[Any]:
    """The models of one tower that a model or system is made of; none of what else an objective trains."""
    held = list(model.towers.values()) if hasattr(model, "towers") else [model]
    return [tower for tower in held if hasattr(tower, "recompute")]
