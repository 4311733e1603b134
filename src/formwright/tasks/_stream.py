"""Language modelling on documents that are never held: scored as all text is, trained on from a store of their ids.

A first reading tells every document's split by a keyed hash of its text, a second one draws what is scored. Training
reads the store of :mod:`formwright.tasks._tokens`, made when the first batch is asked for, in the packed layout of
:mod:`formwright.tasks._packing`. Cost: two readings of the files, 24 bytes a document, and tokenising once.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from formwright.kit.errors import DataError, SpecError
from formwright.models.batch import Batch
from formwright.tasks import _encoding
from formwright.tasks._documents import PIECE, Document, Documents, cut
from formwright.tasks._lm import SHARES, LanguageTask, _bytes, most_of
from formwright.tasks._packing import Packing
from formwright.tasks._splits import RULE, dealt, order_key
from formwright.tasks._tokens import Tokens, tokens_of
from formwright.tasks.base import SPLITS, digest

#: Bytes of training text that are held for what looks at texts themselves: tokenizers, calibration, baselines.
HELD = 1 << 25
NOWHERE = -1


class StreamedLanguage(LanguageTask):
    """As :class:`LanguageTask` over :class:`Documents`; each different text counts once.

    tokens: of a packed batch, at most (default: ``rows`` windows). A document of more than ``length`` is cut into
    pieces, shorter ones stay whole.
    """

    def __init__(
        self, documents: Documents, *, tokens: int | None = None, length: int = 256, rows: int = 8, **options: Any
    ) -> None:
        self.tokens = rows * length if tokens is None else tokens
        if self.tokens < length:
            raise SpecError(f"tokens={self.tokens} of a batch must be at least the length of a piece, {length}")
        self._store: Tokens | None = None
        super().__init__(documents.name, documents, length=length, rows=rows, notes=documents.notes, **options)

    def _deal(self, documents: Documents) -> str:
        keys, sizes = self._survey(documents.read())
        # Equal texts have equal keys: the first of each counts, in the order of the keys.
        order = np.lexsort((np.arange(len(keys)), keys[:, 1], keys[:, 0]))
        order = order[sizes[order] > 0]
        known = keys[order]
        fresh = np.ones(len(order), dtype=bool)
        fresh[1:] = (known[1:] != known[:-1]).any(1)
        order = order[fresh]
        self._count(len(order))
        blank = int((sizes == 0).sum())
        if blank:
            self.notes.append(f"{blank} texts left out: blank")
        if len(order) + blank < len(keys):
            self.notes.append(f"{len(keys) - blank - len(order)} texts left out: repeated")
        self._source, self._place = documents, np.full(len(keys), NOWHERE, dtype=np.int8)
        self._place[order] = dealt(sizes[order], SHARES)
        self._sizes = np.bincount(self._place[order], sizes[order], len(SPLITS)).astype(np.int64)
        self._texts = digest(hashlib.sha256(keys.tobytes()).hexdigest(), RULE, SHARES)
        drawn = {split: _Draw(HELD if split == "calibrate" else self.limit, self.seed) for split in SPLITS}
        for number, document in self._placed():
            for piece in cut(document, most_of(self.length)):
                drawn[SPLITS[number]].add(piece)
        self.parts = {split: drawn[split].texts() for split in SPLITS}
        return digest([self.version, RULE, SHARES, PIECE, self.seed, self.length, self.limit], self._texts)

    def _survey(self, documents: Iterator[Document]) -> tuple[np.ndarray, np.ndarray]:
        """(n, 2) the first 16 bytes of each document's place in the seeded order, and (n,) its size, 0 if blank."""
        keys, sizes = bytearray(), array("q")
        for document in documents:
            sha, size, blank = hashlib.sha256(), 0, True
            for block in document:
                data = _bytes(block)
                sha.update(data)
                size, blank = size + len(data), blank and not block.strip()
            keys += order_key(self.seed, sha.hexdigest())[:16]
            sizes.append(0 if blank else size)
        return np.frombuffer(keys, dtype=">u8").reshape(-1, 2), np.array(sizes, dtype=np.int64)

    def _placed(self) -> Iterator[tuple[int, Document]]:
        """(number of its split, document) of every document that counts."""
        for place, document in zip_longest(self._place, self._source.read()):
            if place is None or document is None:
                raise DataError(f"{self.name} was changed while it was read; start again")
            if place != NOWHERE:
                yield int(place), document

    def sizes(self) -> dict[str, int]:
        return dict(zip(SPLITS, self._sizes.tolist()))

    def bind(self, model: Any) -> None:
        super().bind(model)
        _encoding.tokenizer_of(model, self.name, "encode")
        self._store = None

    def store(self) -> Tokens:
        """The ids of the training documents, made on first use."""
        if self._tokenizer is None:
            raise DataError(f"task {self.name} is not bound to a model: call task.bind(model) first")
        if self._store is None:

            def training() -> Iterator[Document]:
                return (document for number, document in self._placed() if number == 0)

            self._store = tokens_of(
                training, self._tokenizer, self._texts, int(self._sizes[0]), whole=self._source.whole
            )
        return self._store

    def drawer(self, split: str, seed: int) -> Callable[[int], Batch]:
        """index -> a packed batch: ``tokens`` (1, T) with offsets, and ``targets["tokens"]`` (1, T), the next ones."""
        if self.check_split(split) != "calibrate":
            raise SpecError(f"task {self.name} trains on its split calibrate; {split} is only scored")
        store = self.store()
        try:
            packing = Packing(store.borders, self.length, self.tokens, seed)
        except DataError as error:
            raise DataError(f"task {self.name}: {error}") from None

        def draw(index: int) -> Batch:
            places = packing.at(index)
            rows = [store.ids[start : stop + 1].astype(np.int64) for start, stop in places]
            tokens, targets = (np.concatenate(part)[None] for part in ([r[:-1] for r in rows], [r[1:] for r in rows]))
            offsets = np.concatenate(([0], np.cumsum(places[:, 1] - places[:, 0])))
            return Batch(
                inputs={"tokens": torch.from_numpy(tokens)},
                targets={"tokens": torch.from_numpy(targets)},
                offsets={"tokens": torch.from_numpy(offsets)},
            )

        return draw

    def batches(self, split: str, *, seed: int, budget: int, policy: Any = None) -> Iterator[Batch]:
        """Packed batches; see :meth:`drawer`."""
        draw = self.drawer(split, seed)
        return (draw(index) for index in range(budget))


class _Draw:
    """The pieces that come first in the seeded order, of at most ``limit`` bytes together, and at least one."""

    def __init__(self, limit: int, seed: int) -> None:
        self.limit, self.seed, self.size = limit, seed, 0
        self._held: list[tuple[int, int, str]] = []  # a heap whose top is the piece that comes last
        self._border: int | None = None  # the first place that did not fit

    def add(self, text: str) -> None:
        place, size = -int.from_bytes(order_key(self.seed, text), "big"), len(_bytes(text))
        if self._border is not None and place <= self._border:
            return
        heappush(self._held, (place, size, text))
        self.size += size
        while self.size > self.limit and len(self._held) > 1:
            self._border, size, _ = heappop(self._held)
            self.size -= size

    def texts(self) -> list[str]:
        return [text for _, _, text in sorted(self._held, reverse=True)]
