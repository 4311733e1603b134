"""Combiner: attention in which every token of the past has weight, at the cost of a sparse pattern.

A query attends to a small set of tokens directly and to all others through pooled regions, whose members share a
region's weight by a softmax of the region's own query. Ren et al., 2021 (2107.05768). The plan says which tokens are
direct and which form regions; :mod:`formwright.ops.combiner` has them all, and the routing plan of the paper is not
there. Projections are those of ``attention``, so trained ones may be put in. Cost: 4 width^2 multiply-accumulates a
token, and of order sqrt(L) width a query over L keys (log L for ``logsparse``). State (``fixed``): queries, keys and
values of the last ``block`` tokens, and a key and a value for every finished block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.ops.combiner import combiner, combiner_macs
from formwright.ops.combiner.grid import Tokens, scaled
from formwright.ops.combiner.stream import Call, fixed_start, fixed_stream
from formwright.parts.base import Cost, Part, Shape, Slot, Traits, dropout, element_bytes, project
from formwright.parts.context import EMPTY, Context
from formwright.parts.linears.dense import Dense
from formwright.parts.mixers._projected import head_sizes
from formwright.parts.positions import check_rotary, rotary_angles, rotate
from formwright.registry import Paper, register

Plan = Literal["fixed", "logsparse", "axial-vertical", "axial-horizontal", "axial-rowmajor", "mixture"]


@register("mixer", "combiner", paper=Paper("Ren et al.", 2021, "2107.05768"))
class Combiner(Part):
    """Slots ``q``, ``k``, ``v`` (heads*head_width, W) and ``o`` (W, heads*head_width); with ``deepsets`` also
    ``pool_q`` and ``pool_k`` (head_width, head_width), which all heads share ("axial-rowmajor" pools keys alone).

    Args:
        plan: "fixed" (own block, other blocks as regions), "logsparse" (blocks of 1, 2, 4 ... tokens), the paper's
            three axial plans, or "mixture" (the mean of the vertical and the horizontal one).
        block: tokens of a block, or of a row of the axial grid; "logsparse" takes none. Left out, the cost is
            O(L sqrt L): rows of 1, 2, 3 ... tokens where causal, else ceil(sqrt(length)) for each text. A given block
            is right for lengths near its square; "fixed" with one streams.
        abstraction: how a region's query and key come from its members': "max", "mean", or "deepsets" (the maximum
            after a linear map and ReLU).
        heads, head_width, causal, bias, out_bias, rotary, scale, dropout: as for ``attention``.
    """

    examples = (
        {"heads": 2, "plan": "fixed"},
        {"heads": 4, "plan": "fixed", "block": 4, "causal": True, "rotary": {}},
        {"heads": 2, "plan": "fixed", "block": 3, "causal": True, "abstraction": "deepsets", "bias": False},
        {"heads": 4, "head_width": 4, "plan": "logsparse", "causal": True, "abstraction": "mean"},
        {"heads": 2, "plan": "logsparse"},
        {"heads": 2, "plan": "mixture", "causal": True},
        {"heads": 2, "plan": "axial-rowmajor", "abstraction": "deepsets"},
    )

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        head_width: int | None = None,
        plan: Plan = "fixed",
        block: int | None = None,
        abstraction: Literal["max", "mean", "deepsets"] = "max",
        causal: bool = False,
        bias: bool = True,
        out_bias: bool | None = None,
        rotary: dict[str, Any] | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _, head = head_sizes(width, heads, None, head_width)
        if block is not None and (block < 1 or plan == "logsparse"):
            raise SpecError(f"block={block} must be at least 1, and plan 'logsparse' takes none")
        if scale is not None and scale <= 0:
            raise SpecError(f"scale={scale} must be above 0: a maximum of queries is scaled after it is taken")
        if rotary is not None:
            check_rotary(rotary, head)
        self.head_width, self.plan, self.block, self.causal = head, plan, block, causal
        self.pool = "mean" if abstraction == "mean" else "max"
        self.rotary, self.scale, self.rate = rotary, scale, dropout
        self.q = Dense(width, heads * head, bias, "q")
        self.k = Dense(width, heads * head, bias, "k")
        self.v = Dense(width, heads * head, bias, "v")
        self.o = Dense(heads * head, width, bias if out_bias is None else out_bias, "o")
        deep = abstraction == "deepsets"
        self.pool_q = Dense(head, head, False, "pool_q") if deep and plan != "axial-rowmajor" else None
        self.pool_k = Dense(head, head, False, "pool_k") if deep else None
        growth: Literal["n log n", "n sqrt n", "quadratic"] = "n sqrt n" if block is None else "quadratic"
        self.traits = Traits(
            causal=causal,
            streams=causal and plan == "fixed" and block is not None,
            packed=False,
            growth="n log n" if plan == "logsparse" else growth,
        )
        self.axes = {
            **dict.fromkeys(("q", "k", "v"), ("heads*head", "stream")),
            "o": ("stream", "heads*head"),
            **{name: ("head", "head") for name in ("pool_q", "pool_k") if getattr(self, name) is not None},
        }

    @property
    def heads(self) -> int:
        return self.q.out_features // self.head_width

    def slots(self) -> dict[str, Slot]:
        if not self.traits.streams or self.block is None:
            return {}
        shape = (self.heads, self.head_width)
        return {
            **{name: Slot("window", shape, window=self.block) for name in ("q", "k", "v")},
            **{name: Slot("grow", shape, every=self.block) for name in ("block_k", "block_v")},
        }

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        rule = ctx.visible
        if not rule.simple or (rule.causal and not self.causal):
            raise SpecError(f"{ctx.path}: combiner takes no rule of visibility but its own option causal; {rule}")
        x = ctx.clear(x)
        q, k, v = (t.unflatten(-1, (-1, self.head_width)) for t in project([self.q, self.k, self.v], x, ctx))
        if self.rotary is not None:
            width, interleaved = self.rotary.get("width") or self.head_width, bool(self.rotary.get("interleaved"))
            cos, sin = rotary_angles(ctx.place(x), width, self.rotary, q.dtype)
            q, k = rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
        streaming = ctx.state is not None and self.traits.streams
        mixed = self._stream(q, k, v, ctx) if streaming else self._whole(q, k, v, ctx)
        return dropout(self.o(mixed.flatten(2), ctx), self.rate, ctx, self.training, "dropout")

    def _features(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """What is pooled of queries and keys."""
        asked = q if self.pool_q is None else torch.relu(self.pool_q(q, ctx))
        return asked, k if self.pool_k is None else torch.relu(self.pool_k(k, ctx))

    def _tokens(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tokens:
        return scaled(q, k, v, self._features(q, k, ctx), self.scale)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        return combiner(
            q,
            k,
            v,
            plan=self.plan,
            block=self.block,
            causal=self.causal,
            lengths=ctx.lengths,
            pool=self.pool,
            features=self._features(q, k, ctx),
            scale=self.scale,
        )

    def _stream(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        assert ctx.state is not None and self.block is not None
        length, seen = q.shape[1], ctx.state.seen
        if not length:
            return v
        new = torch.full_like(seen, length) if ctx.lengths is None else ctx.lengths
        call = Call(seen, new, self.block)
        past = ctx.state.get(f"{ctx.path}.q")
        near_q, near_k, near_v = (ctx.append(name, t, self.block)[0] for name, t in (("q", q), ("k", k), ("v", v)))
        if past is None or past.shape[1] == 0:
            out, keys, values = fixed_start(self._tokens(q, k, v, ctx), self.block, self.pool)
        else:
            none = q[:, :0]
            finished = (ctx.slot("block_k", none), ctx.slot("block_v", none))
            near = self._tokens(near_q, near_k, near_v, ctx)
            out, keys, values = fixed_stream(near, finished, call, length, self.pool)
        ctx.append_runs("block_k", keys, call.finished, self.block)
        ctx.append_runs("block_v", values, call.finished, self.block)
        return out

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        entries = self.heads * self.head_width
        past = shape.past if self.traits.streams else 0
        macs = sum(self._macs(length, past) for length in shape.lengths) * entries
        kept = 0
        if self.traits.streams and self.block is not None:
            totals = [past + length for length in shape.lengths]
            kept = sum(3 * min(total, self.block) + 2 * (total // self.block) for total in totals)
        # The default cost of what makes features is that of one head; a stream makes the current block's again.
        again = min(past, self.block or 0) * len(shape.lengths)
        makers = sum(slot is not None for slot in (self.pool_q, self.pool_k))
        macs += makers * self.head_width**2 * (self.heads * (shape.tokens + again) - shape.tokens)
        return super().cost(shape, knobs) + Cost(0, macs, kept * entries * element_bytes(self))

    def _macs(self, length: int, past: int) -> int:
        """Of one row, for each entry of its heads."""
        if not past or not length or self.block is None:
            return combiner_macs(self.plan, length, self.block, self.causal)
        block = self.block
        rows, before = -(-(past + length) // block) - past // block, past // block
        columns = block if rows > 1 else min(block, past + length)
        queries, near = (length, rows * columns) if length <= block else (rows * columns, columns)
        return 2 * (queries * (near + rows + before) + rows * columns)
