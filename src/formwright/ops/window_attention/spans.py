"""Who sees whom, as intervals: for every query a few runs of keys, held once for all rows and heads of a batch.

Sliding windows, blocks, leading global tokens and listed blocks are all runs of keys, so one kernel serves them. Runs
of one query never overlap: :func:`joined` clips them. All of it is arithmetic on the host with NumPy, remembered by
:func:`functools.lru_cache`; nothing here reads a tensor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from formwright.kit.errors import SpecError

#: A tile of queries ends where a run of keys jumps by more than this many places, so that its union stays narrow.
JUMP = 16
#: Queries of one product where it is written out.
FEWEST, MOST = 16, 128

Array = np.ndarray


class Group(NamedTuple):
    """Tiles of one width: query indices (N, T), key indices (N, K) and what each query sees of them (N, T, K) as runs.

    ``real`` (N, T): which queries are no filling. ``run`` (N, K): which of the query's runs a key stands in, -1 for
    filling.
    """

    queries: Array
    real: Array
    keys: Array
    run: Array

    @property
    def pairs(self) -> int:
        return self.queries.size * self.keys.shape[1]


@dataclass(frozen=True, eq=False)
class Spans:
    """Query i of pattern p sees keys ``low[p, i, m] <= j < high[p, i, m]`` for every m; (1 or heads, L, M) int64.

    ``total``: number of keys. ``step``: where runs jump at known places, every ``step`` queries; else 0.
    """

    low: Array
    high: Array
    total: int
    step: int = 0

    @property
    def length(self) -> int:
        return self.low.shape[1]

    @property
    def patterns(self) -> int:
        return self.low.shape[0]

    def mask(self) -> Array:
        """(1 or heads, L, total) bool, written out: for definitions and for who looks."""
        keys = np.arange(self.total)[None, None, :, None]
        return np.any((keys >= self.low[:, :, None]) & (keys < self.high[:, :, None]), axis=-1)

    def of(self, pattern: int) -> Spans:
        """One head's own pattern."""
        return Spans(self.low[pattern : pattern + 1], self.high[pattern : pattern + 1], self.total, self.step)

    @functools.cached_property
    def groups(self) -> tuple[Group, ...]:
        """The tiles of a single pattern in groups of like width, so that few products cover all of them."""
        if self.length == 0 or self.total == 0:
            return ()
        width = int((self.high - self.low).sum(-1).mean())
        borders = tiles(self, min(MOST, max(FEWEST, width)))
        queries = borders[:-1, None] + np.arange(np.diff(borders).max())
        real = queries < borders[1:, None]
        queries = np.minimum(queries, self.length - 1)
        low, high = self.low[0, queries], self.high[0, queries]
        held = (low < high) & real[..., None]
        first = np.where(held, low, self.total).min(1)
        last = np.where(held, high, 0).max(1)
        ends = np.maximum(last - first, 0).cumsum(1)
        kinds = np.where(ends[:, -1] > 0, np.ceil(4 * np.log2(np.maximum(ends[:, -1], 1))), -1)
        return tuple(self._group(queries, real, first, ends, kinds == kind) for kind in np.unique(kinds))

    def _group(self, queries: Array, real: Array, first: Array, ends: Array, chosen: Array) -> Group:
        first, ends = first[chosen], ends[chosen]
        places = np.arange(max(1, ends[:, -1].max()))[None]
        run = (places[..., None] >= ends[:, None]).sum(-1)
        beyond = run == ends.shape[1]
        run = np.minimum(run, ends.shape[1] - 1)
        before = np.concatenate((np.zeros_like(ends[:, :1]), ends[:, :-1]), 1)
        keys = np.take_along_axis(first - before, run, 1) + places
        return Group(queries[chosen], real[chosen], np.where(beyond, 0, keys), np.where(beyond, -1, run))

    @functools.cached_property
    def order(self) -> Array:
        """Where each query's output stands among those of :attr:`groups`, one after the other."""
        found = np.full(self.length, -1)
        start = 0
        for group in self.groups:
            found[group.queries[group.real]] = start + np.flatnonzero(group.real)
            start += group.real.size
        return found

    def pairs(self, heads: int) -> int:
        """Products of a query and a key that the written-out form takes, over all heads."""
        if self.patterns > 1:
            return sum(self.of(pattern).pairs(1) for pattern in range(self.patterns))
        return heads * sum(group.pairs for group in self.groups)


@functools.lru_cache(maxsize=64)
def tiles(seen: Spans, most: int) -> Array:
    """(N + 1,) borders of tiles of at most ``most`` consecutive queries whose runs move along together."""
    if seen.step:
        cuts = np.arange(seen.step, seen.length, seen.step)
    else:
        both = (seen.low < seen.high)[:, 1:] & (seen.low < seen.high)[:, :-1]
        moved = np.maximum(np.abs(np.diff(seen.low, axis=1)), np.abs(np.diff(seen.high, axis=1)))
        cuts = np.flatnonzero((both & (moved > JUMP)).any((0, 2))) + 1
    starts = [np.arange(a, b, most) for a, b in zip([0, *cuts], [*cuts, seen.length])]
    return np.concatenate((*starts, [seen.length])).astype(np.int64)


def spans(low: Array, high: Array, total: int, step: int = 0) -> Spans:
    """Runs (L, M) or (P, L, M), clipped to the keys there are; runs that overlap are made disjoint."""
    low, high = (np.broadcast_to(t, np.broadcast_shapes(low.shape, high.shape)) for t in (low, high))
    low, high = (t[None] if t.ndim == 2 else t for t in (np.clip(low, 0, total), np.clip(high, 0, total)))
    order = np.argsort(low, -1, kind="stable")
    low, high = (np.take_along_axis(t, order, -1) for t in (low, high))
    done = np.maximum.accumulate(np.where(low < high, high, 0), -1)
    low = np.maximum(low, np.concatenate((np.zeros_like(done[..., :1]), done[..., :-1]), -1))
    empty = low >= high
    low, high = (np.ascontiguousarray(np.where(empty, 0, t), dtype=np.int64) for t in (low, high))
    return Spans(low, high, total, step)


def joined(*parts: Spans) -> Spans:
    """Every query sees what it sees in any of ``parts``."""
    patterns = max(part.patterns for part in parts)
    low, high = (
        np.concatenate([np.broadcast_to(t, (patterns, *t.shape[1:])) for t in side], -1)
        for side in ([part.low for part in parts], [part.high for part in parts])
    )
    return spans(low, high, parts[0].total, max(part.step for part in parts))


def causally(seen: Spans) -> Spans:
    """The same without later keys; queries and keys are one sequence."""
    return spans(seen.low, np.minimum(seen.high, np.arange(seen.length)[None, :, None] + 1), seen.total, seen.step)


@functools.lru_cache(maxsize=64)
def sliding(length: int, before: int, after: int) -> Spans:
    """Query i sees keys i - before .. i + after; a negative ``after`` leaves out the nearest."""
    places = np.arange(length)[:, None]
    return spans(places - before, places + after + 1, length)


@functools.lru_cache(maxsize=64)
def chunked(length: int, block: int, back: int = 0, ahead: int = 0, causal: bool = False) -> Spans:
    """Blocks of ``block`` tokens: a query sees its own, ``back`` blocks before it and ``ahead`` behind it."""
    if block < 1:
        raise SpecError(f"window attention: block={block} must be at least 1")
    chunk = np.arange(length)[:, None] // block
    seen = spans((chunk - back) * block, (chunk + 1 + ahead) * block, length)
    return causally(seen) if causal else seen


@functools.lru_cache(maxsize=64)
def leading(length: int, first: int) -> Spans:
    """The first ``first`` tokens see all, and all see them."""
    rows = np.zeros((length, 1), dtype=np.int64)
    return spans(rows, np.where(np.arange(length)[:, None] < first, length, first), length)


@functools.lru_cache(maxsize=64)
def listed(length: int, block: int, table: tuple) -> Spans:
    """Queries of block u see the key blocks ``table[p][u]`` (-1: none) for every head's pattern p, or for the one."""
    count = -(-length // block)
    if any(len(rows) != count for rows in table):
        raise SpecError(f"window attention: a table for {length} tokens in blocks of {block} has {count} rows")
    named = len(table[0][0]) if count else 1
    blocks = np.asarray(table, dtype=np.int64).reshape(len(table), count, named)
    rows = blocks[:, np.arange(length) // block]
    return spans(np.where(rows < 0, 0, rows * block), np.where(rows < 0, 0, (rows + 1) * block), length, block)
