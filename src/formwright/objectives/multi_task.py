"""Multi-task learning: several objectives over one model, each on the rows that carry its name.

    total = sum over tasks of w_i * total_i / per_i        count = sum over tasks of count_i / per_i

The weights w_i are fixed, learned as uncertainties, or follow how fast each task improves; gradient surgery takes out
of each task's gradient what opposes another's. Which tasks a batch holds is the data's business: mixed rows, or one
task a batch in the shares of :mod:`formwright.training.mixture`. Torbarina et al., 2023 (2308.08234) is a survey.
Cost: one pass a task that is present; surgery keeps a gradient a task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from formwright.kit.errors import DataError, SpecError, all_of, nearest, unknown
from formwright.models.batch import Batch, Loss
from formwright.objectives import base
from formwright.objectives._balance import Average, Fixed, Uncertainty
from formwright.objectives._rows import take
from formwright.objectives._surgery import projected, shared
from formwright.objectives.base import Back, Gen, Models, Objective
from formwright.parts.context import keyed_generator
from formwright.registry import Paper, register

BALANCES = ("fixed", "uncertainty", "average")
SURGERIES = ("pcgrad",)


@register("objective", "multi-task", paper=Paper("Torbarina et al.", 2023, "2308.08234"), summary="several at once")
class MultiTask(Objective):
    """Every row's ``meta`` says ``{"task": NAME}``; a task's targets are ``NAME.tokens`` or the like, or plain where
    the batch has no such name.

    Args: tasks: name -> objective (a name or ``{"name": ..., options}``). weights: name -> weight of its loss, 1 unless
        given. per: name -> how many of its items weigh as one, such as the tokens of a row where other tasks count
        rows. balance: ``fixed``; ``uncertainty`` (Kendall et al., 2018), which needs ``others={"weights":
        uncertainties(names)}``; ``average`` (dynamic weight averaging, Liu et al., 2019). window, temperature: of the
        last, steps over which losses are averaged and how even the weights stay. surgery: None or ``pcgrad`` (Yu et
        al., 2020), within one micro-batch, so that cutting a batch changes it.
    """

    def __init__(
        self,
        tasks: Mapping[str, Any],
        weights: Mapping[str, float] | None = None,
        per: Mapping[str, float] | None = None,
        balance: str = "fixed",
        window: int = 100,
        temperature: float = 2.0,
        surgery: str | None = None,
    ) -> None:
        self.tasks, self.weights, self.per = dict(tasks), dict(weights or {}), dict(per or {})
        self.balance, self.window, self.temperature, self.surgery = balance, window, temperature, surgery
        problems = [] if self.tasks else ["multi-task: tasks is empty; name at least one with its objective"]
        problems += [] if balance in BALANCES else [unknown("balance of tasks", balance, BALANCES)]
        problems += [] if surgery is None or surgery in SURGERIES else [unknown("surgery", surgery, SURGERIES)]
        for what, given, least in (("weights", self.weights, 0.0), ("per", self.per, 1e-12)):
            problems += [unknown(f"task of {what}", name, self.tasks) for name in given if name not in self.tasks]
            problems += [
                f"multi-task: {what} of {name} is {value}; it must be {'at least' if least == 0 else 'above'} 0"
                for name, value in given.items()
                if value < least
            ]
        all_of(SpecError, problems)
        self.inner = {name: base.make(what) for name, what in self.tasks.items()}
        self.others = {key: kind for inner in self.inner.values() for key, kind in inner.others.items()}
        if balance == "uncertainty":
            self.others["weights"] = "trained"
        self._balance = {
            "fixed": Fixed,
            "uncertainty": Uncertainty,
            "average": lambda: Average(list(self.tasks), window, temperature),
        }[balance]()

    @property
    def additive(self) -> bool:
        return self.surgery is None and all(inner.additive for inner in self.inner.values())

    def bind(self, models: Models) -> None:
        if self.balance == "uncertainty" and "weights" not in models:
            raise DataError(
                "multi-task with balance='uncertainty' trains a weight a task: pass others={'weights': "
                f"uncertainties({list(self.tasks)})}} (formwright.objectives.multi_task.uncertainties)"
            )
        for inner in self.inner.values():
            inner.bind(models)

    def loss(self, models: Models, batch: Batch, gen: Gen) -> Mapping[str, Loss]:
        return {"model": self._sum(dict(self._losses(models, batch, gen)))}

    def backward(self, models: Models, batch: Batch, gen: Gen, back: Back) -> Mapping[str, Loss]:
        if self.surgery is None:
            return super().backward(models, batch, gen, back)
        losses = dict(self._losses(models, batch, gen))
        trained = [models["model"], *(models[name] for name, kind in self.others.items() if kind == "trained")]
        moved = [p for module in trained for p in module.parameters() if p.requires_grad]
        gradients = [torch.autograd.grad(loss.total, moved, allow_unused=True) for loss in losses.values()]
        changed, conflicts = projected(gradients, gen.generator("pcgrad"))
        whole = self._sum(losses)
        places, summed = shared(changed)
        total = base.carrying(whole.total, [moved[place] for place in places], summed)
        told = {**whole.parts, "conflicts": whole.count * conflicts}
        found = {"model": Loss(total, whole.count, told)}
        back(found)
        return found

    def _losses(self, models: Models, batch: Batch, gen: Gen) -> Iterator[tuple[str, Loss]]:
        """(task, its weighed loss) for every task with rows in the batch."""
        for name, rows in self._rows(batch).items():
            own = replace(gen, seed=keyed_generator(gen.seed, f"task {name}").initial_seed())
            losses = self.inner[name].loss(models, self._batch(batch, name, rows), own)
            if set(losses) != {"model"}:
                raise SpecError(f"multi-task: {name} has several optimizers; one is all that tasks can share")
            yield name, self._weighed(name, losses["model"], models, gen)

    def _weighed(self, name: str, loss: Loss, models: Models, gen: Gen) -> Loss:
        scale = 1.0 / self.per.get(name, 1.0)
        count = torch.as_tensor(loss.count).double() * scale
        total = self._balance(name, loss.total * scale, count, models, gen.step) * self.weights.get(name, 1.0)
        return Loss(total, count, {name: (loss.total * scale).detach()})

    @staticmethod
    def _sum(losses: Mapping[str, Loss]) -> Loss:
        total = torch.stack([loss.total for loss in losses.values()]).sum()
        count = torch.stack([loss.count for loss in losses.values()]).sum()
        return Loss(total, count, {key: part for loss in losses.values() for key, part in loss.parts.items()})

    def _rows(self, batch: Batch) -> dict[str, list[int]]:
        """Task -> its rows, in the order of ``tasks``."""
        found: dict[str, list[int]] = {name: [] for name in self.tasks}
        if not batch.meta:
            raise DataError("multi-task: the batch does not say which task its rows are of; meta holds {'task': NAME}")
        for row, said in enumerate(batch.meta):
            name = said.get("task")
            if name not in found:
                raise DataError(
                    f"multi-task: row {row} is of task {name!r}, which is none here{nearest(str(name), found)}"
                )
            found[name].append(row)
        return {name: rows for name, rows in found.items() if rows}

    @staticmethod
    def _batch(batch: Batch, name: str, rows: list[int]) -> Batch:
        own = batch if len(rows) == len(batch.meta) else take(batch, rows)
        named = {key.removeprefix(f"{name}."): v for key, v in own.targets.items() if key.startswith(f"{name}.")}
        return own.replace(targets=named or own.targets)

    def items(self, models: Models, batch: Batch, gen: Gen) -> Tensor:
        sizes = base.sizes_of(batch)
        out = torch.zeros(len(sizes), dtype=torch.float64, device=sizes.device)
        for name, rows in self._rows(batch).items():
            own = replace(gen, seed=keyed_generator(gen.seed, f"task {name}").initial_seed())
            held = self.inner[name].items(models, self._batch(batch, name, rows), own)
            out[rows] = held.to(out.dtype) / self.per.get(name, 1.0)
        return out

    def state_dict(self) -> dict[str, Any]:
        return {
            "balance": self._balance.state_dict(),
            "tasks": {name: inner.state_dict() for name, inner in self.inner.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._balance.load_state_dict(state["balance"])
        for name, inner in self.inner.items():
            inner.load_state_dict(state["tasks"][name])


def uncertainties(names: list[str] | tuple[str, ...], rate: float = 1.0) -> nn.Module:
    """What ``balance="uncertainty"`` trains: s_i of each task, 0 at the start. ``rate`` times as fast as the model."""
    return Uncertainty.module(names, rate)
