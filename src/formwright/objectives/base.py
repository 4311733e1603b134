"""Objectives: what one training step makes smaller, as sums with counts, so that accumulation weighs correctly.

An objective is one file under ``objectives/`` with one registered class; nothing else is edited::

    @register("objective", "causal-lm", paper=Paper(...))
    class CausalLM(Objective): ...

``loss`` gives one entry per optimizer. ``total`` is a *sum* over ``count`` items: the loop adds the gradients of all
micro-batches and divides once by the sum of their counts, so cutting a batch into pieces changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from formwright import registry
from formwright.kit.errors import DataError, SpecError, all_of, unknown
from formwright.models.batch import EMPTY, Batch, Loss
from formwright.models.model import Model
from formwright.models.system import System
from formwright.parts.context import Context, Notes, keyed_generator

#: The models of a step by name: ``"model"`` is the one being made, others are named by the objective.
Models = Mapping[str, Any]
#: Carries gradients back: called with the losses of :meth:`Objective.loss`.
Back = Callable[[Mapping[str, Loss]], None]
#: Logits held at once by objectives over a vocabulary, in numbers (2^25 float32 are 128 MiB).
LOGITS = 1 << 25
#: The target of what is not to be predicted.
IGNORED = -100


@dataclass(frozen=True)
class Gen:
    """The randomness and the place of one micro-batch: ``seed`` depends on (run seed, step, micro-batch) only."""

    seed: int = 0
    step: int = 0
    progress: float = 0.0

    def generator(self, name: str = "") -> torch.Generator:
        """A CPU generator keyed by (seed, name)."""
        return keyed_generator(self.seed, f"objective.{name}")

    def context(self) -> dict[str, Any]:
        """The fields of a model's context that depend on the step."""
        return {"seed": self.seed, "progress": self.progress}


class Objective:
    """See the module. ``others`` names the models it needs beside ``"model"`` and what becomes of each: ``frozen``,
    ``ema`` (a moving average of the model) or ``trained`` (by the same optimizer)."""

    others: Mapping[str, Literal["frozen", "ema", "trained"]] = EMPTY

    @property
    def additive(self) -> bool:
        """Whether the losses of parts of a batch sum to that of the whole, as nearly always."""
        return True

    def bind(self, models: Models) -> None:
        """Every complaint about the models (a missing head, widths that differ) before any work."""

    def loss(self, models: Models, batch: Batch, gen: Gen) -> Mapping[str, Loss]:
        """Losses by the name of the optimizer that makes each smaller; nearly always just ``"model"``."""
        raise NotImplementedError

    def backward(self, models: Models, batch: Batch, gen: Gen, back: Back) -> Mapping[str, Loss]:
        """Compute the losses, carry their gradients back, and return them.

        An objective with passes of its own (gradient cache, truncated windows, inner loops) overrides this and may
        call ``back`` several times.
        """
        losses = self.loss(models, batch, gen)
        back(losses)
        return losses

    def items(self, models: Models, batch: Batch, gen: Gen) -> Tensor:
        """(B,) how many of the items that ``loss`` counts come from each row, so that they sum to its count.

        Unless overridden: a row's tokens or labels with a target, or 1 where the batch has none of these.
        """
        wanted = batch.targets.get("tokens", batch.targets.get("label"))
        sizes = sizes_of(batch)
        if wanted is None or wanted.dim() == 1:
            return torch.ones_like(sizes) if wanted is None else (wanted != IGNORED).long()
        chosen = (wanted != IGNORED).long()
        if not batch.offsets:
            return chosen.sum(1)
        return torch.stack([part.sum() for part in chosen[0].split(sizes.tolist())])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep of it: plain data and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The opposite of :meth:`state_dict`."""


def make(what: Any) -> Objective:
    """An objective from a name, ``{"name": ..., options}`` or an objective; SpecError for unknown names and options."""
    if isinstance(what, Objective):
        return what
    options = {"name": what} if isinstance(what, str) else dict(what) if isinstance(what, Mapping) else {}
    name = options.pop("name", None)
    if name is None:
        raise SpecError(f"an objective is a name or {{'name': NAME, options}}, not {what!r}")
    target = registry.resolve("objective", name)
    known = list(inspect.signature(target).parameters)
    all_of(SpecError, [f"{name}: " + unknown("option", key, known) for key in options if key not in known])
    return target(**options)


def head_of(model: Any, kinds: tuple[str, ...], wanted: str, named: str | None = None) -> tuple[str, Any]:
    """(name, head) of the first head whose kind is one of ``kinds`` (or of the one ``named``); DataError otherwise."""
    owner = reader(model)
    if named is not None:
        return named, owner.head(named)
    for name, head in owner.heads.items():
        if head.kind in kinds:
            return name, head
    found = ", ".join(f"{name} ({head.kind})" for name, head in owner.heads.items()) or "none"
    raise DataError(f"{wanted} needs a head of kind {' or '.join(kinds)}; {model.name or 'the model'} has {found}")


def reader(model: Any) -> Model:
    """The tower whose head answers: the model itself, or a system's output tower."""
    return model.tower(model.spec.output) if isinstance(model, System) else model


def last_states(
    model: Any, batch: Batch, after: tuple[str, ...] = (), begin: tuple[str, Tensor] | None = None, **context: Any
) -> tuple[Tensor, Context, dict[str, Tensor]]:
    """The stream before the head (after the final norm), its context, and the stream after each item of ``after``.

    ``begin``: an item id and the stream before it, which then takes the place of the items before that one.
    """
    owner, own, fields = reader(model), batch, dict(context)
    if isinstance(model, System):
        name = model.spec.output
        own = model.inputs_of(batch, name)
        fields["memory"] = model.remember(batch, name, **context)
    x, ctx = owner.embed(own, **fields)
    found: dict[str, Tensor] = {}
    if begin is not None:
        x, ctx = owner.run(begin[1].to(x.dtype), ctx, start=begin[0])
    elif not after:
        x, ctx = owner.run(x, ctx)
    else:
        for item in owner.items():
            x, ctx = item(x, ctx)
            if item.id in after:
                found[item.id] = x
    return (x if owner.final_norm is None else owner.final_norm(x)), ctx, found


def tokens_of(batch: Batch) -> str:
    """The name of the input whose rows are counted: the first that lengths or offsets are given for, else the first."""
    return next(iter(batch.offsets or batch.lengths or batch.inputs))


def sizes_of(batch: Batch) -> Tensor:
    """(B,) the real tokens of each row, or of each document where the batch is packed."""
    field = tokens_of(batch)
    if batch.offsets:
        return batch.offsets[field].diff()
    held = batch.inputs[field]
    full = torch.full(held.shape[:1], held.shape[1] if held.dim() > 1 else 1, device=held.device)
    return batch.lengths.get(field, full)


def spans_of(batch: Batch, tokens: Tensor) -> Iterator[tuple[int, slice]]:
    """Where each row's real tokens stand in ``tokens`` (B, L), or (1, T) packed."""
    sizes = sizes_of(batch).tolist()
    start = 0
    for row, size in enumerate(sizes):
        yield (0, slice(start, start + size)) if batch.offsets else (row, slice(0, size))
        start += size


#: What the passes of objectives also record while somebody listens in, and the notes they have taken.
_heard: ContextVar[tuple[Any, list[Notes]] | None] = ContextVar("heard", default=None)


@contextmanager
def hearing(want: Any) -> Iterator[list[Notes]]:
    """Within, the passes of objectives record ``want`` too; the notes of each are added to the list."""
    found: list[Notes] = []
    token = _heard.set((want, found))
    try:
        yield found
    finally:
        _heard.reset(token)


def listening() -> Notes:
    """Notes that collect the auxiliary losses which parts declare, and what is heard by :func:`hearing`."""
    heard = _heard.get()
    if heard is None:
        return Notes()
    notes = Notes(want=heard[0])
    heard[1].append(notes)
    return notes


def with_auxiliary(total: Tensor, count: Tensor, notes: Notes | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Add what the parts declared (means, so each counts once per item) and say how much it was."""
    if notes is None or not notes.losses:
        return total, {}
    extra = torch.stack([loss.float() for loss in notes.losses]).sum() * count
    return total + extra, {"auxiliary": extra.detach()}


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 where it is that already: what losses are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def carrying(value: Tensor, tensors: Iterable[Tensor], gradients: Iterable[Tensor]) -> Tensor:
    """A scalar equal to ``value`` whose backward pass hands ``gradients`` to ``tensors``."""
    given = torch.stack([(wide(t) * wide(g.detach())).sum() for t, g in zip(tensors, gradients)]).sum()
    return value.detach() + (given - given.detach())


def token_chunks(count: int, vocab: int, most: int = LOGITS) -> Iterator[slice]:
    """Slices of ``count`` tokens whose logits over ``vocab`` stay below ``most`` numbers."""
    size = max(1, most // max(1, vocab))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def flat_context(ctx: Context, chunk: int) -> Context:
    """The context of tokens taken out of their rows: no layout, and noise keyed by the chunk."""
    return ctx.replace(lengths=None, offsets=None, borders=None, positions=None, origin=None, marks=EMPTY).at(
        f"chunk{chunk}"
    )


def target(batch: Batch, name: str, objective: str) -> Tensor:
    """``batch.targets[name]``; DataError that lists what the batch has."""
    if name not in batch.targets:
        raise DataError(
            f"{objective} compares with targets[{name!r}]; the batch has {', '.join(batch.targets) or 'no targets'}"
        )
    return batch.targets[name]


def check_unit(name: str, value: float, low: float, high: float) -> float:
    """``value`` if it lies in [low, high]; SpecError otherwise."""
    if not low <= value <= high:
        raise SpecError(f"{name}={value} must lie between {low} and {high}")
    return value
