"""The proof of Combiner: exact conditional probabilities over all of the past, and better than what it is built on.

Ren et al., 2021 (2107.05768). The paper trains 12 layers of width 768 on Wiki-40B; here decoders with one layer learn
the rows of :mod:`.masformer`, in which what is asked was said blocks ago, all from the same rows: full attention, the
sparse patterns alone, and Combiner over the same blocks. On bytes of source code, 300 steps, it was not so: 1.809 nats
a byte (fixed) against 1.769 of its sparse base, and full attention, at 1.869, had learned less than both; and where
short rows come before whole ones, Combiner had learned none of the answers after 600 steps. Minutes. ``quick``: what
does not need a trained model; seconds.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.engine.state import State
from formwright.measure.timing import alternate
from formwright.models.build import build
from formwright.ops.attention import attention
from formwright.ops.combiner import NAMES, combiner, combiner_macs, combiner_reference
from formwright.proofs import masformer
from formwright.proofs._bytes import descend, one_thread
from formwright.proofs.base import Claim
from formwright.registry import Paper, register

WIDTH, HEADS, BLOCK, LENGTH = 64, 4, 16, 256
STEPS, BATCH, RATE, WARM, HELD = 700, 12, 4e-3, 40, 64
#: A plan, and the sparse attention with the same blocks (Child et al.): own block and the ends of those before it,
#: or the tokens just before and those in the own column.
BASES: dict[str, dict[str, Any]] = {
    "fixed": {"part": "sparse", "pattern": "fixed", "stride": BLOCK},
    "axial-rowmajor": {"part": "sparse", "pattern": "strided", "stride": BLOCK},
}
FULL: dict[str, Any] = {"part": "attention", "causal": True}
#: Perplexities on Wiki-40B at 2048 tokens: of the sparse base, and of Combiner over it; full attention has 17.26.
PUBLISHED = {"fixed": (18.04, 17.70), "axial-rowmajor": (20.82, 17.56)}


@register("proof", "combiner", paper=Paper("Ren et al.", 2021, "2107.05768"), summary="full support at a sparse cost")
def prove(quick: bool, seed: int) -> list[Claim]:
    """What any implementation must satisfy, then times, then losses."""
    with one_thread():
        claims = [*matrices(seed), plain(seed), rank(seed), causal(seed), stream(seed), products(), times(quick)]
        return claims if quick else [*claims, *trained(seed)]


def draw(length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of two heads in double precision."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, length, 2, 4, generator=generator, dtype=torch.float64)
    return q, k, v


def matrix(q: Tensor, k: Tensor, **how: Any) -> Tensor:
    """(heads, L, L): values that are unit vectors come out as the rows of what the fast form multiplies with."""
    units = torch.eye(q.shape[1], dtype=q.dtype)[None, :, None].expand(-1, -1, q.shape[2], -1)
    return combiner(q, k, units, **how)[0].transpose(0, 1)


def matrices(seed: int) -> list[Claim]:
    """All plans, causal and not, at lengths that fill no grid: probabilities, support, and the written-out matrix."""
    sums, apart, covered = 0.0, 0.0, True
    for plan, one_way, length in product(NAMES, (True, False), (13, 22)):
        for block in (None,) if plan == "logsparse" else (None, 4):
            q, k, v = draw(length, seed)
            how: dict[str, Any] = {"plan": plan, "causal": one_way, "block": block}
            found = matrix(q, k, **how)
            seen = torch.ones(length, length, dtype=torch.bool)
            seen = seen.tril() if one_way else seen
            sums = max(sums, float((found.sum(-1) - 1).abs().max()))
            covered &= bool((found[:, seen] > 0).all()) and not bool(found[:, ~seen].any())
            apart = max(apart, float((found - combiner_reference(q, k, v, **how)[1][0]).abs().max()))
    count = f"{len(NAMES)} plans, both directions"
    return [
        Claim(
            f"every row is a probability over the whole support and nothing else: {count}",
            "full attention capability, exact conditional probabilities",
            "sums within 1e-12 of 1, every pair of the support above 0, all others 0",
            f"{sums:.1e}, {'all covered' if covered else 'not covered'}",
            sums <= 1e-12 and covered,
        ),
        Claim(
            f"the fast forms multiply with the factorised matrix, written out region by region: {count}",
            "p(j|i) = p(region|i) p(j|region)",
            "within 1e-12",
            f"{apart:.1e}",
            apart <= 1e-12,
        ),
    ]


def plain(seed: int) -> Claim:
    """Where no region has two members."""
    q, k, v = draw(14, seed)
    apart = 0.0
    for plan, one_way in product(NAMES, (True, False)):
        wanted = attention(q, k, v, causal=one_way)
        for block in {"logsparse": (), "fixed": (1, 14)}.get(plan, (14,)):
            made = combiner(q, k, v, plan=plan, causal=one_way, block=block)
            apart = max(apart, float((made - wanted).abs().max()))
    return Claim(
        "one block, and blocks of one token, are softmax attention", "—", "within 1e-12", f"{apart:.1e}", apart <= 1e-12
    )


def rank(seed: int) -> Claim:
    """Of the matrix of ``fixed``: what a later block sees of an earlier one."""
    q, k, _ = draw(12, seed)
    found = matrix(q, k, plan="fixed", block=4, causal=True)[0]
    ranks = int(torch.linalg.matrix_rank(found[8:, :4])), int(torch.linalg.matrix_rank(found[8:, 8:]))
    return Claim(
        "an earlier block is seen by a matrix of rank 1, the own block by one of full rank",
        "full rank direct, low rank through regions",
        "1 and 4",
        f"{ranks[0]} and {ranks[1]}",
        ranks == (1, 4),
    )


def causal(seed: int) -> Claim:
    """Outputs before a changed token, bit by bit."""
    length, at, moved = 23, 15, 0
    for plan in NAMES:
        for block in (None,) if plan == "logsparse" else (None, 4):
            tokens = draw(length, seed)
            changed = [t.index_fill(1, torch.tensor([at]), 5.0) for t in tokens]
            before, after = (combiner(*t, plan=plan, causal=True, block=block)[:, :at] for t in (tokens, changed))
            moved += int((before != after).any())
    return Claim("a later token moves no earlier output", "—", "none of all plans", f"{moved}", moved == 0)


def model(mixer: dict[str, Any], seed: int, layers: int = 1) -> Any:
    """A pre-norm decoder; the head is tied to the table."""
    mix = {"heads": HEADS, "rotary": {}, **mixer}
    return build(
        {
            "stem": {"part": "token-embedding", "vocab": masformer.VOCAB, "width": WIDTH},
            "defaults": {"norm": "layernorm", "order": "pre"},
            "layers": [{"repeat": layers, "layers": [mix, {"part": "mlp", "hidden": 4 * WIDTH}]}],
            "final_norm": "layernorm",
            "head": {"part": "lm", "tied": True},
        },
        seed=seed,
    )


def over(plan: str) -> dict[str, Any]:
    return {"part": "combiner", "plan": plan, "block": BLOCK, "causal": True}


@torch.no_grad()
def stream(seed: int) -> Claim:
    """Calls of one and of many tokens, and what is kept."""
    layers, length = 2, 4 * BLOCK + 3
    made = model(over("fixed"), seed, layers)
    ids = torch.randint(0, masformer.VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))
    whole, apart, state = made(ids), 0.0, State(2)
    for sizes in ([1] * length, [20, 1, 37, length - 58]):
        state = State(2)
        pieces = torch.cat([made(piece, state=state) for piece in ids.split(sizes, 1)], 1)
        apart = max(apart, float((pieces - whole).abs().max()))
    wanted = 2 * layers * WIDTH * 4 * (3 * BLOCK + 2 * (length // BLOCK))
    return Claim(
        "Combiner-Fixed as a stream equals one pass, and keeps a block and a key and a value for each before it",
        "—",
        f"within 1e-4, {wanted} bytes",
        f"{apart:.1e}, {state.bytes()} bytes",
        apart <= 1e-4 and state.bytes() == wanted,
    )


def products() -> Claim:
    """Four times the length, as the conformance suite counts it: 8 times as much is n sqrt n."""
    short, long = 4096, 16384
    found = {plan: _macs(plan, long) / _macs(plan, short) for plan in NAMES}
    bars = {plan: 4 * math.log2(long) / math.log2(short) if plan == "logsparse" else 8.0 for plan in NAMES}
    return Claim(
        "products grow as n sqrt n, and as n log n for logsparse, from 4,096 tokens to 16,384",
        "O(L sqrt L), O(L log L)",
        "at most 5 % above 8x, and above 4.67x for logsparse",
        ", ".join(f"{plan} {ratio:.2f}x" for plan, ratio in found.items()),
        all(found[plan] <= 1.05 * bars[plan] for plan in NAMES),
    )


def _macs(plan: str, length: int) -> int:
    return combiner_macs(plan, length, None if plan == "logsparse" else math.isqrt(length), True)


def times(quick: bool) -> Claim:
    """One text of 1,024 and of 8,192 tokens, blocks of the root."""
    ratio = _seconds(8192, quick) / _seconds(1024, quick)
    return Claim(
        "Combiner-Fixed stays fast: 8,192 tokens against 1,024",
        "O(L sqrt L): 22.6x; full attention 64x",
        "at most 30x the time",
        f"{ratio:.1f}x",
        ratio <= 30,
        needs="time",
    )


@torch.no_grad()
def _seconds(length: int, quick: bool) -> float:
    q, k, v = torch.randn(3, 1, length, HEADS, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    how: dict[str, Any] = {"plan": "fixed", "block": math.isqrt(length), "causal": True}
    return alternate({"ours": lambda: combiner(q, k, v, **how)}, rounds=3 if quick else 9)["ours"].median


def losses(made: Any, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Mean nats a symbol, and those an answer."""
    wanted = drawn[:, 1:]
    nats = F.cross_entropy(made(drawn[:, :-1]).transpose(1, 2), wanted, reduction="none")
    return nats.mean(), nats[wanted >= masformer.VOCAB - masformer.VALUES].mean()


def taught(mixer: dict[str, Any], seed: int) -> tuple[float, float]:
    """:func:`losses` of rows that were not trained on; the same rows for every mixer of a seed."""
    made, generator = model(mixer, seed), torch.Generator().manual_seed(seed)
    descend(made, lambda _: losses(made, masformer.rows(BATCH, LENGTH, generator))[0], STEPS, RATE, WARM)
    held = masformer.rows(HELD, LENGTH, torch.Generator().manual_seed(seed + 1000))
    with torch.no_grad():
        every, answers = losses(made, held)
    return float(every), float(answers)


def trained(seed: int) -> list[Claim]:
    """Losses of all symbols, as in the paper, with those of answers beside them."""
    (full, best), claims = taught(FULL, seed), []
    for plan, base in BASES.items():
        (sparse, missed), (ours, answers) = taught(base, seed), taught(over(plan), seed)
        told = PUBLISHED[plan]
        claims += [
            Claim(
                f"trained, one layer of Combiner ({plan}) beats its sparse base ({base['pattern']})",
                f"perplexity {told[1]} to {told[0]}",
                "a lower loss",
                f"{ours:.3f} to {sparse:.3f} nats a symbol (answers {answers:.3f} to {missed:.3f})",
                ours < sparse,
            ),
            Claim(
                f"trained, one layer of Combiner ({plan}) comes within 3 % of full attention",
                f"perplexity {told[1]} to 17.26",
                "a loss at most 3 % above",
                f"{ours / full - 1:+.1%}, {ours:.3f} to {full:.3f} nats a symbol (answers {answers:.3f} to {best:.3f})",
                ours <= 1.03 * full,
            ),
        ]
    return claims
