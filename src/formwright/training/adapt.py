"""Adapt: say what each method of fine-tuning will cost, train one, and say what it bought.

A method is any surgery that promises to train only what it adds, besides ``full`` (everything) and ``head`` (the head
alone). Costs are of one training step on the task's own batches: trainable numbers from the reshaped model, memory by
:func:`formwright.measure.memory.predict`, seconds from a few steps that change nothing. What is written is small where
it can be: the adapter alone, to be loaded onto the very model it was made from, or the whole model where the method
changed more than that (``full``, a fresh head).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from formwright import registry
from formwright.hub import save, save_adapter
from formwright.hub.adapters import adapters
from formwright.kit.errors import FormwrightError, Refusal, SpecError, unknown
from formwright.measure.memory import Memory, predict
from formwright.models.batch import Batch, Score
from formwright.objectives.base import Gen
from formwright.surgery import apply, copy, plan, surgery
from formwright.tasks.base import Task
from formwright.training.loop import Trained, train
from formwright.training.recipe import make_objective
from formwright.training.run import rows_of
from formwright.training.sources import source_of
from formwright.training.start import objective_of, with_head

#: Ways that are no surgery: everything trains, or the head alone.
WHOLE = ("full", "head")
#: Peak learning rates that learn something at once; small parameters take large steps.
RATES = {"full": 1e-4, "head": 1e-2}
RATE = 2e-3


@dataclass(frozen=True)
class Price:
    """What one step of a method costs. share: of all numbers of the model. seconds: of a step, None where it was not
    run. refused: why the method does not fit this model, in one sentence; the figures are then zeros."""

    method: str
    trainable: int = 0
    share: float = 0.0
    memory: Memory | None = None
    seconds: float | None = None
    refused: str = ""


@dataclass(frozen=True)
class Adapted:
    """What adapting came to. before: the score on ``select`` before, None where the model had no head for the task.
    whole: whether ``out`` holds a model and not an adapter alone."""

    model: Any
    trained: Trained
    price: Price
    before: Score | None
    select: Score
    test: Score
    whole: bool = False
    out: Path | None = None


def methods() -> list[str]:
    """``full``, ``head`` and every surgery of the adapt family that trains only what it adds."""
    return [*WHOLE, *(name for name in registry.names("surgery") if surgery(name).tunes)]


def attached(model: Any, task: Task, method: str, options: Mapping[str, Any], seed: int) -> Any:
    """``model``, in place, with a head for the task and what ``method`` adds; only what it trains wants gradients."""
    with_head(model, task, seed)
    if method == "full":
        _refuse_options(method, options)
        return model
    if method == "head":
        _refuse_options(method, options)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point() and name.startswith("heads."))
        return model
    learns = getattr(task, "labels", None) and any(name.startswith("heads.") for name, _ in model.named_parameters())
    return apply(model, method, **{**({"train": ["heads.*"]} if learns else {}), **options})


def _check(method: str) -> None:
    if method not in methods():
        raise SpecError(unknown("method", method, methods()))


def _refuse_options(method: str, options: Mapping[str, Any]) -> None:
    if options:
        raise SpecError(f"method {method} takes no options, so {', '.join(options)} cannot be set")


def price(model: Any, task: Task, method: str, *, steps: int = 2, seed: int = 0, **options: Any) -> Price:
    """What ``method`` would cost on this model and task; the model is left as it is."""
    _check(method)
    trial = copy(model, share=True)
    try:
        attached(trial, task, method, options, seed)
        task.bind(trial)
        batch = source_of(task, seed).draw(0)
        memory = predict(trial, *_shape(batch), loss="outputs" if getattr(task, "labels", None) else "states")
        seconds = _seconds(trial, objective_of(task), batch, steps) if steps else None
    except FormwrightError as error:
        return Price(method, refused=str(error).split("\n")[0])
    total = sum(parameter.numel() for parameter in trial.parameters())
    return Price(method, memory.trainable, memory.trainable / total, memory, seconds)


def prices(model: Any, task: Task, names: Sequence[str] | None = None, *, steps: int = 2, seed: int = 0) -> list[Price]:
    """The price of every method (or of ``names``) at its defaults, cheapest in parameters last."""
    found = [price(model, task, name, steps=steps, seed=seed) for name in (names or methods())]
    return sorted(found, key=lambda one: (bool(one.refused), -one.trainable))


def _shape(batch: Batch) -> tuple[int, int]:
    """(rows, mean length) of a batch."""
    rows = rows_of(batch)
    tokens = next(iter(batch.inputs.values()))
    lengths = next(iter(batch.lengths.values()), None)
    total = tokens.shape[0] * tokens.shape[1] if lengths is None else int(lengths.sum())
    return rows, max(1, -(-total // max(1, rows)))


def _seconds(model: Any, objective_name: str, batch: Batch, steps: int) -> float:
    """The least seconds of ``steps`` steps after one to warm up; at a rate of zero no number changes."""
    objective, _ = make_objective(objective_name)
    objective.bind({"model": model})
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=0.0, weight_decay=0.0)
    training, best = model.training, float("inf")
    model.train()
    try:
        for step in range(steps + 1):
            started = time.perf_counter()
            for loss in objective.loss({"model": model}, batch.to(model.device), Gen(step=step)).values():
                (loss.total / loss.count).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step:
                best = min(best, time.perf_counter() - started)
    finally:
        model.train(training)
    return best


def adapt(
    model: Any,
    task: Task,
    method: str = "lora",
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    merge: bool = False,
    lr: float | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    cost: Price | None = None,
    **settings: Any,
) -> Adapted:
    """Attach ``method`` to ``model`` (in place), train it on the task, and write what it made.

    options: of the method. settings: of the recipe (steps, minutes, batch, ...) and of :func:`train`. lr: default by
    the method. merge: fold the adapter into plain weights at the end, and write the whole model. cost: its
    :func:`price`, where it is known already.

    Raises SpecError and Refusal before any work, for a method, option or place that does not fit.
    """
    given = dict(options or {})
    _check(method)
    cost = price(model, task, method, seed=seed, **given) if cost is None else cost
    if cost.refused:
        raise Refusal(cost.refused)
    if merge and (method in WHOLE or not surgery(method).promises(plan(model, method, **given)).mergeable):
        raise Refusal(f"{method} cannot be merged into plain weights; leave merge out")
    heads = len([entry for entry in model.history if entry.name == "head"])
    before = None if _fresh(model, task) else _score(model, task, "select")
    attached(model, task, method, given, seed)
    task.bind(model)
    rate = RATES.get(method, RATE) if lr is None else lr
    run = None if out is None else Path(f"{out}.run")
    done = train(
        model, task, out=run, objective=objective_of(task), resume=resume, seed=seed, lr=rate, event="adapted",
        **settings,
    )  # fmt: skip
    if merge:
        apply(model, "merge")
    select, test = _score(model, task, "select"), _score(model, task, "test")
    grown = len([entry for entry in model.history if entry.name == "head"]) > heads
    alone = not merge and method not in WHOLE and not grown
    if out is not None and alone:
        save_adapter(model, list(adapters(model))[-1], out, overwrite=overwrite or resume)
    elif out is not None:
        save(model, out, overwrite=overwrite or resume)
    return Adapted(model, done, cost, before, select, test, not alone, None if out is None else Path(out))


def _fresh(model: Any, task: Task) -> bool:
    """Whether the model would be given a new head for the task, so that there is nothing to score yet."""
    return len(with_head(copy(model, share=True), task).history) > len(model.history)


def _score(model: Any, task: Task, split: str) -> Score:
    task.bind(model)
    return task.score(model, split)
