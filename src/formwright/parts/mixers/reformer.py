"""Reformer: every token attends to the tokens whose hash is its own, found by sorting.

Queries are keys too, k_j = q_j / |q_j|. A round turns each query by random rotations R and takes the bucket
argmax([q R; -q R]); tokens are sorted by (bucket, position) and cut into chunks, and a chunk attends to itself and to
the one before it. A token sees itself only where it sees nothing else. Rounds are weighed by what they found:

    o_i = sum_r exp(z_i^r - logsumexp_r z_i^r) o_i^r,   z_i^r the logarithm of round r's normaliser

A pair found in several rounds counts once. Kitaev et al., 2020 (2001.04451). With ``causal`` no token reads the value
of a later one, but which earlier ones it meets depends on where chunks are cut, and so on later tokens: it is not
declared causal and does not stream. Cost: 3 W^2 multiply-accumulates a token for the slots, and for each round
4 chunk W and W buckets / 2; sorting takes n log n comparisons, some hundredths of the time at 32,768 tokens. Buckets
are a fixed number here: where their number grows with the length, so that chunks fit them, so does the hashing.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.kit.errors import SpecError
from formwright.ops.attention.fused import fused_attention
from formwright.ops.native import watched
from formwright.parts.base import Traits
from formwright.parts.context import Context, keyed_generator
from formwright.parts.mixers._projected import Projected
from formwright.registry import Paper, register

#: Logit of a token with itself: below any other, above nothing.
SELF = -1e5
NOTHING = -1e30
#: Numbers that a part of the list may hold at once, over all rows and heads.
HELD = 2**20


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
        q, v = q.to(exact), v.to(exact)
        real = ctx.valid(x)
        buckets = self.hashed(q.detach().transpose(1, 2), ctx).masked_fill(~real[:, None, None], self.buckets)
        return self.leave(self.attend(q, v, buckets, real).to(x.dtype), ctx)

    def hashed(self, q: Tensor, ctx: Context) -> Tensor:
        """(B, H, L, D) -> buckets (B, H, R, L), below ``buckets``."""
        if self.buckets == 1:
            return torch.zeros(*q.shape[:2], self.rounds, q.shape[2], dtype=torch.long, device=q.device)
        shape = (q.shape[3], self.rounds * self.buckets // 2)
        if self.training and ctx.seed is not None:
            turn = ctx.noise(shape, q, name="rotations")
        else:
            turn = rotations(*shape, self.seed).to(q)
        # A part at a time, since turned queries are many times the queries.
        step = tokens_at_once(q.shape[0] * q.shape[1] * shape[1])
        return torch.cat([self._turned(some, turn) for some in q.split(step, 2)], 3)

    def _turned(self, q: Tensor, turn: Tensor) -> Tensor:
        """The buckets (B, H, R, L) of queries that are turned by all rounds' rotations side by side."""
        turned = (q @ turn).unflatten(-1, (self.rounds, -1))
        # The largest of [q R; -q R] is the largest size, in the upper half of the buckets where its sign is negative.
        largest = turned.abs().argmax(-1, keepdim=True)
        negative = turned.gather(-1, largest) < 0
        return (largest + negative * (self.buckets // 2))[..., 0].transpose(2, 3)

    def attend(self, q: Tensor, v: Tensor, buckets: Tensor, real: Tensor) -> Tensor:
        """q and v (B, L, H, D), buckets (B, H, R, L), real (B, L) -> (B, L, H, D)."""
        length = q.shape[1]
        size = min(self.chunk, length)
        places = torch.arange(length, device=q.device)
        order = (buckets * length + places).argsort(-1)  # padding, in a bucket of its own, comes last
        rank = torch.empty_like(order).scatter_(-1, order, places.expand_as(order))
        # A chunk of nothing before the list, and what fills its last chunk, repeat token 0; the bias hides them.
        spare = (size, -length % size)
        listed, held = F.pad(order, spare), F.pad(self._held(order, real), spare)
        in_round = (rank // size).int(), buckets.int()
        rows = [t[:, None].contiguous() for t in (q, v)]
        step = self._step(q, size, listed.shape[3] - size)
        made = []
        for start in range(0, listed.shape[3] - size, step):
            part = slice(start, start + step + size)
            bias, count = self._bias(held[..., part], *in_round, size, q.dtype)
            turned, values = (picked(t, listed[..., part]) for t in rows)
            queries = turned[:, :, size:].unflatten(2, (-1, size)).transpose(3, 4)
            made.append(self._mixed(queries, two(F.normalize(turned, dim=-1), size), two(values, size), bias, count))
        out, weighed = (torch.cat(of, 2).flatten(2, 3) for of in zip(*made))
        return torch.cat([self._joined(out, weighed, places) for places in rank.split(step, 3)], 1)

    def _step(self, q: Tensor, size: int, length: int) -> int:
        """How much of the list of ``length`` places is taken at once.

        Of every token keys, values and logits are made, many times what the token brought. A part of the list keeps
        them in the caches; the whole is taken where a gradient wants all of it anyway, or somebody watches.
        """
        if torch.is_grad_enabled() or watched():
            return length
        rows, _, heads, width = q.shape
        return -(-tokens_at_once(rows * self.rounds * heads * (2 * size + 4 * width)) // size) * size

    def _joined(self, out: Tensor, weighed: Tensor, rank: Tensor) -> Tensor:
        """Outputs (B, R, P, H, D) and logarithms of normalisers (B, R, P, H) as they are listed; the rank (B, H, R, L)
        of some tokens -> theirs (B, L, H, D)."""
        found = picked(out, rank)
        if self.rounds == 1:
            return found[:, 0]
        return (found * weighed.gather(2, rank.permute(0, 2, 3, 1)).softmax(1)[..., None]).sum(1)

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries (B, R, N, H, size, D) over keys (B, R, N, H, 2 size, D), chunk by chunk: the output (B, R, N, size,
        H, D), and with several rounds the logarithms of the normalisers (B, R, N, size, H), else none."""
        scale = q.shape[-1] ** -0.5
        if count is None:
            # Logits are many times the tokens and would be read from memory again and again; the kernel keeps none.
            flat = [t.flatten(0, 2) for t in (q, k, v, bias)]
            out = fused_attention(flat[0], flat[1], flat[2], flat[3], False, scale).unflatten(0, q.shape[:3])
            return out.transpose(3, 4), out.new_empty(*q.shape[:3], 0)
        logits = q @ k.transpose(-1, -2) * scale + bias
        most = logits.detach().amax(-1, keepdim=True)
        shares = (logits - most).exp_() / count
        total = shares.sum(-1, keepdim=True)
        out = shares @ v / total
        return out.transpose(3, 4), (total.log() + most)[..., 0].transpose(3, 4)

    def _held(self, order: Tensor, real: Tensor) -> Tensor:
        """Places of the tokens (B, H, R, L) as they are listed, counted from 1, and 0 for padding; places in the list
        (B, 1, 1, L) where nobody asks which token it is."""
        places = torch.arange(order.shape[3], device=order.device)
        # Padding is listed last, so all heads hide it alike.
        listed = places < real.sum(1)[:, None, None, None]
        pairs = self.hides or self.same_bucket or self.rounds > 1
        return torch.where(listed, order + 1 if pairs else places + 1, 0).int()

    def _bias(
        self, held: Tensor, chunks: Tensor, buckets: Tensor, size: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """What is added to the logits, (B, R, N, H or 1, size or 1, 2 size): nothing seen, oneself far down. With
        several rounds also in how many of them each pair is found, (B, R, N, H, size, 2 size).

        held: see ``_held``, (N + 1) size of them; chunks and buckets (B, H, R, L): of each token in each round. Ones
        and zeros are made by arithmetic: it is many times faster than comparing and choosing.
        """
        query, key = sides(held, size)
        hidden, count = 1 - key.clamp(max=1), None
        if self.hides:
            hidden = hidden + (key - query).clamp_(0, 1)
        if self.same_bucket or self.rounds > 1:
            missed = self._missed(held, chunks, buckets, size)
            if self.same_bucket:
                hidden = hidden + torch.stack([missed[r][:, :, r] for r in range(self.rounds)], 2)
            if self.rounds > 1:
                count = (self.rounds - sum(missed[1:], missed[0])).clamp_(min=1).to(dtype).permute(0, 2, 3, 1, 4, 5)
        bias = hidden.to(dtype) * NOTHING
        if not self.see_self:
            bias = bias + F.pad(SELF * torch.eye(size, dtype=dtype, device=held.device), (size, 0))
        return bias.permute(0, 2, 3, 1, 4, 5), count

    def _missed(self, held: Tensor, chunks: Tensor, buckets: Tensor, size: int) -> list[Tensor]:
        """For each round, 0 for the pairs of every round's chunks that it finds as well, 1 for those that it misses."""
        index = (held - 1).clamp(min=0).flatten(2).long()

        def apart(of: Tensor, r: int) -> Tensor:
            query, key = sides(of[:, :, r].gather(2, index).view(held.shape), size)
            return query - key

        missed = []
        for r in range(self.rounds):
            # Chunks apart 0 or 1 are found, which are those whose double lies 1 from 1.
            far = apart(chunks, r).mul_(2).sub_(1).abs_().sub_(1)
            if self.same_bucket:
                far += apart(buckets, r).abs_()
            missed.append(far.clamp_(max=1))
        return missed

    def mixing_macs(self, length: int, past: int) -> int:
        size = max(1, min(self.chunk, length))
        padded = -(-length // size) * size
        hashing = 0 if self.buckets == 1 else length * self.buckets // 2
        return self.heads * self.head_width * self.rounds * (hashing + 4 * padded * size)


def tokens_at_once(numbers: int) -> int:
    """How many tokens a part takes where each of them comes to that many numbers."""
    return max(1, HELD // max(1, numbers))


def picked(rows: Tensor, index: Tensor) -> Tensor:
    """Every head its own rows: rows (B, R or 1, L, H, D), index (B, H, R, P) below L -> (B, R, P, H, D)."""
    batch, rounds, length, heads, width = rows.shape
    first = torch.arange(batch * rounds, device=index.device).view(batch, 1, rounds, 1) * length
    flat = (first + index) * heads + torch.arange(heads, device=index.device)[:, None, None]
    flat = flat.permute(0, 2, 3, 1)
    return rows.reshape(-1, width).index_select(0, flat.flatten()).view(*flat.shape, width)


def two(values: Tensor, size: int) -> Tensor:
    """(B, R, (N + 1) size, H, D) -> (B, R, N, H, 2 size, D): each chunk with the one before it, as a view."""
    return values.unfold(2, 2 * size, size).transpose(-1, -2)


def sides(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(B, H, R, (N + 1) size) -> of the queries (B, H, R, N, size, 1) and of the keys (B, H, R, N, 1, 2 size)."""
    queries = values[..., size:].unflatten(3, (-1, size))
    return queries[..., :, None], values.unfold(3, 2 * size, size)[..., None, :]


@functools.lru_cache(maxsize=64)
def rotations(width: int, count: int, seed: int) -> Tensor:
    """(width, count) normal numbers, the same in every run."""
    return torch.randn(width, count, generator=keyed_generator(seed, "reformer"), dtype=torch.float64)
