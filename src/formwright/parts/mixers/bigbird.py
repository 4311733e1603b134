"""BigBird: blocks that see their neighbours, the first and the last block, and a few blocks drawn at random.

A token of block u sees blocks u - 1, u, u + 1, 0, N - 1 and ``random`` others, drawn without replacement for every
head; tokens of blocks 0 and N - 1 see all N. Too few blocks for that, and everyone sees everyone. Zaheer et al., 2020
(2007.14062), the form with global tokens inside the sequence. The draw is fixed by ``seed``, the layer's path and N, so
it travels with the spec. Not causal: the last block is seen by all. Cost: 4 width^2 multiply-accumulates a token and
2 (5 + random) block width a query. Rows of a batch are run by length, since each has a last block of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.kit.errors import SpecError
from formwright.ops.window_attention import (
    Spans,
    chunked,
    joined,
    leading,
    listed,
    spans,
    window_attention,
    window_probs,
)
from formwright.parts.context import Context, keyed_generator
from formwright.parts.mixers._windows import Windowed, at_least
from formwright.registry import Paper, register


@functools.lru_cache(maxsize=64)
def graph(length: int, block: int, random: int, heads: int, seed: int, path: str) -> Spans:
    """Who sees whom, a pattern for every head."""
    count = -(-length // block)
    if count <= 5 + random:
        return leading(length, length)
    drawn = np.random.default_rng(keyed_generator(seed, f"{path}/{count}").initial_seed())
    u = np.arange(count)
    known = np.stack((u - 1, u, u + 1, 0 * u, 0 * u + count - 1), 1).clip(0, count - 1)
    chance = drawn.random((heads, count, count))
    chance[:, u[:, None], known] = 2.0  # known already, so never among the smallest
    others = chance.argpartition(random - 1, -1)[..., :random] if random else np.empty((heads, count, 0), np.int64)
    ends = np.broadcast_to([0, count - 1], (heads, count, 2))
    table = tuple(tuple(map(tuple, rows)) for rows in np.concatenate((ends, others), -1).tolist())
    chunk = np.arange(length)[:, None] // block
    whole = spans(np.zeros_like(chunk), np.where((chunk == 0) | (chunk == count - 1), length, 0), length)
    return joined(chunked(length, block, 1, 1), listed(length, block, table), whole)


@register(
    "mixer", "bigbird", paper=Paper("Zaheer et al.", 2020, "2007.14062"), summary="near, global and random blocks"
)
class BigBird(Windowed):
    """Slots and shared arguments as :class:`Windowed`.

    Args:
        block: tokens of a block.
        random: blocks drawn at random for every block and head.
        seed: of the draw.
    """

    examples = (
        {"heads": 4, "block": 2, "random": 1},
        {"heads": 2, "kv_heads": 1, "block": 16, "random": 2, "rotary": {}},
    )

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        block: int,
        random: int = 3,
        seed: int = 0,
        kv_heads: int | None = None,
        head_width: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        rotary: dict[str, Any] | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(width, heads, kv_heads, head_width, bias, out_bias, rotary, scale, dropout)
        at_least(1, block=block)
        at_least(0, random=random)
        self.block, self.random, self.seed = block, random, seed

    def _graph(self, length: int, path: str = "") -> Spans:
        return graph(length, self.block, self.random, self.heads, self.seed, path)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: Context) -> Tensor:
        length = q.shape[1]
        if ctx.lengths is None:
            return window_attention(q, k, v, self._graph(length, ctx.path), scale=self.scale)[0]
        sizes = ctx.lengths.tolist()
        order, pieces = [], []
        for size in sorted(set(sizes)):
            rows = [row for row, own in enumerate(sizes) if own == size]
            seen = self._graph(size, ctx.path)
            own_q, own_k, own_v = (t[rows, :size] for t in (q, k, v))
            y, _ = window_attention(own_q, own_k, own_v, seen, scale=self.scale)
            pieces.append(F.pad(y, (0, 0, 0, 0, 0, length - size)))
            order += rows
        return torch.cat([q[:0], *pieces])[torch.argsort(torch.tensor(order, dtype=torch.long, device=q.device))]

    def probs(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        if ctx.lengths is not None or ctx.offsets is not None:
            raise SpecError(f"{ctx.path}: probs of bigbird are those of whole sequences of one length")
        return window_probs(q, k, self._graph(q.shape[1], ctx.path), scale=self.scale)[0]

    def pairs(self, length: int) -> int:
        return self._graph(length).pairs(self.heads)
