"""Local attention: the sequence in blocks, softmax attention inside each and, with ``lookback``, to blocks before it.

    token i sees j  where  0 <= i // block - j // block <= lookback,  and j <= i if causal.

The baseline of the Long Range Arena (Tay et al., 2021, 2011.04006) and the local layers of MASFormer (Zhang et al.,
2023, 2310.12442). Without a look back nothing crosses a border of blocks. Cost: 4 width^2 multiply-accumulates a token
and 2 (1 + lookback) block width a query (with tiles, where causal, about half as many as that). State: keys and values
of the last (1 + lookback) block tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from formwright.ops.window_attention import chunked, window_attention
from formwright.parts.base import Traits
from formwright.parts.context import Context
from formwright.parts.mixers._windows import Windowed, at_least
from formwright.registry import Paper, register


@register("mixer", "local", paper=Paper("Tay et al.", 2021, "2011.04006"), summary="softmax attention inside blocks")
class Local(Windowed):
    """Slots and shared arguments as :class:`Windowed`.

    Args:
        block: tokens of a block; a block longer than the sequence makes this full attention.
        lookback: blocks before its own that a token sees as well.
        causal: no token sees a later one; needed to stream.
    """

    examples = (
        {"heads": 4, "block": 5, "causal": True, "rotary": {}},
        {"heads": 4, "kv_heads": 2, "block": 4, "lookback": 1},
        {"heads": 2, "kv_heads": 1, "block": 3, "lookback": 1, "causal": True, "bias": False},
    )

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        block: int,
        lookback: int = 0,
        causal: bool = False,
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
        at_least(0, lookback=lookback)
        self.block, self.lookback = block, lookback
        self.memory = (1 + lookback) * block
        self.traits = Traits(causal=causal, streams=causal)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: Context) -> Tensor:
        causal = self.traits.causal
        seen = chunked(q.shape[1], self.block, self.lookback, causal=causal)
        # Causal with padding on the right: a real query never reaches a padded key.
        valid = None if causal or ctx.lengths is None else ctx.valid(q)
        return window_attention(q, k, v, seen, scale=self.scale, valid=valid)[0]

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        apart = queries // self.block - keys // self.block
        seen = (apart >= 0) & (apart <= self.lookback)
        return seen & (keys <= queries) if self.traits.causal else seen

    def pairs(self, length: int) -> int:
        return chunked(length, self.block, self.lookback, causal=self.traits.causal).pairs(self.heads)
