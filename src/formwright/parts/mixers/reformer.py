"""Reformer: every token attends to the tokens whose hash is its own, found by sorting.

Queries are keys too, k_j = q_j / |q_j|. A round turns each query by random rotations R and takes the bucket
argmax([q R; -q R]); tokens are sorted by (bucket, position) and cut into chunks, and a chunk attends to itself and to
the one before it. A token sees itself only where it sees nothing else. Rounds are weighed by what they found:

    o_i = sum_r exp(z_i^r - logsumexp_r z_i^r) o_i^r,   z_i^r the logarithm of round r's normaliser

A pair found in several rounds counts once. Kitaev et al., 2020 (2001.04451). With ``causal`` no token reads the value
of a later one, but which earlier ones it meets depends on where chunks are cut, and so on later tokens: it is not
declared causal and does not stream. Cost: 3 W^2 multiply-accumulates a token for the slots, and for each round
4 chunk W and W buckets / 2, besides the sorting.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.kit.errors import SpecError
from formwright.parts.base import Traits
from formwright.parts.context import Context, keyed_generator
from formwright.parts.mixers._projected import Projected
from formwright.registry import Paper, register

#: Logit of a token with itself: below any other, above nothing.
SELF = -1e5
NOTHING = -1e30


@register("mixer", "reformer", paper=Paper("Kitaev et al.", 2020, "2001.04451"))
class Reformer(Projected):
    """Slots ``q`` and ``v`` (heads*head_width, W) and ``o`` (W, heads*head_width), as in ``attention``; no ``k``.

    Args:
        heads, head_width, bias, out_bias, dropout: as in ``attention``.
        chunk: tokens in a chunk of the sorted list.
        buckets: an even number, or 1 for no hashing; about length / chunk is usual.
        rounds: of hashing.
        causal: see the module: values of later tokens are hidden, their hashes are not.
        same_bucket: see only tokens of the same bucket.
        see_self: a token counts itself as any other.
        seed: of the rotations; training draws new ones in each call that has a seed.
    """

    examples = (
        {"heads": 2, "chunk": 4, "buckets": 4, "rounds": 2},
        {"heads": 2, "chunk": 16, "buckets": 2, "causal": True, "same_bucket": True, "bias": False},
        {"heads": 4, "chunk": 64, "buckets": 1, "see_self": True},
    )

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        chunk: int = 64,
        buckets: int = 64,
        rounds: int = 1,
        causal: bool = False,
        same_bucket: bool = False,
        see_self: bool = False,
        seed: int = 0,
        head_width: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            width, heads=heads, head_width=head_width, bias=bias, out_bias=out_bias, dropout=dropout,
            inputs=("q", "v"),
        )  # fmt: skip
        if chunk < 1 or rounds < 1:
            raise SpecError(f"chunk={chunk} and rounds={rounds} must be at least 1")
        if buckets != 1 and (buckets < 2 or buckets % 2):
            raise SpecError(f"buckets={buckets} must be even, since a rotation gives two each; or 1 for no hashing")
        self.chunk, self.buckets, self.rounds, self.seed = chunk, buckets, rounds, seed
        self.hides, self.same_bucket, self.see_self = causal, same_bucket, see_self
        self.traits = Traits(packed=False, gradient="piecewise")

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.check_rules(ctx)
        q, v = self.enter(x, ctx)
        if x.shape[1] == 0:
            return self.leave(v, ctx)
        exact = torch.promote_types(q.dtype, torch.float32)
        q, v = q.to(exact).transpose(1, 2), v.to(exact).transpose(1, 2)
        real = ctx.valid(x)
        buckets = self.hashed(q.detach(), ctx).masked_fill(~real[:, None, None], self.buckets)
        return self.leave(self.attend(q, v, buckets, real).transpose(1, 2).to(x.dtype), ctx)

    def hashed(self, q: Tensor, ctx: Context) -> Tensor:
        """(B, H, L, D) -> buckets (B, H, R, L), below ``buckets``."""
        if self.buckets == 1:
            return torch.zeros(*q.shape[:2], self.rounds, q.shape[2], dtype=torch.long, device=q.device)
        shape = (q.shape[3], self.rounds * self.buckets // 2)
        if self.training and ctx.seed is not None:
            turn = ctx.noise(shape, q, name="rotations")
        else:
            turn = rotations(*shape, self.seed).to(q)
        turned = (q @ turn).unflatten(-1, (self.rounds, -1))
        return torch.cat((turned, -turned), -1).argmax(-1).transpose(2, 3)

    def attend(self, q: Tensor, v: Tensor, buckets: Tensor, real: Tensor) -> Tensor:
        """q and v (B, H, L, D), buckets (B, H, R, L), real (B, L) -> (B, H, L, D)."""
        length = q.shape[2]
        size = min(self.chunk, length)
        places = torch.arange(length, device=q.device)
        order = (buckets * length + places).argsort(-1)  # padding, in a bucket of its own, comes last
        rank = torch.empty_like(order).scatter_(-1, order, places.expand_as(order))

        def cut(values: Tensor) -> Tensor:
            """(B, H, R, L, ...) in sorted order -> (B, H, R, chunks, size, ...); what is added behind is zero."""
            padded = F.pad(values, (*[0, 0] * (values.dim() - 4), 0, -length % size))
            return padded.unflatten(3, (-1, size))

        def taken(values: Tensor) -> Tensor:
            index = order[..., None].expand(*order.shape, values.shape[-1])
            return cut(values[:, :, None].expand(-1, -1, self.rounds, -1, -1).gather(3, index))

        # Places are counted from 1, so that 0 is no token: padding, or what ``cut`` added.
        held = cut(torch.where(real[:, None, None].expand_as(order).gather(3, order), order + 1, 0))
        queries, keys = taken(q), two(taken(F.normalize(q, dim=-1)))
        logits = queries @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
        logits = self._ruled(logits, held, rank // size, buckets)
        weighed = logits.logsumexp(-1)
        out = (logits - weighed[..., None]).exp() @ two(taken(v))
        index = rank[..., None].expand(*rank.shape, out.shape[-1])
        out = out.flatten(3, 4).gather(3, index)
        share = weighed.flatten(3, 4).gather(3, rank).softmax(2)
        return (out * share[..., None]).sum(2)

    def _ruled(self, logits: Tensor, held: Tensor, chunks: Tensor, buckets: Tensor) -> Tensor:
        """Logits (B, H, R, chunks, size, 2 size) with hidden pairs at nothing and repeated ones lowered.

        held (B, H, R, chunks, size): places from 1. chunks and buckets (B, H, R, L): of each token in each round.
        """
        query, key = held[..., :, None], two(held)[..., None, :]
        seen = key > 0
        if self.hides:
            seen = seen & (key <= query)
        if self.same_bucket or self.rounds > 1:
            found = self._found(held, chunks, buckets)
            if self.same_bucket:
                seen = seen & torch.stack([found[r][:, :, r] for r in range(self.rounds)], 2)
            logits = logits - torch.stack(found).sum(0).clamp(min=1).to(logits.dtype).log()
        if not self.see_self:
            logits = logits.masked_fill(query == key, SELF)
        return logits.masked_fill(~seen, NOTHING)

    def _found(self, held: Tensor, chunks: Tensor, buckets: Tensor) -> list[Tensor]:
        """For each round, which pairs of every round's chunks it finds as well."""
        index = (held - 1).clamp(min=0).flatten(2)

        def of(values: Tensor, r: int) -> tuple[Tensor, Tensor]:
            mine = values[:, :, r].gather(2, index).view(held.shape)
            return mine[..., :, None], two(mine)[..., None, :]

        found = []
        for r in range(self.rounds):
            query, key = of(chunks, r)
            near = (query - key == 0) | (query - key == 1)
            if self.same_bucket:
                query, key = of(buckets, r)
                near = near & (query == key)
            found.append(near)
        return found

    def mixing_macs(self, length: int, past: int) -> int:
        size = max(1, min(self.chunk, length))
        padded = -(-length // size) * size
        hashing = 0 if self.buckets == 1 else length * self.buckets // 2
        return self.heads * self.head_width * self.rounds * (hashing + 4 * padded * size)


def two(values: Tensor) -> Tensor:
    """(B, H, R, chunks, size, ...): each chunk with the one before it, (B, H, R, chunks, 2 size, ...)."""
    before = F.pad(values, (*[0, 0] * (values.dim() - 4), 1, 0))[:, :, :, :-1]
    return torch.cat((before, values), 4)


@functools.lru_cache(maxsize=64)
def rotations(width: int, count: int, seed: int) -> Tensor:
    """(width, count) normal numbers, the same in every run."""
    return torch.randn(width, count, generator=keyed_generator(seed, "reformer"), dtype=torch.float64)
