"""Attention over keys chosen by their codes: each query reads a fixed share of them, by product quantization.

Gui et al., 2023 (2310.10365), SPT. Queries and keys get short codes from one codebook; a query reads the ``fraction``
of the row's keys (or ``keys`` of them) that its codes or their decoded keys say are nearest, and softmax over these is
exact. Cost: 4 W^2 multiply-accumulates a token for the slots, then 2 W a query and key read; choosing costs
one look-up a stretch for every pair. Nothing of length x length is kept for the backward pass: lists of 2
bytes a key read, an eighth of what probabilities take with the paper's eighth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from formwright.kit.errors import SpecError, unknown
from formwright.ops.sparse_attention import narrow, sparse_attention
from formwright.parts.base import Cost, Shape, Slot, Step, Traits, cost_sum, costed, element_bytes, own_parameters
from formwright.parts.context import EMPTY, Context, Visible
from formwright.parts.mixers.attention import Attention
from formwright.parts.quantizer import ProductQuantizer
from formwright.registry import Paper, register

SELECTIONS = ("codes", "products", "exact")
#: Ranks by matches leave so much room for the distance of query and key.
REACH = 1 << 24
#: Pairs ranked at once.
PAIRS = 1 << 22
#: (rows of queries, their distances to the keys (B, r, S)) -> ranks (B, H, r, S), of which the highest are read.
Rank = Callable[[slice, Tensor], Tensor]


@register("mixer", "pq-attention", paper=Paper("Gui et al.", 2023, "2310.10365"), summary="attention to matching codes")
class PQAttention(Attention):
    """Slots as in ``attention``, and ``quantizer``.

    Args:
        heads, kv_heads, head_width, causal, bias, out_bias, rotary, scale, dropout: as in ``attention``.
        fraction: share of the row's keys that a query reads, rounded up. keys: so many instead; then it streams.
        select: which keys are read: "products", greatest product of the query with the decoded key, which finds
            better ones than "codes", most matching codes (the paper's); "exact", greatest product with the key itself.
        codewords, code_width: of the codebook. refine: weight of the codebook's loss, which is declared in training.
    """

    examples: ClassVar[tuple[dict, ...]] = (
        {"heads": 4, "fraction": 0.5},
        {"heads": 4, "kv_heads": 2, "causal": True, "rotary": {}, "keys": 3, "select": "products"},
        {"heads": 2, "causal": True, "keys": 200, "bias": False, "code_width": 4},
    )

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int | None = None,
        head_width: int | None = None,
        causal: bool = False,
        fraction: float = 0.125,
        keys: int | None = None,
        select: Literal["codes", "products", "exact"] = "products",
        codewords: int = 16,
        code_width: int = 8,
        refine: float = 0.01,
        bias: bool = True,
        out_bias: bool | None = None,
        rotary: dict[str, Any] | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            width, heads=heads, kv_heads=kv_heads, head_width=head_width, causal=causal, bias=bias, out_bias=out_bias,
            rotary=rotary, scale=scale, dropout=dropout,
        )  # fmt: skip
        if select not in SELECTIONS:
            raise SpecError(unknown("select", select, SELECTIONS))
        if not 0.0 < fraction <= 1.0:
            raise SpecError(f"fraction={fraction} must be above 0 and at most 1")
        if keys is not None and keys < 1:
            raise SpecError(f"keys={keys} must be at least 1")
        self.fraction, self.keys, self.select, self.refine = fraction, keys, select, refine
        self.prefixes = False  # a prefix has no code by which it could be chosen
        self.quantizer = ProductQuantizer(self.head_width, codewords, code_width)
        self.traits = Traits(
            causal=causal,
            streams=causal and keys is not None,
            gradient="piecewise",
            packed=False,
            growth="linear" if keys is not None and select != "exact" else "quadratic",
        )

    def slots(self) -> dict[str, Slot]:
        return super().slots() if self.traits.streams else {}

    def step(self, ctx: Context, norm: Any, before: bool = False) -> Step | None:
        return None

    def _padded(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rule: Visible, ctx: Context) -> Tensor:
        if not rule.simple or (rule.causal and not self.rule.causal):
            raise SpecError(f"{ctx.path or 'pq-attention'}: pq-attention keeps no rule but its own causal")
        if ctx.state is not None and not self.traits.streams:
            raise SpecError(f"{ctx.path}: a share of a row's keys needs the whole row; give keys=N to stream")
        places = ctx.place(x)
        own = torch.where(ctx.valid(x), places, -1) if ctx.lengths is not None else places
        ctx.note("queries", q)
        ctx.note("keys", k)
        self._refine(q, k, ctx)
        seen = own
        if ctx.state is not None:
            k, seen = ctx.append("k", k)
            v, _ = ctx.append("v", v)
        listed = self._listed(q, k, places, seen.expand(len(x), -1))
        if ctx.wants("probs"):
            ctx.note("probs", lambda: self._of_read(q, k, listed))
        return sparse_attention(q, k, v, listed, self._factor)

    @property
    def _factor(self) -> float:
        return self.head_width**-0.5 if self.scale is None else self.scale

    def _refine(self, q: Tensor, k: Tensor, ctx: Context) -> None:
        """Declare the codebook's loss; padding counts for nothing."""
        if not (self.training and self.refine and ctx.notes is not None):
            return
        keep = ctx.valid(q)
        both = [t[keep] for t in (q, k)]
        if len(both[0]):
            ctx.loss(self.refine * sum(self.quantizer.loss(t.float()) for t in both))  # type: ignore[arg-type]

    # ------------------------------------------------------------------ which keys are read

    def _read(self, total: int) -> int:
        """How many of ``total`` keys a query reads at most."""
        return math.ceil(total * self.fraction) if self.keys is None else min(self.keys, total)

    def _counts(self, seen: Tensor) -> Tensor:
        """(B,): the same for each row, by the keys it has."""
        held = (seen >= 0).sum(-1)
        return (held.double() * self.fraction).ceil().long() if self.keys is None else held.clamp(max=self.keys)

    @torch.no_grad()
    def _listed(self, q: Tensor, k: Tensor, places: Tensor, seen: Tensor) -> Tensor:
        """(B, H, L, N): places of the keys that each query reads, -1 beyond their number."""
        counts, most = self._counts(seen), self._read(k.shape[1])
        rank = getattr(self, f"_by_{self.select}")(q, k)
        size = max(1, PAIRS // max(1, len(q) * self.heads * k.shape[1]))
        found = []
        for start in range(0, q.shape[1], size):
            rows = slice(start, start + size)
            gap = places[:, rows, None] - seen[:, None, :]
            shown = seen[:, None, :] >= 0
            if self.rule.causal:
                shown = shown & (gap >= 0)
            best = rank(rows, gap).masked_fill(~shown[:, None], -math.inf).sort(dim=-1, descending=True, stable=True)
            values, indices = best.values[..., :most], best.indices[..., :most]
            beyond = torch.arange(most, device=q.device) >= counts[:, None, None, None]
            found.append(narrow(indices.masked_fill(values.isinf() | beyond, -1), k.shape[1]))
        return torch.cat(found, 2) if found else q.new_zeros(len(q), self.heads, 0, most, dtype=torch.int16)

    def _by_codes(self, q: Tensor, k: Tensor) -> Rank:
        mine = self.quantizer.encode(q).permute(3, 0, 2, 1)[..., None]
        theirs = self._codes(k)[..., None, :]

        def rank(rows: slice, gap: Tensor) -> Tensor:
            matches = torch.zeros(*mine.shape[1:3], *gap.shape[1:], dtype=torch.int16, device=gap.device)
            for one, other in zip(mine, theirs):
                matches += one[:, :, rows] == other
            near = REACH - 2 * gap.abs() + (gap > 0)  # of two at one distance the earlier key
            return matches.double() * REACH + near[:, None]

        return rank

    def _by_products(self, q: Tensor, k: Tensor) -> Rank:
        table, codes = self.quantizer.products(q).permute(3, 0, 2, 1, 4), self._codes(k).long()[..., None, :]

        def rank(rows: slice, gap: Tensor) -> Tensor:
            shape = (*table.shape[1:3], *gap.shape[1:])
            parts = (torch.gather(one[:, :, rows], -1, code.expand(shape)) for one, code in zip(table, codes))
            return sum(parts, torch.zeros(shape, dtype=q.dtype, device=q.device))

        return rank

    def _by_exact(self, q: Tensor, k: Tensor) -> Rank:
        queries = q.transpose(1, 2)
        keys = k.permute(0, 2, 3, 1).repeat_interleave(self.heads // self.kv_heads, 1)
        return lambda rows, gap: queries[:, :, rows] @ keys

    def _codes(self, k: Tensor) -> Tensor:
        """Codes of keys (stretches, B, H, S), those of a group for each of its heads."""
        codes = self.quantizer.encode(k).permute(3, 0, 2, 1)
        return codes.repeat_interleave(self.heads // self.kv_heads, 2)

    def _of_read(self, q: Tensor, k: Tensor, listed: Tensor) -> Tensor:
        """(B, H, L, S), zero for what is not read; only for who asked to look."""
        shared = self.heads // self.kv_heads
        scores = (q * self._factor).transpose(1, 2) @ k.permute(0, 2, 3, 1).repeat_interleave(shared, 1)
        read = torch.zeros(*scores.shape[:-1], scores.shape[-1] + 1, dtype=torch.bool, device=q.device)
        read = read.scatter(-1, torch.where(listed < 0, scores.shape[-1], listed.long()), True)[..., :-1]
        return scores.masked_fill(~read, -math.inf).softmax(-1).nan_to_num(0.0)

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        held = cost_sum([child.cost(shape) for _, child in costed(self)]) + own_parameters(self)
        inner, macs = self.heads * self.head_width, 0
        for length in shape.lengths:
            total = length + shape.past
            choosing = {"codes": 0, "products": self.quantizer.codebook.shape[1], "exact": total}[self.select]
            macs += inner * length * (2 * self._read(total) + choosing)
        each = 2 * self.kv_heads * self.head_width * element_bytes(self)
        kept = sum(length + shape.past for length in shape.lengths) if self.slots() else 0
        return held + Cost(0, macs, each * kept)
