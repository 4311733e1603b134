"""Density loss: a soft count of the hidden activations that are not zero, added to any objective (Runwal, Pedapati and
Chen, 2024, 2402.01911).

    D(a) = mean over tokens and hidden units of a^2 / (a^2 + eps)        total + weight * mean over layers of D

``a`` is what enters the last product of a channel mixer, as it declares under the name ``hidden``. D is taken of each
row over its real tokens, and a row weighs as many items as the other objective counts in it, so that a batch may be
cut. In a system each tower has its own mean, and these are summed. It is computed in float32, since a square of 1e-4
is below float16. Cost: one pass over the hidden activations, which are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from formwright.kit.errors import DataError, SpecError
from formwright.models.batch import Batch, Loss
from formwright.models.system import System
from formwright.objectives import base
from formwright.objectives.base import Back, Gen, Models, Objective
from formwright.parts.context import Notes
from formwright.registry import Paper, register

SITE = "hidden"


class Everywhere(set):
    """What to record: every value called ``hidden``, wherever it is."""

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple) and key[1] == SITE


@register("objective", "density", paper=Paper("Runwal et al.", 2024, "2402.01911"), summary="few active hidden units")
class Density(Objective):
    """Another objective, and the density of the hidden activations.

    Args: objective: the other one, a name or ``{"name": ..., options}``. weight: of the density. eps: the square of an
        activation that counts as half.
    """

    def __init__(self, objective: Any = "causal-lm", weight: float = 1.0, eps: float = 1e-7) -> None:
        if eps <= 0:
            raise SpecError(f"density: eps={eps} must be above 0")
        if weight < 0:
            raise SpecError(f"density: weight={weight} must not be negative")
        self.objective, self.weight, self.eps = objective, weight, eps
        self.inner = base.make(objective)
        self.others = self.inner.others

    @property
    def additive(self) -> bool:
        return self.inner.additive

    def bind(self, models: Models) -> None:
        self.inner.bind(models)
        if type(self.inner).backward is not Objective.backward and getattr(self.inner, "chunk", None) is not None:
            raise SpecError("density listens to one pass of the model; leave out chunk of the other objective")

    def loss(self, models: Models, batch: Batch, gen: Gen) -> Mapping[str, Loss]:
        if self.weight == 0.0:
            return self.inner.loss(models, batch, gen)
        with base.hearing(Everywhere()) as heard:
            losses = dict(self.inner.loss(models, batch, gen))
        loss, items = losses["model"], self.inner.items(models, batch, gen)
        if abs(float(items.sum()) - float(loss.count)) > 1e-6 * max(1.0, float(loss.count)):
            raise SpecError(
                f"density: the other objective counts {float(loss.count):g} items, its rows {float(items.sum()):g}; "
                "it has to say by items() how many are of each row"
            )
        rows = densities(models["model"], batch, heard, lambda a: soft(a, self.eps))
        density = (rows * items.to(rows.dtype)).sum()
        total = loss.total + self.weight * density
        losses["model"] = Loss(total, loss.count, {**loss.parts, "density": density.detach()})
        return losses

    def backward(self, models: Models, batch: Batch, gen: Gen, back: Back) -> Mapping[str, Loss]:
        if self.weight == 0.0:
            return self.inner.backward(models, batch, gen, back)
        return super().backward(models, batch, gen, back)

    def items(self, models: Models, batch: Batch, gen: Gen) -> Tensor:
        return self.inner.items(models, batch, gen)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state)


def soft(activations: Tensor, eps: float = 1e-7) -> Tensor:
    """a^2 / (a^2 + eps) of every activation, at least in float32."""
    square = base.wide(activations).square()
    return square / (square + eps)


def densities(model: Any, batch: Batch, heard: Iterable[Notes], measured: Any) -> Tensor:
    """(B,) of every row: ``measured`` of its hidden activations, averaged over its real tokens and the hidden units,
    then over layers; the means of a system's towers are summed.

    Raises SpecError where no part declares its hidden activations, DataError for a row of no tokens.
    """
    found: dict[str, list[Tensor]] = {}
    for notes in heard:
        for (path, _), value in notes.got.items():
            tower = _tower(model, path)
            own = batch if tower is None else model.inputs_of(batch, tower)
            found.setdefault(tower or "", []).append(_of_rows(measured(value).mean(-1), own, path))
    if not found:
        raise SpecError(
            "density found no part that declares its hidden activations; mlp and gated-mlp do, and the model has none"
        )
    return torch.stack([torch.stack(layers).mean(0) for layers in found.values()]).sum(0)


def activation_density(model: Any, batch: Batch, tolerance: float = 0.0) -> float:
    """The share of hidden activations above ``tolerance`` in size, exactly counted: over the real tokens of each row,
    then over layers and rows; of a system the sum over its towers. Without gradient, in evaluation mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            notes = Notes(want=Everywhere())
            model(batch, notes=notes)
            return float(densities(model, batch, [notes], lambda a: (a.abs() > tolerance).float()).mean())
    finally:
        model.train(training)


def _tower(model: Any, path: str) -> str | None:
    """The tower a path lies in; None in a model, which is its own."""
    if not isinstance(model, System):
        return None
    first = path.partition(".")[0]
    return first if first in (*model.towers, *model.aliases) else model.spec.output


def _of_rows(values: Tensor, batch: Batch, path: str) -> Tensor:
    """(B, L), or (1, T) packed, -> (B,): the mean of each row's real tokens."""
    sizes = base.sizes_of(batch)
    if not int(sizes.min() if len(sizes) else 0):
        raise DataError("density: a row has no tokens, so it has no density; leave empty rows out")
    whole = batch.inputs[base.tokens_of(batch)].shape[:2]
    if values.shape != whole:
        raise DataError(
            f"density: the activations of {path} are {tuple(values.shape)}, the tokens {tuple(whole)}; a model that "
            "changes the length of its stream has no density a row"
        )
    if batch.offsets:
        return torch.stack([part.mean() for part in values[0].split(sizes.tolist())])
    valid = torch.arange(values.shape[1], device=values.device)[None] < sizes[:, None]
    return torch.where(valid, values, 0.0).sum(1) / sizes
