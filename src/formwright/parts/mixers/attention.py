"""Softmax attention: every token reads the others by similarity of query and key.

``o(concat_h softmax(q_h k_h^T * scale + bias) v_h)`` with multi-head, grouped and multi-query forms, rules of
visibility (causal, window, prefix, segments), rotary, ALiBi or bucketed distances, normalised queries and keys, and
cross-attention to another tower. Vaswani et al., 2017 (1706.03762); grouped queries: Ainslie et al., 2023
(2305.13245). Cost: 4 width^2 multiply-accumulates a token (fewer with grouped keys) and 2 L width a query over L keys.
State: keys and values of every token seen, or of the last ``window``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError, unknown
from formwright.ops.attention import Ahead, attention, attention_reference, blocks, packed_attention
from formwright.ops.attention.native import Heads, suits
from formwright.parts.base import (
    Cost,
    Part,
    Shape,
    Slot,
    Step,
    Tail,
    Traits,
    cost_sum,
    costed,
    dropout,
    drops,
    element_bytes,
    own_parameters,
    project,
)
from formwright.parts.context import EMPTY, Context, Memory, Visible
from formwright.parts.linears.dense import Dense
from formwright.parts.mixers._projected import head_sizes
from formwright.parts.norms.norms import LayerNorm, RMSNorm
from formwright.parts.positions import alibi_slopes, check_rotary, rotary_angles, rotate
from formwright.registry import Paper, register

DISTANCES = ("alibi", "relative")


@register("mixer", "attention", paper=Paper("Vaswani et al.", 2017, "1706.03762"))
class Attention(Part):
    """Slots ``q`` (heads*head_width, W), ``k``, ``v`` (kv_heads*head_width, W) and ``o`` (W, heads*head_width).

    Args:
        heads, kv_heads, head_width: ``kv_heads`` divides ``heads`` (1: multi-query); head_width defaults to W / heads.
        causal, window: see :class:`~formwright.parts.context.Visible`; rules of the context are added.
        bias, out_bias: biases of q, k, v, and of o (default: as ``bias``).
        rotary: {"theta", "width", "interleaved", "scaling": {"kind", ...}}.
        distance: {"kind": "alibi"} or {"kind": "relative", "table": name of the conditioner that holds it}.
        qk_norm: "rmsnorm" or "layernorm" over each head's entries, before rotary.
        scale: of the scores; default head_width ** -0.5.
        memory: name of the tower to cross-attend, with ``memory_width`` (default W); takes no rule and no distance.
        dropout: rate on the output of ``o`` while training.
    """

    examples: ClassVar[tuple[dict, ...]] = (
        {"heads": 4},
        {"heads": 4, "causal": True, "rotary": {}},
        {"heads": 4, "kv_heads": 1, "causal": True, "window": 5, "distance": {"kind": "alibi"}},
        {"heads": 4, "kv_heads": 2, "head_width": 4, "qk_norm": "rmsnorm", "window": 3, "bias": False},
        {
            "heads": 2,
            "causal": True,
            "rotary": {"width": 8, "interleaved": True, "scaling": {"kind": "linear", "factor": 2.0}},
            "qk_norm": "layernorm",
        },
        {"heads": 2, "causal": True, "distance": {"kind": "relative"}},
        {"heads": 4, "kv_heads": 2, "memory": "encoder", "memory_width": 20, "qk_norm": "rmsnorm"},
    )

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int | None = None,
        head_width: int | None = None,
        causal: bool = False,
        window: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        rotary: dict[str, Any] | None = None,
        distance: dict[str, Any] | None = None,
        qk_norm: Literal["rmsnorm", "layernorm"] | None = None,
        qk_norm_eps: float = 1e-6,
        scale: float | None = None,
        memory: str | None = None,
        memory_width: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kv_heads, head = head_sizes(width, heads, kv_heads, head_width)
        if window is not None and window < 1:
            raise SpecError(f"window={window} must be at least 1")
        if rotary is not None:
            check_rotary(rotary, head)
        if distance is not None and distance.get("kind") not in DISTANCES:
            raise SpecError(unknown("distance", str(distance.get("kind")), DISTANCES))
        if memory is not None and (causal or window is not None or rotary is not None or distance is not None):
            raise SpecError("cross-attention takes no causal, window, rotary or distance: a memory has no order here")
        self.head_width, self.scale, self.rate, self.memory = head, scale, dropout, memory
        self.rule = Visible(causal=causal, window=window)
        self.rotary, self.distance = rotary, distance
        source = width if memory_width is None else memory_width
        self.q = Dense(width, heads * head, bias, "q")
        self.k = Dense(source, kv_heads * head, bias, "k")
        self.v = Dense(source, kv_heads * head, bias, "v")
        self.o = Dense(heads * head, width, bias if out_bias is None else out_bias, "o")
        norm = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
        self.q_norm = norm[qk_norm](head, qk_norm_eps) if qk_norm else None
        self.k_norm = norm[qk_norm](head, qk_norm_eps) if qk_norm else None
        streams = causal or memory is not None
        growth: Literal["linear", "quadratic"] = "quadratic" if memory is None and window is None else "linear"
        self.traits = Traits(causal=streams, streams=streams, packed=memory is None, growth=growth)
        self.prefixes = memory is None
        self.axes = {
            "q": ("heads*head", "stream"),
            "k": ("kv_heads*head", "memory" if memory else "stream"),
            "v": ("kv_heads*head", "memory" if memory else "stream"),
            "o": ("stream", "heads*head"),
        }
        if memory is not None:
            self.reads = (memory,)
        elif distance is not None and distance["kind"] == "relative":
            self.reads = (distance.get("table", "relative-bias"),)

    @property
    def heads(self) -> int:
        return self.q.out_features // self.head_width

    @property
    def kv_heads(self) -> int:
        return self.k.out_features // self.head_width

    def slots(self) -> dict[str, Slot]:
        shape = (self.kv_heads, self.head_width)
        if self.memory is not None:
            return {name: Slot("memory", shape) for name in ("k", "v")}
        if not self.rule.causal:
            return {}
        kind: Literal["window", "grow"] = "grow" if self.rule.window is None else "window"
        return {name: Slot(kind, shape, window=self.rule.window) for name in ("k", "v")}

    def furnish(self, ctx: Context, x: Tensor, generator: torch.Generator) -> Context:
        def values(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(x)

        if self.memory is not None:
            lengths = torch.randint(0, 7, (len(x),), generator=generator).to(x.device)
            made = Memory(values(len(x), 6, self.k.in_features), lengths)
            return ctx.replace(memory={**ctx.memory, self.memory: made})
        if self.distance is not None and self.distance["kind"] == "relative":
            table = values(self.heads, 2 * max(x.shape[1], 1) - 1)
            return ctx.replace(condition={**ctx.condition, self.reads[0]: table})
        return ctx

    def forward(self, x: Tensor, ctx: Context, tail: Tail | None = None) -> Tensor:
        mixed = self._mixed(x, ctx).flatten(2)
        if tail is not None:
            return self.o.joined(mixed, tail)
        return dropout(self.o(mixed, ctx), self.rate, ctx, self.training, "dropout")

    def finishes(self, tail: Tail) -> bool:
        return not drops(self.rate, self.training) and self.o.finishes(tail)

    def step(self, ctx: Context, norm: nn.Module | None, before: bool = False) -> Step | None:
        rule = self.rule & ctx.visible
        bare = self.memory is None and self.rotary is None and self.distance is None
        if ctx.offsets is None or ctx.begins or not (bare and rule.simple):
            return None
        if drops(self.rate, self.training) or ctx.wants("probs"):
            return None
        held: Any = self._modules
        q, k, v, o = slots = [held["q"], held["k"], held["v"], held["o"]]
        kind = type(q)
        if held.get("q_norm") is not None or not (kind is type(k) is type(v) is type(o)):
            return None
        scale = self.head_width**-0.5 if self.scale is None else self.scale
        step = kind.attention(slots, Heads(self.head_width, scale, rule.causal), norm, before)
        return step if step is not None and suits(self.head_width, ctx.spans()) else None

    def _mixed(self, x: Tensor, ctx: Context) -> Tensor:
        """(B, L, H, D): what ``o`` reads."""
        if self.memory is not None:
            return self._cross(x, ctx)
        x = ctx.clear(x)
        q, k, v = (t.unflatten(-1, (-1, self.head_width)) for t in project([self.q, self.k, self.v], x, ctx))
        q, k = self._prepare(q, k, x, ctx)
        rule = self.rule & ctx.visible
        if ctx.offsets is not None:
            return self._packed(q, k, v, rule, ctx)
        return self._padded(q, k, v, x, rule, ctx)

    def _prepare(self, q: Tensor, k: Tensor, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            width = self.rotary.get("width") or self.head_width
            cos, sin = rotary_angles(ctx.place(x), width, self.rotary, q.dtype)
            interleaved = bool(self.rotary.get("interleaved"))
            q, k = rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
        return q, k

    def _bias(self, ctx: Context, queries: Tensor, keys: Tensor):
        """A function of two slices giving the additive bias, or None. Positions (B or 1, L)."""
        if self.distance is None:
            return None
        if self.distance["kind"] == "alibi":
            slopes = alibi_slopes(self.heads).to(queries.device)[None, :, None, None]

            def alibi(rows: slice, columns: slice) -> Tensor:
                gap = keys[:, None, None, columns] - queries[:, None, rows, None]
                return slopes * -gap.abs()

            return alibi
        name = self.distance.get("table", "relative-bias")
        if name not in ctx.condition:
            raise SpecError(f"{ctx.path}: attention reads condition {name!r}, which no conditioner of this model fills")
        table = ctx.condition[name]  # (heads, 2R - 1): one value per distance -R+1 .. R-1
        reach = (table.shape[1] + 1) // 2

        def relative(rows: slice, columns: slice) -> Tensor:
            gap = keys[:, None, columns] - queries[:, rows, None]
            # Places that hold no token lie outside the table; they are never seen.
            return table[:, (gap + reach - 1).clamp(0, table.shape[1] - 1)].transpose(0, 1)

        return relative

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, rule: Visible, ctx: Context) -> Tensor:
        if ctx.state is not None:
            raise SpecError(f"{ctx.path}: attention streams in the padded layout; give lengths instead of offsets")
        spans = ctx.spans()
        if rule.segments is not None or isinstance(rule.prefix, Tensor):
            raise SpecError(f"{ctx.path}: rules of segments and per-row prefixes need the padded layout")
        mask = bias = None
        if not rule.simple or self.distance is not None:
            longest = max((stop - start for start, stop in spans), default=0)
            steps = torch.arange(longest, device=q.device)[None]
            bias = self._bias(ctx, steps, steps)
            if not rule.simple:

                def mask(rows: slice, columns: slice) -> Tensor:
                    return rule.mask(steps[:, rows], steps[:, columns])

        if ctx.wants("probs"):
            ctx.note("probs", self._block_diagonal(q, k, v, spans, rule, ctx))
        free = rule.prefix is None and rule.context is None
        return packed_attention(
            q,
            k,
            v,
            spans,
            scale=self.scale,
            causal=rule.causal and free,
            mask=mask,
            bias=bias,
            window=rule.window if free else None,
            ahead=ctx.ahead(),
        )

    def _block_diagonal(self, q, k, v, spans, rule: Visible, ctx: Context) -> Tensor:
        """(1, H, T, T) probabilities of a packed batch, zero across borders; only for who asked to look."""
        out, ahead = q.new_zeros(1, q.shape[2], q.shape[1], q.shape[1]), ctx.ahead()
        for index, (start, stop) in enumerate(spans):
            steps = torch.arange(stop - start, device=q.device)[None]
            bias = self._bias(ctx, steps, steps)
            whole = slice(0, stop - start)
            out[:, :, start:stop, start:stop] = self._probs(
                q[:, start:stop],
                k[:, start:stop],
                rule.mask(steps, steps),
                None if bias is None else bias(whole, whole),
                None if ahead is None else ahead.rows(index, index + 1),
            )
        return out

    def _probs(
        self, q: Tensor, k: Tensor, seen: Tensor | None, bias: Tensor | None, ahead: Ahead | None = None
    ) -> Tensor:
        """(B, H, L, S) probabilities of the tokens; what a learned prefix takes is left out of them."""
        first = 0
        if ahead is not None:
            first = ahead.k.shape[1]
            seen = ahead.visible(None if seen is None else seen[:, None], k.shape[1])
            seen = None if seen is None else seen[:, 0]
            bias = None if bias is None else nn.functional.pad(bias, (first, 0))
            k = ahead.before(k, k)[0]
        return attention_reference(q, k, k, scale=self.scale, seen=seen, bias=bias)[1][..., first:]

    def _padded(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rule: Visible, ctx: Context) -> Tensor:
        places, ahead = ctx.place(x), ctx.ahead()
        past = None if ctx.state is None else ctx.state.get(f"{ctx.path}.k")
        started = past is not None and past.shape[1] > 0
        if started and rule.segments is not None:
            raise SpecError(f"{ctx.path}: rules of segments need whole sequences, so this call cannot go on a stream")
        keys = torch.where(ctx.valid(x), places, -1) if ctx.lengths is not None else places
        if ctx.state is not None and self.slots():
            all_k, all_places = ctx.append("k", k, rule.window)
            all_v, _ = ctx.append("v", v, rule.window)
            if started:  # otherwise a call sees only its own tokens, which need no mask beyond the rule
                k, v, keys = all_k, all_v, all_places
        plain = rule.simple and not started and self.distance is None
        if ctx.wants("probs"):
            whole, bias = slice(None), self._bias(ctx, places, keys)
            segments = rule.segments
            added = None if bias is None else bias(whole, whole)
            ctx.note("probs", self._probs(q, k, rule.mask(places, keys, segments, segments), added, ahead))
        if started and rule.simple and self.distance is None and self._sees_all(x, ctx):
            return attention(q, k, v, scale=self.scale, ahead=ahead)
        if plain and (rule.causal or ctx.lengths is None):
            # Causal with padding on the right: a real query never reaches a padded key.
            return attention(q, k, v, scale=self.scale, causal=rule.causal, ahead=ahead)
        if plain:
            seen = ctx.valid(x)[:, None]
            return attention(q, k, v, scale=self.scale, mask=lambda rows, columns: seen[:, :, columns], ahead=ahead)

        def mask(rows: slice, columns: slice) -> Tensor:
            segments = rule.segments
            return rule.mask(
                places[:, rows],
                keys[:, columns],
                None if segments is None else segments[:, rows],
                None if segments is None else segments[:, columns],
            )

        near = rule.window is not None and rule.prefix is None and rule.context is None and not started
        return attention(
            q,
            k,
            v,
            scale=self.scale,
            causal=rule.causal,
            mask=mask,
            bias=self._bias(ctx, places, keys),
            window=rule.window if near else None,
            ahead=ahead,
        )

    @staticmethod
    def _sees_all(x: Tensor, ctx: Context) -> bool:
        """Whether this call brings one token to each row, which sees all that came before: no mask need be made."""
        return x.shape[1] == 1 and ctx.lengths is None and ctx.state is not None and ctx.state.even

    def _cross(self, x: Tensor, ctx: Context) -> Tensor:
        assert self.memory is not None
        if self.memory not in ctx.memory:
            raise SpecError(f"{ctx.path}: cross-attention reads memory {self.memory!r}, which this call does not carry")
        memory = ctx.memory[self.memory]
        q = self.q(ctx.clear(x), ctx).unflatten(-1, (-1, self.head_width))

        source = Context(lengths=memory.lengths).clear(memory.x)

        def made(slot: Any, norm: Any = None) -> Tensor:
            heads = slot(source, ctx).unflatten(-1, (-1, self.head_width))
            return heads if norm is None else norm(heads)

        q = q if self.q_norm is None else self.q_norm(q)
        k, v = ctx.slot("k", lambda: made(self.k, self.k_norm)), ctx.slot("v", lambda: made(self.v))
        ctx.keep("k", k)
        ctx.keep("v", v)
        seen = None
        if memory.lengths is not None:
            seen = (torch.arange(k.shape[1], device=x.device)[None] < memory.lengths[:, None])[:, None]
        if ctx.wants("probs"):
            ctx.note("probs", self._probs(q, k, None if seen is None else seen.expand(-1, q.shape[1], -1), None))
        if seen is None:
            return attention(q, k, v, scale=self.scale)
        return attention(q, k, v, scale=self.scale, mask=lambda rows, columns: seen[:, :, columns])

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        per_pair, each = 2 * self.heads * self.head_width, 2 * self.kv_heads * self.head_width * element_bytes(self)
        held = cost_sum([child.cost(shape) for _, child in costed(self)]) + own_parameters(self)
        if self.memory is not None:
            # Keys and values of the memory are made by the first call of a stream.
            read = Shape.full(len(shape.lengths), 0 if shape.past else shape.memory)
            slots = [slot.cost(shape) for slot in (self.q, self.o)] + [slot.cost(read) for slot in (self.k, self.v)]
            macs = sum(cost.macs for cost in slots) + per_pair * shape.tokens * shape.memory
            return Cost(held.parameters, macs, each * len(shape.lengths) * shape.memory)
        pairs = sum(self._pairs(length, shape.past) for length in shape.lengths)
        kept = sum(self._kept(length + shape.past) for length in shape.lengths) if self.slots() else 0
        return held + Cost(0, per_pair * pairs, each * kept)

    def _kept(self, tokens: int) -> int:
        return tokens if self.rule.window is None else min(tokens, self.rule.window)

    def _pairs(self, length: int, past: int) -> int:
        """Products of a query and a key; a window spares those that no block of queries can need."""
        if past or self.rule.window is None:
            return length * (length + (self._kept(past) if self.slots() else 0))
        found = blocks(length, length, self.rule.window, self.rule.causal)
        return sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in found)
