"""Contrastive learning: of all second texts in the batch, the right one is closest (van den Oord et al., 2018).

    total = - sum over pairs i of log( exp(cos(u_i, v_i) / T) / sum over j of exp(cos(u_i, v_j) / T) )

and, symmetric, the mean of that and the same with u and v exchanged. The other pairs are the negatives, so a larger
batch is a harder question, and cutting it into micro-batches changes it; ``chunk`` instead runs the model over a few
pairs at a time, once without gradient and once more with it, and gives the gradients of the whole batch (Gao et al.,
2021, 2101.06983). Cost: two passes and the products of all vectors; with ``chunk`` a third pass, and the memory of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.kit.errors import DataError, SpecError
from formwright.models.batch import Batch, Loss
from formwright.models.system import System
from formwright.objectives import base
from formwright.objectives._rows import take
from formwright.objectives.base import Back, Gen, Models, Objective
from formwright.parts.context import keyed_generator
from formwright.registry import Paper, register


@register("objective", "contrastive", paper=Paper("van den Oord et al.", 2018, "1807.03748"), summary="the right pair")
class Contrastive(Objective):
    """Rows 2i and 2i + 1 are the two sides of pair i; with ``towers`` row i of each of two towers of a system.

    Args: temperature: T. symmetric: also find the first text for each second. chunk: pairs run at a time, None for
        all at once. towers: names of the towers of the two sides. head: name of the head that gives the vectors.
    """

    def __init__(
        self,
        temperature: float = 0.05,
        symmetric: bool = True,
        chunk: int | None = None,
        towers: tuple[str, ...] | list[str] = (),
        head: str | None = None,
    ) -> None:
        if temperature <= 0:
            raise SpecError(f"contrastive: temperature={temperature} must be above 0")
        if chunk is not None and chunk < 1:
            raise SpecError(f"contrastive: chunk={chunk} pairs must be at least 1, or None for all at once")
        if towers and len(towers) != 2:
            raise SpecError(f"contrastive: towers={list(towers)} must name the towers of the two sides")
        self.temperature, self.symmetric, self.chunk = temperature, symmetric, chunk
        self.towers, self.head = tuple(towers), head

    @property
    def additive(self) -> bool:
        return False

    def bind(self, models: Models) -> None:
        model = models["model"]
        for name in self.towers or (None,):
            owner = model if name is None else model.tower(name)
            base.head_of(owner, ("vectors",), "contrastive", self.head)

    def loss(self, models: Models, batch: Batch, gen: Gen) -> Mapping[str, Loss]:
        model, notes = models["model"], base.listening()
        u, v = self._sides(self._vectors(model, batch, gen, notes))
        total, count, parts = self._compared(u, v)
        whole, more = base.with_auxiliary(total, count, notes)
        return {"model": Loss(whole, count, {**parts, **more})}

    def backward(self, models: Models, batch: Batch, gen: Gen, back: Back) -> Mapping[str, Loss]:
        if self.chunk is None:
            return super().backward(models, batch, gen, back)
        model, pieces = models["model"], list(self._pieces(batch, gen))
        with torch.no_grad():
            made = [self._vectors(model, piece, own, None) for piece, own in pieces]
        sides = [side.detach().requires_grad_() for side in map(torch.cat, zip(*made))]
        with torch.enable_grad():
            total, count, parts = self._compared(*self._sides(tuple(sides)))
        gradients = torch.autograd.grad(total, sides)
        for index, (piece, own) in enumerate(pieces):
            notes = base.listening()
            given = [part.split([len(m[side]) for m in made])[index] for side, part in enumerate(gradients)]
            # The value and the count of the whole batch go with the first piece, so that each is told once.
            value = total.detach() if index == 0 else torch.zeros_like(total)
            carried = base.carrying(value, self._vectors(model, piece, own, notes), given)
            pairs = len(made[index][0]) // (1 if self.towers else 2)
            whole, more = base.with_auxiliary(carried, count.new_tensor(pairs), notes)
            back({"model": Loss(whole, count if index == 0 else count * 0, {**(parts if index == 0 else {}), **more})})
        return {"model": Loss(total.detach(), count, parts)}

    def items(self, models: Models, batch: Batch, gen: Gen) -> Tensor:
        sizes = base.sizes_of(batch)
        return torch.ones_like(sizes) if self.towers else torch.full(sizes.shape, 0.5, device=sizes.device)

    def _vectors(self, model: Any, batch: Batch, gen: Gen, notes: Any) -> tuple[Tensor, ...]:
        """The vectors of the rows; of both towers, where there are two."""
        how = {"notes": notes, **gen.context()}
        if not self.towers:
            name, _ = base.head_of(model, ("vectors",), "contrastive", self.head)
            return (model(batch, head=name, **how),)
        if not isinstance(model, System):
            raise DataError(f"contrastive: towers {' and '.join(self.towers)} are those of a system; this is one model")
        return tuple(model(batch, tower=name, head=self.head, **how) for name in self.towers)

    def _sides(self, vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        if self.towers:
            return vectors[0], vectors[1]
        rows = vectors[0]
        if len(rows) % 2:
            raise DataError(f"contrastive reads pairs of neighbouring rows; {len(rows)} rows are an odd number")
        return rows[0::2], rows[1::2]

    def _compared(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        scores = similarity(u, v) / self.temperature
        right = torch.arange(len(scores), device=scores.device)
        total = info_nce(scores, self.symmetric)
        found = (scores.argmax(1) == right).sum() if len(scores) else right.sum()
        return total, torch.tensor(len(scores), device=scores.device), {"accuracy": found.detach().float()}

    def _pieces(self, batch: Batch, gen: Gen) -> Iterator[tuple[Batch, Gen]]:
        """The batch cut into ``chunk`` pairs at a time, each with noise of its own."""
        assert self.chunk is not None
        rows = len(base.sizes_of(batch))
        step = self.chunk if self.towers else 2 * self.chunk
        for index, start in enumerate(range(0, rows, step)):
            own = replace(gen, seed=keyed_generator(gen.seed, f"chunk {index}").initial_seed())
            yield take(batch, range(start, min(start + step, rows))), own


def similarity(u: Tensor, v: Tensor) -> Tensor:
    """(P, W) twice -> (P, P) cosines; a vector of length 0 is at right angles to all."""
    return F.normalize(base.wide(u), dim=-1) @ F.normalize(base.wide(v), dim=-1).T


def info_nce(scores: Tensor, symmetric: bool) -> Tensor:
    """(P, P) -> the summed cross entropy of the diagonal in its row, or the mean of that and the one in its column."""
    right = torch.arange(len(scores), device=scores.device)
    total = F.cross_entropy(scores, right, reduction="sum")
    return 0.5 * (total + F.cross_entropy(scores.T, right, reduction="sum")) if symmetric else total
