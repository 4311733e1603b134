"""Linear attention: queries and keys are mapped to positive features, so that sums over keys can be kept.

    o_t = phi(q_t)^T sum_s phi(k_s) v_s^T / (phi(q_t)^T sum_s phi(k_s)),   phi(x) = elu(x) + 1

The sums run over all tokens, or with ``causal`` up to t. Katharopoulos et al., 2020 (2006.16236). Cost: 4 W^2
multiply-accumulates a token for the slots and 2 W head_width for the sums, whatever the length. State: one matrix
(head_width, head_width + 1) for each head of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.kit.errors import SpecError
from formwright.ops.linear_attention import linear_attention, linear_attention_macs
from formwright.parts.base import Cost, Shape, Slot, Traits, element_bytes
from formwright.parts.context import EMPTY, Context
from formwright.parts.mixers._projected import Projected
from formwright.parts.pieces import contexts, piece_of, pieced
from formwright.registry import Paper, register

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x) + 1.0,
    "relu": F.relu,
    "squared-relu": lambda x: F.relu(x).square(),
}


class FeatureAttention(Projected):
    """Attention over mapped queries and keys: :meth:`features` maps them, the rest is here.

    The state is held in float32 at least, since sums over a long stream outgrow half precision.
    """

    def __init__(self, width: int, *, heads: int, causal: bool, eps: float, **rest: Any) -> None:
        super().__init__(width, heads=heads, **rest)
        self.traits = Traits(causal=causal, streams=causal)
        self.eps = eps

    def features(self, q: Tensor, k: Tensor, ctx: Context, most: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries (B, L, H, D) and keys (B, L, kv_heads, D) -> the same with features, not negative, for D. ``most`` is
        given where these are not all keys."""
        raise NotImplementedError

    def most(self, k: Tensor, ctx: Context, size: int) -> Tensor | None:
        """What has to be known of all keys before ``size`` of them are mapped at a time."""
        return None

    @property
    def feature_width(self) -> int:
        return self.head_width

    def slots(self) -> dict[str, Slot]:
        if not self.traits.streams:
            return {}
        dtype = torch.float32 if element_bytes(self) < 4 else None
        return {"sums": Slot("fixed", (self.kv_heads, self.feature_width, self.head_width + 1), dtype)}

    @pieced
    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.check_rules(ctx)
        if ctx.offsets is not None and ctx.state is not None:
            raise SpecError(f"{ctx.path}: linear sums stream in the padded layout; give lengths instead of offsets")
        q, k, v = self.enter(x, ctx)
        if not self.traits.causal and ctx.offsets is None and (size := piece_of(x)):
            return self.leave(self._in_pieces(q, k, v, ctx, size), ctx)
        q, k = self.features(q, k, ctx)
        k = ctx.clear(k)  # phi(0) is not zero, so padding would be summed
        borders = None if ctx.offsets is None else [0, *(stop for _, stop in ctx.spans())]
        shared, causal = self.heads // self.kv_heads, self.traits.causal
        start = self._sums(v, ctx).repeat_interleave(shared, 1) if ctx.begins else None
        k, v = self.for_queries(k), self.for_queries(v)
        mixed, sums = linear_attention(q, k, v, causal=causal, state=start, borders=borders, eps=self.eps)
        if causal:
            ctx.keep("sums", sums if shared == 1 else sums[:, ::shared].contiguous())
        return self.leave(mixed, ctx)

    def _in_pieces(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, size: int) -> Tensor:
        """Without ``causal``: keys are mapped and summed piece by piece, then queries are mapped and read the sums, so
        that never more than ``size`` tokens have features."""
        most, none, pieces = self.most(k, ctx, size), slice(0), list(contexts(k, ctx, size))
        out, sums = q.new_empty(q.shape), None

        def attended(queries: slice, keys: slice, inner: Context) -> tuple[Tensor, Tensor]:
            mapped, held = self.features(q[:, queries], k[:, keys], inner, most)
            held, values = self.for_queries(inner.clear(held)), self.for_queries(v[:, keys])
            return linear_attention(mapped, held, values, causal=False, state=sums, eps=self.eps)

        for piece, inner in pieces:
            sums = attended(none, piece, inner)[1]
        for piece, inner in pieces:
            out[:, piece] = attended(piece, none, inner)[0]
        return out

    def _sums(self, v: Tensor, ctx: Context) -> Tensor:
        """What the stream has summed so far, for each head of the keys."""
        shape = (len(v), self.kv_heads, self.feature_width, self.head_width + 1)
        exact = torch.promote_types(v.dtype, torch.float32)
        return ctx.slot("sums", lambda: v.new_zeros(shape, dtype=exact))

    def mixing_macs(self, length: int, past: int) -> int:
        inner, outer = self.feature_width, self.head_width
        return self.heads * linear_attention_macs(length, inner, outer, self.traits.causal)

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        if not self.traits.streams:
            return super().cost(shape, knobs)
        numbers = self.kv_heads * self.feature_width * (self.head_width + 1)
        state_bytes = len(shape.lengths) * numbers * max(4, element_bytes(self))
        return super().cost(shape, knobs) + Cost(state_bytes=state_bytes)


@register("mixer", "linear-attention", paper=Paper("Katharopoulos et al.", 2020, "2006.16236"))
class LinearAttention(FeatureAttention):
    """Slots as in ``attention``.

    Args:
        heads, kv_heads, head_width, bias, out_bias, dropout: as in ``attention``.
        causal: sum over earlier tokens and the own one only; streams.
        feature: phi, "elu" (elu(x) + 1, the paper's), "relu" or "squared-relu".
        eps: added to the divisor; a query that meets no key gives zeros.
    """

    examples = (
        {"heads": 4},
        {"heads": 2, "causal": True},
        {"heads": 4, "kv_heads": 2, "head_width": 5, "causal": True, "feature": "squared-relu", "bias": False},
    )

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int | None = None,
        head_width: int | None = None,
        causal: bool = False,
        feature: Literal["elu", "relu", "squared-relu"] = "elu",
        bias: bool = True,
        out_bias: bool | None = None,
        eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            width, heads=heads, kv_heads=kv_heads, head_width=head_width, causal=causal, eps=eps, bias=bias,
            out_bias=out_bias, dropout=dropout,
        )  # fmt: skip
        self.feature = feature

    def features(self, q: Tensor, k: Tensor, ctx: Context, most: Tensor | None = None) -> tuple[Tensor, Tensor]:
        phi = FEATURES[self.feature]
        return phi(q), phi(k)
