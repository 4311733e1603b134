"""Retrieval: queries, documents, right answers, and the reciprocal rank of the first right one.

    MRR@10 = mean over queries of 1 / rank of the first right document, 0 beyond rank 10

A figure means nothing without the size of the pool it was found in, so the metric's name carries it:
``mrr@10/1500``. Ties count against the model: a document ranks behind every wrong one of equal similarity, so a model
that maps everything to one point scores 0, not 1. Cost of a score: one encoding of the pool and its queries, then a
product of two matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb, log2
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from formwright.kit.errors import DataError, SpecError
from formwright.models.batch import Batch, Score, View
from formwright.tasks import _encoding
from formwright.tasks._bm25 import BM25
from formwright.tasks._splits import RULE, deal, order_key
from formwright.tasks.base import SPLITS, Task, digest, epochs

DEPTH = 10
#: Documents at most in calibrate's pool, which only ranks moves and has to be quick.
RANKING = 500


@dataclass(frozen=True)
class Pair:
    """A query, a document that answers it, and the unit (module, text) that may not be torn between splits."""

    query: str
    document: str
    unit: str


@dataclass(frozen=True)
class Part:
    """One split: distinct queries, distinct documents, and per query the indices of its right documents."""

    queries: tuple[str, ...]
    documents: tuple[str, ...]
    answers: tuple[tuple[int, ...], ...]


def merge(pairs: Sequence[Pair]) -> Part:
    """Repeated queries become one with several answers, repeated documents one document."""
    documents: dict[str, int] = {}
    queries: dict[str, dict[int, None]] = {}
    for pair in pairs:
        place = documents.setdefault(pair.document, len(documents))
        queries.setdefault(pair.query, {})[place] = None
    return Part(tuple(queries), tuple(documents), tuple(tuple(places) for places in queries.values()))


def split_pairs(pairs: Sequence[Pair], shares: Sequence[float], seed: int) -> tuple[dict[str, Part], int]:
    """Pairs dealt out by unit, and how many were left out because their document or query stands in two splits.

    A document that turns up in a second split is dropped there, and so is a query: an identical text never crosses.
    """
    sizes: dict[str, int] = {}
    for pair in pairs:
        sizes[pair.unit] = sizes.get(pair.unit, 0) + 1
    place = deal(sizes, shares, seed)
    homes: dict[tuple[str, str], str] = {}
    kept: dict[str, list[Pair]] = {name: [] for name in SPLITS}
    dropped = 0
    # The test split chooses first: it is the one whose figures are printed.
    for pair in sorted(pairs, key=lambda p: (-SPLITS.index(place[p.unit]), order_key(seed, p.unit), p.document)):
        split = place[pair.unit]
        keys = (("document", pair.document), ("query", pair.query))
        if any(homes.get(key, split) != split for key in keys):
            dropped += 1
            continue
        homes.update(dict.fromkeys(keys, split))
        kept[split].append(pair)
    return {name: merge(rows) for name, rows in kept.items()}, dropped


def draw_pool(part: Part, size: int, seed: int) -> Part:
    """A pool of exactly ``size`` documents (all, where the split has fewer) with the queries it answers fully.

    Queries are taken in a seeded order as long as all their right documents still fit; documents that answer none of
    them fill what remains.
    """
    size = min(size, len(part.documents))
    queries: list[int] = []
    chosen: dict[int, None] = {}
    for query in sorted(range(len(part.queries)), key=lambda i: order_key(seed, part.queries[i])):
        fresh = [place for place in part.answers[query] if place not in chosen]
        if len(chosen) + len(fresh) <= size:
            chosen.update(dict.fromkeys(fresh))
            queries.append(query)
        if len(chosen) == size:
            break
    for place in sorted(range(len(part.documents)), key=lambda i: order_key(seed, part.documents[i])):
        if len(chosen) == size:
            break
        chosen[place] = None
    where = {place: row for row, place in enumerate(sorted(chosen))}
    return Part(
        tuple(part.queries[i] for i in queries),
        tuple(part.documents[place] for place in where),
        tuple(tuple(where[place] for place in part.answers[i]) for i in queries),
    )


def rank_scores(similarity: Tensor, answers: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Per-query metrics of similarities (Q, N) with at least one right document per query, each (Q,) float64.

    ``mrr@10``; ``recall@1`` and ``recall@10``: right documents among the first k, of min(k, number of right ones);
    ``ndcg@10`` with gain 1 for right documents. Similarities that are not numbers rank last.
    """
    similarity = torch.nan_to_num(similarity.double(), nan=-torch.inf)
    count = len(answers)
    row = torch.tensor([i for i, places in enumerate(answers) for _ in places])
    column = torch.tensor([place for places in answers for place in places])
    wrong = torch.ones_like(similarity, dtype=torch.bool)
    wrong[row, column] = False
    found = similarity[row, column]
    ahead = torch.zeros(len(row), dtype=torch.long)
    for rows in torch.arange(len(row)).split(512):
        ahead[rows] = ((similarity[row[rows]] >= found[rows, None]) & wrong[row[rows]]).sum(1)
    # Right documents of one query stand behind its wrong ones of equal similarity and behind its better right ones.
    by_score = torch.argsort(found, descending=True, stable=True)
    order = by_score[torch.argsort(row[by_score], stable=True)]
    sizes = torch.tensor([len(places) for places in answers])
    first = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    before = torch.empty_like(ahead)
    before[order] = torch.arange(len(row)) - first
    rank = ahead + before + 1

    def total(values: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.float64).index_add_(0, row, values)

    reciprocal = torch.zeros(count, dtype=torch.float64)
    reciprocal.scatter_reduce_(0, row, torch.where(rank <= DEPTH, 1.0 / rank.double(), 0.0), "amax")
    ideal = torch.tensor([sum(1 / log2(i + 2) for i in range(min(DEPTH, len(places)))) for places in answers])
    gains = total(torch.where(rank <= DEPTH, 1.0 / torch.log2(rank.double() + 1), 0.0))
    result = {"mrr@10": reciprocal, "ndcg@10": gains / ideal.double()}
    for k in (1, DEPTH):
        result[f"recall@{k}"] = total((rank <= k).double()) / sizes.clamp(max=k)
    return result


def random_reciprocal_rank(size: int, right: int) -> float:
    """Expected MRR@10 of a random order of ``size`` documents, ``right`` of them right, in closed form.

    P(first right at rank r) = C(size - r, right - 1) / C(size, right).
    """
    everything = comb(size, right)
    return sum(comb(size - r, right - 1) / everything / r for r in range(1, min(DEPTH, size) + 1))


class RetrievalTask(Task):
    """MRR@10 over given pairs; subclasses say where the pairs come from.

    pool: documents of the pool in which select and test are ranked. similarity: ``cosine``, or ``dot`` for models
    trained with unnormalised products. rows: texts a batch while encoding.
    """

    needs = "encode"
    version = "1"

    def __init__(
        self,
        name: str,
        pairs: Sequence[Pair],
        *,
        shares: Sequence[float],
        seed: int,
        pool: int,
        similarity: Literal["cosine", "dot"],
        rows: int,
        notes: Sequence[str] = (),
    ) -> None:
        if pool < 2 or rows < 1:
            raise SpecError(f"task {name}: pool must be at least 2 and rows at least 1, not {pool} and {rows}")
        if similarity not in ("cosine", "dot"):
            raise SpecError(f"task {name}: similarity is 'cosine' or 'dot', not {similarity!r}")
        self.name, self.seed, self.similarity, self.rows, self.notes = name, seed, similarity, rows, list(notes)
        self.pairs = len(pairs)
        self.parts, self.dropped = split_pairs(pairs, shares, seed)
        for split in SPLITS:
            if len(self.parts[split].documents) < 2:
                raise DataError(f"{name}: {len(pairs)} pairs are too few for three splits of at least 2 documents")
        sizes = {split: min(pool, RANKING) if split == "calibrate" else pool for split in SPLITS}
        self.pools = {split: draw_pool(self.parts[split], sizes[split], seed) for split in SPLITS}
        self.metric = f"mrr@{DEPTH}/{len(self.pools['test'].documents)}"
        self.higher_is_better = True
        self._fingerprint = digest(
            [self.version, RULE, list(shares), seed, pool, similarity],
            [[part.queries, part.documents, part.answers] for part in (self.parts[split] for split in SPLITS)],
        )
        self._tokenizer: Any = None
        self._limit: int | None = None
        self._ids: dict[tuple[str, str], list[list[int]]] = {}

    def bind(self, model: Any) -> None:
        self._tokenizer = _encoding.tokenizer_of(model, self.name)
        self._limit = _encoding.limit_of(model)
        self._ids = {}

    def _encoded(self, split: str, side: Literal["queries", "documents"]) -> list[list[int]]:
        if self._tokenizer is None:
            raise DataError(f"task {self.name} is not bound to a model: call task.bind(model) first")
        if (split, side) not in self._ids:
            texts = list(getattr(self.pools[split], side))
            self._ids[(split, side)] = self._tokenizer.encode(texts, max_length=self._limit)
        return self._ids[(split, side)]

    def score(self, view: View, split: str) -> Score:
        """MRR@10; ``extra`` holds recall@1, recall@10, ndcg@10, ``curves`` the per-query forms and the pool's size."""
        pool = self.pools[self.check_split(split)]
        vectors = [
            _encoding.in_order(self._encoded(split, side), self._tokenizer.pad_id, self.rows, view.encode).float()
            for side in ("queries", "documents")
        ]
        if self.similarity == "cosine":
            vectors = [torch.nn.functional.normalize(vector, dim=-1) for vector in vectors]
        return self._score(vectors[0] @ vectors[1].T, pool)

    def _score(self, similarity: Tensor, pool: Part) -> Score:
        ranked = rank_scores(similarity, pool.answers)
        extra = {name: float(values.mean()) for name, values in ranked.items() if name != "mrr@10"}
        extra["pool"] = float(len(pool.documents))
        return Score(float(ranked["mrr@10"].mean()), ranked["mrr@10"], extra=extra)

    def baselines(self, split: str) -> Mapping[str, Score]:
        """``BM25`` with its items, and ``random``: the expectation over random orders."""
        pool = self.pools[self.check_split(split)]
        lexical = self._score(torch.from_numpy(BM25(pool.documents).scores(pool.queries)), pool)
        size = len(pool.documents)
        chances = [random_reciprocal_rank(size, len(places)) for places in pool.answers]
        return {"BM25": lexical, "random": Score(float(np.mean(chances)), torch.tensor(chances, dtype=torch.float64))}

    def texts(self, split: str) -> list[str]:
        """All queries and documents of the split, in turn; for *calibrate* that is the whole split, not its pool."""
        self.check_split(split)
        part = self.parts["calibrate"] if split == "calibrate" else self.pools[split]
        return [text for both in _alternate(part.queries, part.documents) for text in both]

    def batches(self, split: str, *, seed: int, budget: int, policy: Any = None) -> Iterator[Batch]:
        """Pairs for contrastive training: ``query.tokens`` and ``document.tokens`` (B, L), no query twice a batch.

        A query with several right documents brings one of them, chosen by (seed, turn).
        """
        self.check_split(split)
        if self._tokenizer is None:
            raise DataError(f"task {self.name} is not bound to a model: call task.bind(model) first")
        part = self.parts["calibrate"] if split == "calibrate" else self.pools[split]
        rows = list(range(len(part.queries)))
        for turn, chosen in enumerate(epochs(rows, self.rows, seed=seed, budget=budget)):
            rng = np.random.default_rng([seed, turn, 1])
            picks = [part.answers[i][int(rng.integers(len(part.answers[i])))] for i in chosen]
            sides = {
                "query.": [part.queries[i] for i in chosen],
                "document.": [part.documents[i] for i in picks],
            }
            halves = [
                _encoding.token_batch(self._tokenizer.encode(texts, max_length=self._limit), self._tokenizer.pad_id, to)
                for to, texts in sides.items()
            ]
            yield Batch(
                inputs={**halves[0].inputs, **halves[1].inputs}, lengths={**halves[0].lengths, **halves[1].lengths}
            )

    def describe(self) -> list[str]:
        sizes = ", ".join(f"{s} {len(self.parts[s].queries)}/{len(self.parts[s].documents)}" for s in SPLITS)
        judged = ", ".join(f"{s} {len(self.pools[s].queries)}/{len(self.pools[s].documents)}" for s in SPLITS[1:])
        lines = [*self.notes, f"{self.pairs} pairs"]
        if self.dropped:
            lines.append(f"{self.dropped} pairs left out: their query or document stands in another split")
        return [
            *lines,
            f"splits (queries/documents): {sizes}",
            f"metric: {self.metric}, ranked in pools of {judged}",
            f"fingerprint {self.fingerprint()[:12]}",
        ]

    def fingerprint(self) -> str:
        return self._fingerprint


def _alternate(left: Sequence[str], right: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Pairs of a left and a right text, then what is left of the longer list."""
    for i in range(max(len(left), len(right))):
        yield tuple(side[i] for side in (left, right) if i < len(side))
