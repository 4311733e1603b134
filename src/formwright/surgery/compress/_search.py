"""The greedy search of FinerCut: which sublayer's removal changes the original's output least.

One step measures every candidate c: the distance of the model without (what is already dropped and c) to the original.
Since removing c leaves everything before c unchanged, a candidate starts from the stream that enters its item, which
is handed on from item to item; only what lies behind c is run again. A step over n sublayers thus costs about n^2 / 2
sublayer evaluations instead of n^2, and no more memory than one activation and the reference outputs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from formwright.kit.errors import DataError, Refusal, SpecError, unknown
from formwright.models.batch import Batch
from formwright.models.items import Residual, walk
from formwright.parts.context import Context
from formwright.surgery.compress._distances import NAMES, distance
from formwright.surgery.evidence import batches, evaluating

LEVELS = ("sublayer", "attention", "channel", "block")
#: Bytes of reference outputs kept from step to step; beyond it they are computed again in each.
KEPT = 512 << 20


@dataclass(frozen=True)
class Candidate:
    """One or more residual items that are removed together. ``place``: index of the first item that it changes."""

    name: str
    items: tuple[Residual, ...]
    block: str
    place: int

    @property
    def ids(self) -> list[str]:
        return [item.id for item in self.items]


def candidates(model: Any, level: str = "sublayer") -> list[Candidate]:
    """What may be removed at a level, by depth: ``attention`` means any mixer, ``channel`` any channel mixer."""
    if level not in LEVELS:
        raise SpecError(f"finercut: {unknown('level', level, LEVELS)}")
    if not hasattr(model, "residuals"):
        raise Refusal("finercut measures one tower at a time: plan for model.tower(NAME)")
    places: dict[str, int] = {}
    for index, top in enumerate(model.items()):
        for item in walk(iter([top])):
            places.setdefault(item.id, index)
    kinds = {"attention": ("mixer",), "channel": ("channel",)}
    found: dict[str, list[Residual]] = {}
    for item in model.residuals():
        kind = getattr(type(item.part), "registered", ("", ""))[0]
        if level in kinds and kind not in kinds[level]:
            continue
        found.setdefault(block_of(item) if level == "block" else item.id, []).append(item)
    return [
        Candidate(name, tuple(held), block_of(held[0]), min(places[item.id] for item in held))
        for name, held in found.items()
    ]


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

    reference: the original; default the model itself with nothing dropped.
    """

    model: Any
    evidence: list[Batch]
    distance: str = "auto"
    head: str | None = None
    reference: Any = None
    evaluations: int = 0
    _kept: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reference = self.model if self.reference is None else self.reference
        heads = self.model.heads
        if self.head is not None and self.head not in heads:
            raise SpecError(f"finercut: {unknown('head', self.head, heads)}")
        self.head = self.head or next(iter(heads))
        if self.distance not in ("auto", *NAMES):
            raise SpecError(f"finercut: {unknown('distance', self.distance, ('auto', *NAMES))}")
        if self.distance == "auto":
            self.distance = suited(heads[self.head])
        self._room = KEPT

    def outputs(self, index: int, dropped: Sequence[Residual]) -> Tensor:
        """The reference's output rows of batch ``index``; kept while there is room."""
        if index in self._kept:
            return self._kept[index]
        present = {id(item) for item in self.reference.walk()}
        with _put_back([item for item in dropped if id(item) in present]):
            x, ctx = self.reference.embed(self.evidence[index], seed=0)
            x, ctx = self.reference.run(x, ctx)
            z, _ = self.read(self.reference, x, ctx)
        if not bool(torch.isfinite(z).all()):
            raise DataError(f"finercut: the model's own output on batch {index} of the evidence is not finite")
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

    def step(self, dropped: Sequence[Candidate], left: Sequence[Candidate]) -> list[float]:
        """The distance to the original after ``dropped`` and, in turn, each of ``left``."""
        sums, counts = [0.0] * len(left), [0] * len(left)
        gone = [item for candidate in dropped for item in candidate.items]
        with evaluating(self.model), without(gone):
            items = list(self.model.items())
            live = [sum(isinstance(i, Residual) and not i.dropped for i in walk(iter([item]))) for item in items]
            last = max(candidate.place for candidate in left)
            for index, batch in enumerate(self.evidence):
                z = self.outputs(index, gone)
                x, ctx = self.model.embed(batch, seed=0)
                for place, item in enumerate(items[: last + 1]):
                    for number, candidate in enumerate(left):
                        if candidate.place == place:
                            measured, count = self._measure(candidate, z, x, ctx, item.id, index)
                            sums[number] += measured
                            counts[number] += count
                            self.evaluations += sum(live[place:]) - len(candidate.items)
                    if place < last:
                        x, ctx = item(x, ctx)
                        self.evaluations += live[place]
        return [total / max(1, count) for total, count in zip(sums, counts)]

    def _measure(
        self, candidate: Candidate, z: Tensor, x: Tensor, ctx: Context, start: str, index: int
    ) -> tuple[float, int]:
        with without(candidate.items):
            y, sizes = self.read(self.model, *self.model.run(x, ctx, start))
        measured, count = distance(self.distance, z, y, sizes)
        if not math.isfinite(measured):
            raise DataError(
                f"finercut: without {', '.join(candidate.ids)} the output on batch {index} of the evidence is not "
                "finite; leave it out with exclude, or check the model's numbers"
            )
        return measured, count


@contextlib.contextmanager
def _put_back(items: Sequence[Residual]) -> Iterator[None]:
    """Inside, items that a search has dropped hold their parts again."""
    raise_later = [item for item in items if item.dropped]
    if raise_later:
        raise AssertionError("reference outputs are computed before anything is dropped")
    yield


def suited(head: Any) -> str:
    """The distance for a head: of distributions where it gives logits, of directions where it gives vectors."""
    name = getattr(type(head), "registered", ("", ""))[1]
    if name == "regression":
        return "norm"
    return "cosine" if head.kind in ("vectors", "states") else "js"
