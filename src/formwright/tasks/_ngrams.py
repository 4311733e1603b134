"""Guessing a token by counting: how often it occurs, and how often it follows the one before it.

    p(t) = (n(t) + 1) / (N + V)        p(t | s) = (n(s, t) + K p(t)) / (n(s) + K)

K is the weight of the unigram in tokens (MacKay and Peto, 1995). Cost: one pass over the counted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WEIGHT = 8.0


class Bigram:
    """Counts of ``rows`` of ids below ``vocab``. Where the token before is -1, the unigram answers."""

    def __init__(self, rows: Sequence[Sequence[int]], vocab: int) -> None:
        flat = [np.asarray(row, dtype=np.int64) for row in rows if len(row)]
        single = np.bincount(np.concatenate(flat), minlength=vocab)
        self.unigram = (single + 1.0) / (single.sum() + vocab)
        pairs = np.concatenate([row[:-1] * vocab + row[1:] for row in flat])
        self._pairs, self._seen = np.unique(pairs, return_counts=True)
        self._before = np.bincount(self._pairs // vocab, weights=self._seen, minlength=vocab)
        self._best = np.full(vocab + 1, int(single.argmax()))
        # Ascending counts, so that the most frequent follower of each token is written last.
        order = np.argsort(self._seen, kind="stable")
        self._best[self._pairs[order] // vocab] = self._pairs[order] % vocab

    def nats(self, before: np.ndarray, token: np.ndarray) -> np.ndarray:
        """(n,) -log p of each token (n,) after ``before`` (n,)."""
        vocab = len(self.unigram)
        place = np.searchsorted(self._pairs, before * vocab + token).clip(max=len(self._pairs) - 1)
        both = np.where(self._pairs[place] == before * vocab + token, self._seen[place], 0)
        known = np.where(before >= 0, self._before[before], 0.0)
        both = np.where(before >= 0, both, 0)
        return -np.log((both + WEIGHT * self.unigram[token]) / (known + WEIGHT))

    def best(self, before: np.ndarray) -> np.ndarray:
        """(n,) the token that most often follows ``before`` (n,); the most frequent of all after -1."""
        return self._best[before]
