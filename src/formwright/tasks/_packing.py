"""Documents of natural length end to end in batches of a number of tokens: no padding, and nothing crosses a border.

A document of n tokens has n - 1 to predict. It is cut into pieces of ``length`` predicted tokens (the token before a
piece opens it), and an epoch deals all pieces, in an order from (seed, epoch), into batches of at most ``budget``
tokens, so that every token is predicted once an epoch (Krell et al., 2021, 2107.02027, pack for the same reason).
Cost: 8 bytes a document and a piece, and about 50 a piece while an epoch is dealt.
"""

from __future__ import annotations

import numpy as np

from formwright.kit.errors import DataError


class Packing:
    """``at(index)`` -> (pieces, 2): where the tokens of each piece of a batch start and stop.

    borders (D + 1,): where documents start and stop among all tokens. budget is at least ``length``.
    """

    def __init__(self, borders: np.ndarray, length: int, budget: int, seed: int) -> None:
        self.borders, self.length, self.budget, self.seed = borders, length, budget, seed
        predicted = np.maximum(np.diff(borders) - 1, 0)
        self.first = np.concatenate(([0], np.cumsum(-(-predicted // length))))  # the number of a document's first piece
        if not self.first[-1]:
            raise DataError("the texts have no token to predict")
        self.ends = np.zeros(1, dtype=np.int64)  # batches up to the end of each epoch met so far
        self._epoch = -1
        self._order = self._cuts = np.zeros(0, dtype=np.int64)

    def at(self, index: int) -> np.ndarray:
        while index >= self.ends[-1]:
            self._deal(len(self.ends) - 1)
            self.ends = np.append(self.ends, self.ends[-1] + len(self._cuts) - 1)
        epoch = int(np.searchsorted(self.ends, index, side="right")) - 1
        if epoch != self._epoch:
            self._deal(epoch)
        place = index - self.ends[epoch]
        return self.places(self._order[self._cuts[place] : self._cuts[place + 1]])

    def places(self, pieces: np.ndarray) -> np.ndarray:
        """(n, 2) starts and stops of the pieces with these numbers (n,)."""
        document = np.searchsorted(self.first, pieces, side="right") - 1
        start = self.borders[document] + (pieces - self.first[document]) * self.length
        return np.stack((start, np.minimum(start + self.length, self.borders[document + 1] - 1)), 1)

    def _deal(self, epoch: int) -> None:
        order = np.random.default_rng([self.seed, epoch]).permutation(int(self.first[-1]))
        start, stop = self.places(order).T
        total = np.concatenate(([0], np.cumsum(stop - start)))
        cuts = [0]
        while cuts[-1] < len(order):
            cuts.append(int(np.searchsorted(total, total[cuts[-1]] + self.budget, side="right")) - 1)
        self._epoch, self._order, self._cuts = epoch, order, np.array(cuts)
