"""The training loop: draw, lose, go back, clip, step; hooks between, checkpoints beside, exact to the bit.

A run is a function of (model, data, recipe). The order of the data is a function of (seed, index), all noise is keyed
by (seed, step, micro-batch), and a checkpoint holds everything else (models, optimizer, hooks, objective, task), so a
run that was killed and resumed ends in the same bits as one that was not, on one device with one number of threads.
Under ``torchrun`` the same call trains one model in all processes, with the same batches a step.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from formwright.kit import toml
from formwright.kit.errors import DataError, SpecError
from formwright.kit.journal import Lock
from formwright.models.model import Entry
from formwright.tasks.base import Task
from formwright.training import checkpoint
from formwright.training.checkpoint import RunDirectory
from formwright.training.companions import companions
from formwright.training.hooks import Average, EarlyStopping, Evaluate, Hook
from formwright.training.place import here
from formwright.training.recipe import FREE, Recipe, make_objective
from formwright.training.run import Run
from formwright.training.sources import source_of
from formwright.training.watchers import JsonLog, Live, Picture, TensorBoard


@dataclass(frozen=True)
class Trained:
    """What a run came to: ``losses`` are (step, loss per item) of every step of this process, ``why`` it ended."""

    model: Any
    steps: int
    seconds: float
    losses: list[tuple[int, float]] = field(default_factory=list)
    scores: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    out: Path | None = None


def train(
    model: Any,
    data: Any,
    *,
    objective: Any = None,
    recipe: Recipe | None = None,
    others: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    hooks: Sequence[Hook] = (),
    split: str | None = None,
    evaluate_every: int | None = None,
    patience: int | None = None,
    save_every: int | None = None,
    keep: int = 2,
    show: bool | None = None,
    plot: bool = True,
    tensorboard: bool = False,
    shard: bool = False,
    event: str = "trained",
    **settings: Any,
) -> Trained:
    """Train a model (or system) in place and write an event into its history.

    Args:
        data: a task, a function (seed, index) -> Batch, or a list of batches. split: of a task; default "train" where
            it has one, else "calibrate".
        objective: a name, ``{"name": ..., options}`` or an Objective; default "causal-lm".
        recipe, settings: a :class:`Recipe`, and fields of one that override it (steps, minutes, lr, batch, seed ...).
        others: models that the objective names beside this one, such as {"teacher": model}.
        out: run directory (see :mod:`formwright.training.checkpoint`). resume: go on with what is there.
        hooks: called in list order, before the built-in log and progress line. evaluate_every: steps between scores of
            a task's "select" split; the best is RUN/best. patience: so many scores in a row that are no better end the
            run, and the model gets the best checkpoint's weights (with ``out``).
        save_every: steps between checkpoints (default: two minutes). keep: how many of the last stay.
        show: progress line; None shows it on a terminal only. plot: draw RUN/run.png at the end. tensorboard: write
            RUN/tensorboard as well.
        shard: under torchrun, cut the model over the processes instead of holding it in each; ``model`` then changes
            at the end only, and an interrupted run's weights are in its directory.

    Raises:
        SpecError, DataError: what is wrong with the recipe, the data or the run directory, before any work.
        Diverged: the loss stopped being a number. Interrupted: Ctrl-C, after saving.
    """
    wanted = objective if objective is not None else (recipe.objective if recipe is not None else "causal-lm")
    made, described = make_objective(wanted)
    plain = {**(recipe.to_dict() if recipe is not None else {}), **settings, "objective": described}
    recipe = Recipe.from_dict(plain)
    models = {"model": model, **_others(made, model, others or {})}
    made.bind(models)
    if isinstance(data, Task):
        data.bind(model)
    source = source_of(data, recipe.seed, split)
    every: list[Hook] = [Average(name, recipe.ema) for name, kind in made.others.items() if kind == "ema"]
    every += companions(model)
    every += [*hooks, *_scoring(data, evaluate_every, patience)]
    place = here(shard)
    if recipe.offload and (shard or companions(model)):
        other = "shard divides it" if shard else "an adapter of this model sets weights of its own at every step"
        raise SpecError(f"offload keeps the optimizer's state whole and by itself on the host, and {other}")
    if place.main:
        every += [JsonLog(), Live(event.removesuffix("ed"), show)]
        every += [TensorBoard()] if tensorboard else []
        every += [Picture(getattr(model, "name", ""))] if plot else []
    directory = None if out is None else RunDirectory(out)
    with contextlib.ExitStack() as stack:
        if directory is not None:
            place.on_main(lambda: _check_place(directory, resume))
            if place.main:
                stack.enter_context(Lock(directory.path))
        run = Run(models, made, source, recipe, every, directory, max(1, keep), save_every, place)
        if directory is not None:
            _open(run, directory, model, resume)
        run.go()
        if patience is not None:
            run.restore_best()
        place.leave()
    scores = {name: value for hook in run.hooks if isinstance(hook, Evaluate) for name, value in hook.scores.items()}
    record = {"recipe": recipe.to_dict(), "data": source.fingerprint(), "scores": scores, "steps": run.step}
    model.history.append(Entry("event", event, record))
    return Trained(model, run.step, run.seconds, run.curve, scores, run.why, None if out is None else Path(out))


def _scoring(data: Any, every: int | None, patience: int | None) -> list[Hook]:
    """Scores of a task every so many steps, and an end where they grow no more."""
    if every is None:
        if patience is not None:
            raise SpecError(f"patience={patience} counts scores: say how often to score with evaluate_every")
        return []
    if not isinstance(data, Task):
        raise SpecError("evaluate_every scores a task; these data are none: add hooks=[Evaluate(task)] instead")
    scoring: list[Hook] = [Evaluate(data, every=every)]
    return scoring if patience is None else [EarlyStopping(patience, 0.0, data.higher_is_better), *scoring]


def _others(objective: Any, model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, kind in objective.others.items():
        if name in given:
            found[name] = given[name]
        elif kind == "ema":
            found[name] = copy.deepcopy(model)
    spare = [name for name in given if name not in objective.others]
    if spare:
        takes = ", ".join(objective.others) or "no other models"
        raise SpecError(f"others has {', '.join(spare)}; this objective takes {takes}")
    return found


def _check_place(directory: RunDirectory, resume: bool) -> None:
    if directory.begun and not resume:
        raise DataError(f"{directory.path} already holds a run: go on with it by resume=True, or choose another name")
    if resume and not directory.begun:
        raise DataError(f"there is no run to resume in {directory.path}")
    if not directory.begun and directory.path.is_dir() and any(directory.path.iterdir()):
        held = [entry.name for entry in directory.path.iterdir() if entry.name not in ("lock", "tokenizer")]
        if held:
            raise DataError(f"{directory.path} is not empty and holds no run ({held[0]} …); choose another name")


def _open(run: Run, directory: RunDirectory, model: Any, resume: bool) -> None:
    """Write what the run is started with, or go on from the last checkpoint of one that was started with the same."""
    recipe, data = run.recipe.to_dict(), toml.plain(run.source.fingerprint())
    if not resume:
        start: dict[str, Any] = {
            "data": data,
            "tensors": len(checkpoint.tensors_of(model)),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        run.place.on_main(lambda: directory.write_recipe(recipe, start, getattr(model, "tokenizer", None)))
        return
    before, start = directory.read_recipe()
    changed = [
        f"{directory.path} was started with {key}={before[key]!r}, now it is {value!r}"
        for key, value in recipe.items()
        if before[key] != value and key not in FREE
    ]
    if toml.plain(start["data"]) != data:
        changed.append(f"{directory.path} was started with data {start['data']}, now they are {data}")
    if changed:
        raise DataError("\n".join(changed))
    steps = directory.checkpoints()
    if steps:
        run.load(steps[-1])
    else:
        run.place.on_main(lambda: directory.rewind(0))
