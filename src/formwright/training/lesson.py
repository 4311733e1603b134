"""What a teacher says of texts, asked once a text and kept: the data of healing.

Kept are an answer a text (its vector or the scores of its labels), the last states of its tokens in bfloat16, and,
where the student is the teacher's equal up to some item, the stream before that item, so that the student begins
there. A text's answer is always the one computed in its batch of the first epoch: a run resumed in a later epoch
learns from the same bits as one that went through, although products over another batch differ in their last bits.
Cost: one forward pass of the teacher a text, shared by successive runs on the same texts; 6 bytes a number kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from formwright.models.batch import Batch
from formwright.models.items import Bare, Residual
from formwright.models.model import Model
from formwright.models.text import packed
from formwright.tasks.base import digest
from formwright.training.sources import Buckets, Source

#: Bytes kept at most; with more to keep, the teacher reads every batch anew.
CACHE = 1 << 30
#: Rows on which model and teacher are compared item by item.
PROBES = 4


@dataclass(eq=False)
class Notebook:
    """By row number: ``answers``, the last ``states`` (n, W) and the ``streams`` (n, W) before the common end."""

    answers: dict[int, Tensor] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    streams: dict[int, Tensor] = field(default_factory=dict)


#: The notebook of the last lesson, its key, and a reference that ends with the teacher.
_last: list[tuple[Any, weakref.ref, Notebook]] = []


def notebook(teacher: Model, key: Any) -> Notebook:
    """The last lesson's notebook if it is about the same teacher, unchanged since, and ``key``; else an empty one."""
    tensors = (*teacher.parameters(), *teacher.buffers())
    key = (key, tuple((id(t), 0 if t.is_inference() else t._version) for t in tensors))
    if _last and _last[0][0] == key and _last[0][1]() is teacher:
        return _last[0][2]
    made = Notebook()
    _last[:] = [(key, weakref.ref(teacher, lambda gone: _last.clear()), made)]
    return made


def common(model: Model, teacher: Model, rows: Sequence[list[int]]) -> str | None:
    """The first item from which ``model`` is no longer ``teacher``; None if that is its first, or if none differs.

    Equal are items of the same modules that give the same bits on a few rows. Only residual and bare items count:
    others may change the context, which is not kept.
    """
    probes = sorted(rows, key=len)[:: max(1, len(rows) // PROBES)][-PROBES:]
    with torch.no_grad():
        x, ctx = model.embed(packed(model, probes))
        y, other = teacher.embed(packed(teacher, probes))
        if not torch.equal(x, y):
            return None
        for place, (one, two) in enumerate(zip(model.items(), teacher.items())):
            alike = one.id == two.id and [type(m) for m in one.modules()] == [type(m) for m in two.modules()]
            if alike and isinstance(one, (Residual, Bare)):
                x, y = one(x, ctx)[0], two(y, other)[0]
                if torch.equal(x, y):
                    continue
            return one.id if place else None
    return None


class Lesson(Source):
    """Batches of ``size`` texts with what the teacher said of them; see the module. ``begin``: see :func:`common`."""

    def __init__(
        self,
        model: Model,
        teacher: Model,
        rows: Sequence[list[int]],
        size: int,
        seed: int,
        *,
        head: str,
        states: bool,
        begin: str | None = None,
    ) -> None:
        self.model, self.teacher, self.rows, self.head, self.begin = model, teacher, rows, head, begin
        self.buckets = Buckets([len(row) for row in rows], size, seed)
        self.answered = teacher.heads[head].kind not in ("tokens", "states")
        self.states = states or not self.answered
        need = teacher.width * sum(map(len, rows)) * (2 * self.states + 4 * (begin is not None))
        self.kept = need <= CACHE
        self.print = digest(rows)
        self.notes = notebook(teacher, (self.print, size, seed, head, self.states, begin))
        self._first: Buckets | None = None
        self._home: dict[int, int] = {}

    def draw(self, index: int) -> Batch:
        chosen = [int(row) for row in self.buckets.at(index)]
        notes = self.notes if self.kept else self._ask(chosen, Notebook())
        for row in chosen:
            if row not in notes.answers and row not in notes.states:
                self._ask(self._mates(row), notes)
        targets = {}
        if self.answered:
            targets["teacher"] = torch.stack([notes.answers[row] for row in chosen])
        if self.states:
            targets["teacher.states"] = torch.cat([notes.states[row] for row in chosen])[None]
        if self.begin is not None:
            targets["teacher.stream"] = torch.cat([notes.streams[row] for row in chosen])[None]
        return packed(self.model, [self.rows[row] for row in chosen]).replace(targets=targets)

    def _mates(self, row: int) -> list[int]:
        """The first epoch's batch that holds ``row``."""
        if self._first is None:
            self._first = Buckets(self.buckets.lengths, self.buckets.size, self.buckets.seed)
            self._home = {int(i): place for place in range(self._first.per_epoch) for i in self._first.at(place)}
        return [int(i) for i in self._first.at(self._home[row])]

    def _ask(self, rows: Sequence[int], notes: Notebook) -> Notebook:
        sizes = [len(self.rows[row]) for row in rows]
        with torch.no_grad():
            x, ctx = self.teacher.embed(packed(self.teacher, [self.rows[row] for row in rows]))
            if self.begin is not None:
                x, ctx = self.teacher.run(x, ctx, stop=self.begin)
                notes.streams |= dict(zip(rows, _apart(x, sizes)))
            x, ctx = self.teacher.run(x, ctx, start=self.begin)
            x = x if self.teacher.final_norm is None else self.teacher.final_norm(x)
            if self.answered:
                notes.answers |= dict(zip(rows, self.teacher.heads[self.head](x, ctx)))
            if self.states:
                notes.states |= dict(zip(rows, _apart(x.to(torch.bfloat16), sizes)))
        return notes

    def fingerprint(self) -> dict[str, Any]:
        return {"texts": len(self.rows), "fingerprint": self.print}


def _apart(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Packed (1, T, W) -> a copy of each text's part, so that none keeps its whole batch alive."""
    return [part.clone() for part in x[0].split(list(sizes))]
