"""The training loop: draw, lose, go back, clip, step; hooks between, checkpoints beside, exact to the bit.

A run is a function of (model, data, recipe). The order of the data is a function of (seed, index), all noise is keyed
by (seed, step, micro-batch), and a checkpoint holds everything else (models, optimizer, hooks, objective, task), so a
run that was killed and resumed ends in the same bits as one that was not, on one device with one number of threads.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from formwright.kit.errors import DataError, SpecError
from formwright.kit.journal import Lock
from formwright.models.model import Entry
from formwright.tasks.base import Task
from formwright.training import checkpoint
from formwright.training.checkpoint import RunDirectory
from formwright.training.companions import companions
from formwright.training.hooks import Average, Evaluate, Hook, JsonLog, Live
from formwright.training.recipe import Recipe, make_objective
from formwright.training.run import Run
from formwright.training.sources import source_of


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
    save_every: int | None = None,
    keep: int = 2,
    show: bool | None = None,
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
            a task's "select" split; the best is RUN/best.
        save_every: steps between checkpoints (default: two minutes). keep: how many of the last stay.
        show: progress line; None shows it on a terminal only.

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
    every += list(hooks)
    if evaluate_every is not None:
        if not isinstance(data, Task):
            raise SpecError("evaluate_every scores a task; these data are none: add hooks=[Evaluate(task)] instead")
        every.append(Evaluate(data, every=evaluate_every))
    every += [JsonLog(), Live(event.removesuffix("ed"), show)]
    directory = None if out is None else RunDirectory(out)
    with contextlib.ExitStack() as stack:
        if directory is not None:
            _check_place(directory, resume)
            stack.enter_context(Lock(directory.path))
        run = Run(models, made, source, recipe, every, directory, max(1, keep), save_every)
        if directory is not None:
            _open(run, directory, model, resume)
        run.go()
    scores = {name: value for hook in run.hooks if isinstance(hook, Evaluate) for name, value in hook.scores.items()}
    record = {"recipe": recipe.to_dict(), "data": source.fingerprint(), "scores": scores, "steps": run.step}
    model.history.append(Entry("event", event, record))
    return Trained(model, run.step, run.seconds, run.curve, scores, run.why, None if out is None else Path(out))


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
    tensors = {name: list(value.shape) for name, value in checkpoint.tensors_of(model).items()}
    record: dict[str, Any] = {
        "format": checkpoint.FORMAT,
        "recipe": run.recipe.to_dict(),
        "data": run.source.fingerprint(),
        "tensors": len(tensors),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if not resume:
        directory.write_recipe(record, getattr(model, "tokenizer", None))
        return
    before = directory.read_recipe()
    changed = [
        f"{directory.path} was started with {key}={before['recipe'].get(key)!r}, now it is {value!r}"
        for key, value in record["recipe"].items()
        if before["recipe"].get(key) != value
    ]
    if before["data"] != record["data"]:
        changed.append(f"{directory.path} was started with data {before['data']}, now they are {record['data']}")
    if changed:
        raise DataError("\n".join(changed))
    steps = directory.checkpoints()
    if steps:
        run.load(steps[-1])
    else:
        directory.rewind(0)
