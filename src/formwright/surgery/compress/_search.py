"""One step of a search over changes: how far does each change, by itself, move the original's output?

FinerCut asks it of every sublayer's removal, with what is already dropped left out too; rank allocation of every
slot's factors. Since a change at one item leaves everything before that item as it was, a change starts from the stream
that enters its item, which is handed on from item to item; only what lies behind is run again. A step over n sublayers
thus costs about n^2 / 2 sublayer evaluations instead of n^2, and no more memory than one activation and the reference
outputs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from formwright.kit.errors import DataError, Refusal, SpecError, unknown
from formwright.models.batch import Batch
from formwright.models.items import Residual, walk
from formwright.parts.context import Context
from formwright.surgery.compress._distances import NAMES, distance
from formwright.surgery.evidence import evaluating

LEVELS = ("sublayer", "attention", "channel", "block")
#: Bytes of reference outputs kept from step to step; beyond it they are computed again in each.
KEPT = 512 << 20


class Change(Protocol):
    """``place``: index of the first top-level item that it touches. ``saves``: sublayers that are not run with it."""

    @property
    def place(self) -> int: ...
    @property
    def saves(self) -> int: ...
    def made(self) -> AbstractContextManager[None]: ...
    def words(self) -> str: ...


@dataclass(frozen=True)
class Candidate:
    """One or more residual items that are removed together."""

    name: str
    items: tuple[Residual, ...]
    block: str
    place: int

    @property
    def saves(self) -> int:
        return len(self.items)

    def made(self) -> AbstractContextManager[None]:
        return without(self.items)

    def words(self) -> str:
        return f"without {', '.join(self.ids)}"

    @property
    def ids(self) -> list[str]:
        return [item.id for item in self.items]


def candidates(model: Any, level: str = "sublayer") -> list[Candidate]:
    """What may be removed at a level, by depth: ``attention`` means any mixer, ``channel`` any channel mixer."""
    if level not in LEVELS:
        raise SpecError(f"finercut: {unknown('level', level, LEVELS)}")
    if not hasattr(model, "residuals"):
        raise Refusal("finercut measures one tower at a time: plan for model.tower(NAME)")
    at = places(model)
    kinds = {"attention": ("mixer",), "channel": ("channel",)}
    found: dict[str, list[Residual]] = {}
    for item in model.residuals():
        kind = getattr(type(item.part), "registered", ("", ""))[0]
        if level in kinds and kind not in kinds[level]:
            continue
        found.setdefault(block_of(item) if level == "block" else item.id, []).append(item)
    return [
        Candidate(name, tuple(held), block_of(held[0]), min(at[item.id] for item in held))
        for name, held in found.items()
    ]


def places(model: Any) -> dict[str, int]:
    """Item id -> index of the top-level item that it first runs in."""
    found: dict[str, int] = {}
    for index, top in enumerate(model.items()):
        for item in walk(iter([top])):
            found.setdefault(item.id, index)
    return found


def block_of(item: Residual) -> str:
    """The id of the block that an item belongs to: ``b3`` of ``b3.attention``."""
    return item.id.rpartition(".")[0]


@contextlib.contextmanager
def without(items: Sequence[Residual]) -> Iterator[None]:
    """Inside, the items are dropped; afterwards they are what they were."""
    removed = []
    try:
        for item in items:
            removed.append((item, item.drop()))
        yield
    finally:
        for item, modules in reversed(removed):
            item.restore(modules)


@dataclass
class Search:
    """``step`` measures one step; ``evaluations`` counts the sublayers that were run, those before restarts included.

    reference: the original; default the model itself with nothing changed. what: who asks, for errors.
    """

    model: Any
    evidence: list[Batch]
    distance: str = "auto"
    head: str | None = None
    reference: Any = None
    what: str = "finercut"
    evaluations: int = 0
    _kept: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reference = self.model if self.reference is None else self.reference
        heads = self.model.heads
        if self.head is not None and self.head not in heads:
            raise SpecError(f"{self.what}: {unknown('head', self.head, heads)}")
        self.head = self.head or next(iter(heads))
        if self.distance not in ("auto", *NAMES):
            raise SpecError(f"{self.what}: {unknown('distance', self.distance, ('auto', *NAMES))}")
        if self.distance == "auto":
            self.distance = suited(heads[self.head])
        self._room = KEPT

    def outputs(self, index: int) -> Tensor:
        """The reference's output rows of batch ``index``, before anything is dropped; kept while there is room."""
        if index in self._kept:
            return self._kept[index]
        x, ctx = self.reference.embed(self.evidence[index], seed=0)
        z, _ = self.read(self.reference, *self.reference.run(x, ctx))
        if not bool(torch.isfinite(z).all()):
            raise DataError(f"{self.what}: the model's own output on batch {index} of the evidence is not finite")
        if z.nbytes <= self._room:
            self._kept[index] = z
            self._room -= z.nbytes
        return z

    def read(self, model: Any, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """(T, V) rows of the head's output without padding, and (S,) rows of each sequence."""
        assert self.head is not None
        y = model.read(x, ctx, self.head)
        kind = model.heads[self.head].kind
        if kind in ("tokens", "states"):
            if ctx.offsets is not None:
                return y[0], ctx.offsets.diff()
            valid = ctx.valid(y)
            return y[valid], valid.sum(1)
        if kind != "pair":
            sizes = ctx.offsets.diff() if ctx.offsets is not None else ctx.lengths
            y = y if sizes is None else y[sizes > 0]
        return y, torch.ones(len(y), dtype=torch.long, device=y.device)

    def step(self, dropped: Sequence[Candidate], left: Sequence[Change]) -> list[float]:
        """The distance to the original with ``dropped`` left out and, in turn, each change of ``left``."""
        sums, counts = [0.0] * len(left), [0] * len(left)
        gone = [item for candidate in dropped for item in candidate.items]
        items = list(self.model.items())
        last = max(change.place for change in left)
        with evaluating(self.model), evaluating(self.reference):
            for index, batch in enumerate(self.evidence):
                z = self.outputs(index)
                with without(gone):
                    live = [sum(isinstance(i, Residual) and not i.dropped for i in walk(iter([t]))) for t in items]
                    x, ctx = self.model.embed(batch, seed=0)
                    for place, item in enumerate(items[: last + 1]):
                        for number, change in enumerate(left):
                            if change.place == place:
                                measured, count = self._measure(change, z, x, ctx, item.id, index)
                                sums[number] += measured
                                counts[number] += count
                                self.evaluations += sum(live[place:]) - change.saves
                        if place < last:
                            x, ctx = item(x, ctx)
                            self.evaluations += live[place]
        return [total / max(1, count) for total, count in zip(sums, counts)]

    def _measure(self, change: Change, z: Tensor, x: Tensor, ctx: Context, start: str, index: int) -> tuple[float, int]:
        with change.made():
            y, sizes = self.read(self.model, *self.model.run(x, ctx, start))
        measured, count = distance(self.distance, z, y, sizes)
        if not math.isfinite(measured):
            raise DataError(
                f"{self.what}: {change.words()} the output on batch {index} of the evidence is not finite; "
                "check the model's numbers, or leave these texts out"
            )
        return measured, count


def suited(head: Any) -> str:
    """The distance for a head: of distributions where it gives logits, of directions where it gives vectors."""
    name = getattr(type(head), "registered", ("", ""))[1]
    if name == "regression":
        return "norm"
    return "cosine" if head.kind in ("vectors", "states") else "js"
