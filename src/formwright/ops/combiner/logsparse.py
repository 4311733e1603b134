"""Combiner-Logsparse: every token attends to itself and to log2(L) blocks that tile what lies before it.

For each set bit t of the number p of tokens before a token, it sees the aligned block of 2^t tokens with index
(p >> t) - 1. So at level t tokens stand in pairs of blocks, and the second block of a pair sees the first: one view of
the sequence a level, no index at all. The block of one token is seen directly. Cost: O(L log L).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.ops.combiner.grid import Tokens, pooled


def logsparse(tokens: Tokens, causal: bool, lengths: Tensor | None, pool: str) -> Tensor:
    """Tokens (B, H, L, D) -> (B, H, L, D)."""
    q, k, v = tokens[:3]
    left = _Side(tokens, pool)
    scores = [(q.unsqueeze(-2) @ k.unsqueeze(-1)).squeeze(-1), left.scores()]
    if causal:
        own, before = torch.softmax(torch.cat(scores, -1), -1).split((1, left.levels), -1)
        return own * v + left.mix(before)
    back = _reversed(q.shape[2], lengths, q.device)
    right = _Side(tokens.each(lambda t: _take(t, back)), pool)
    scores.append(_take(right.scores(), back))
    own, before, after = torch.softmax(torch.cat(scores, -1), -1).split((1, left.levels, right.levels), -1)
    return own * v + left.mix(before) + _take(right.mix(_take(after, back)), back)


class _Side:
    """What lies before each token: one region a level."""

    def __init__(self, tokens: Tokens, pool: str) -> None:
        self.length, self.levels, self.pool = tokens.q.shape[2], levels(tokens.q.shape[2]), pool
        spare = (1 << self.levels) - self.length
        self.tokens = tokens.each(lambda t: F.pad(t, (0, 0, 0, spare)))
        self.values = [self._values(level) for level in range(self.levels)]

    def _halves(self, x: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """(B, H, padded, D) -> the first and the second block (B, H, pairs, 2^level, D) of every pair."""
        size, count = 1 << level, pairs_of_blocks(self.length, level)
        first, second = x[:, :, : 2 * size * count].unflatten(2, (count, 2, size)).unbind(3)
        return first, second

    def _values(self, level: int) -> Tensor:
        """(B, H, pairs, 1, D): the first block of every pair as a region."""
        values = self._halves(self.tokens.v, level)[0]
        if level == 0:
            return values
        asker = self._pooled(self.tokens.asked, level)
        weights = torch.softmax(asker @ self._halves(self.tokens.k, level)[0].transpose(-1, -2), -1)
        return weights @ values

    def _pooled(self, x: Tensor, level: int) -> Tensor:
        first = self._halves(x, level)[0]
        return pooled(first, torch.ones((), dtype=torch.bool, device=x.device).expand(first.shape[:-1]), self.pool)

    def scores(self) -> Tensor:
        """(B, H, L, levels): minus infinity where a level's bit is not set."""
        found = []
        for level in range(self.levels):
            keys = self._halves(self.tokens.k, 0)[0] if level == 0 else self._pooled(self.tokens.offered, level)
            seen = (self._halves(self.tokens.q, level)[1] @ keys.transpose(-1, -2)).squeeze(-1)
            found.append(self._whole(torch.full_like(seen, -math.inf), seen))
        return torch.stack(found, -1) if found else self.tokens.q.new_zeros(*self.tokens.q.shape[:2], self.length, 0)

    def mix(self, weights: Tensor) -> Tensor:
        """(B, H, L, levels) -> (B, H, L, D): the regions' values by their weights."""
        weights = F.pad(weights, (0, 0, 0, (1 << self.levels) - self.length))
        out = torch.zeros_like(self.tokens.v[:, :, : self.length])
        for level, values in enumerate(self.values):
            second = self._halves(weights[..., level, None], level)[1] @ values
            out = out + self._whole(torch.zeros_like(second), second)
        return out

    def _whole(self, first: Tensor, second: Tensor) -> Tensor:
        """Both blocks of all pairs (B, H, pairs, 2^level, ...) -> (B, H, L, ...)."""
        joined = torch.stack((first, second), 3).flatten(2, 4)
        spare = self.length - joined.shape[2]
        return joined[:, :, : self.length] if spare <= 0 else torch.cat((joined, joined[:, :, :spare]), 2)


def levels(length: int) -> int:
    """How many levels tokens of a text of ``length`` can see."""
    return max(length - 1, 0).bit_length()


def pairs_of_blocks(length: int, level: int) -> int:
    """Pairs of blocks of 2^level that hold at least one token."""
    return -(-length // (2 << level))


def _reversed(length: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """(B or 1, L): the places of every row's tokens from its last to its first; padding stays where it is."""
    steps = torch.arange(length, device=device)[None]
    if lengths is None:
        return steps.flip(1)
    return torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)


def _take(x: Tensor, places: Tensor) -> Tensor:
    """x (B, H, L, ...) in another order of its tokens."""
    if len(places) == 1:
        return x.index_select(2, places[0])
    index = places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index)


def products(length: int, causal: bool) -> int:
    """Multiply-accumulates of one head for each of its entries."""
    before = 0
    for level in range(levels(length)):
        seen = pairs_of_blocks(length, level) << level
        before += 2 * seen + (2 * seen if level else 0)
    return length + before * (1 if causal else 2)
