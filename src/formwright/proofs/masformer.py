"""The proof of MASFormer: a few layers with full attention give back what attention inside blocks loses.

Zhang et al., 2023 (2310.12442). The paper adapts GPT-Neo with 24 layers to sequences of 8192 tokens. Here decoders with
6 layers learn rows of 256 symbols: the first block holds a fact for every key, and from the third block on each block
asks for all keys, among runs that count up. What is asked was seen a block ago or more, so blocks alone can only guess.
Minutes. ``quick``: what does not need a trained model; seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.engine.state import State
from formwright.measure.timing import alternate
from formwright.models.build import build
from formwright.models.recipes.masformer import masformer
from formwright.parts.base import Shape
from formwright.parts.context import Context
from formwright.parts.make import make_part
from formwright.proofs._bytes import one_thread
from formwright.proofs.base import Claim
from formwright.registry import Paper, register

LAYERS, BLOCK, LENGTH = 6, 16, 256
#: Symbols: those that count up, facts (one for every key and value), questions, answers.
RUN, KEYS, VALUES = 16, 4, 8
VOCAB = RUN + KEYS * VALUES + KEYS + VALUES
#: Nats an answer, of log(VALUES) = 2.08. With a smaller gap full attention has not learnt to answer either, and shares
#: of the gap say nothing.
LEAST = 1.5
#: Training: short rows first, in which questions are near, then whole ones.
SHORT, SHORT_STEPS, STEPS, BATCH, RATE = 96, 750, 900, 12, 4e-3
PLACES: dict[str, int | list[int]] = {
    "none": 0,
    "all": LAYERS,
    "bottom": 2,
    "top": [4, 5],
    "spread": [0, 3],
}


@register("proof", "masformer", paper=Paper("Zhang et al.", 2023, "2310.12442"), summary="full attention in few layers")
def prove(quick: bool, seed: int) -> list[Claim]:
    """What any implementation must satisfy, then times, then losses."""
    with one_thread():
        claims = [preserved(seed), borders(seed), stream(seed), products(), prefill(quick)]
        return claims if quick else [*claims, *gap(seed)]


def model(full: int | list[int], seed: int) -> Any:
    sizes: dict[str, Any] = {"vocab": VOCAB, "width": 32, "layers": LAYERS, "heads": 2, "positions": None}
    return build(masformer(full=full, block=BLOCK, **sizes), seed=seed)


def rows(count: int, length: int, generator: torch.Generator) -> Tensor:
    """(count, length) symbols; a question is an even place's, and its answer stands behind it."""
    steps, blocks = torch.arange(length), torch.arange(2, length // BLOCK)
    jumps = torch.rand(count, length, generator=generator) < 0.15
    last = torch.where(jumps, steps, 0).cummax(1).values
    x = (torch.randint(0, RUN, (count, length), generator=generator).gather(1, last) + steps - last) % RUN
    values = torch.randint(0, VALUES, (count, KEYS), generator=generator)
    places = torch.rand(count, BLOCK, generator=generator).argsort(1)[:, :KEYS]
    x.scatter_(1, places, RUN + torch.arange(KEYS) * VALUES + values)
    asked = torch.rand(count, len(blocks), KEYS, generator=generator).argsort(2).flatten(1)
    pairs = torch.rand(count, len(blocks), BLOCK // 2, generator=generator).argsort(2)[..., :KEYS]
    at = (blocks[:, None] * BLOCK + 2 * pairs).flatten(1)
    x.scatter_(1, at, RUN + KEYS * VALUES + asked)
    return x.scatter_(1, at + 1, RUN + KEYS * VALUES + KEYS + values.gather(1, asked))


def preserved(seed: int) -> Claim:
    """The weights of a full decoder under other spans."""
    full, generator = model(LAYERS, seed), torch.Generator().manual_seed(seed)
    ids = rows(2, 8 * BLOCK, generator)
    apart = 0.0
    with torch.no_grad():
        for places in PLACES.values():
            mixed = model(places, seed + 1)
            mixed.load_state_dict(full.state_dict())
            seen = ids if places == LAYERS else ids[:, :BLOCK]
            apart = max(apart, float((mixed(seen) - full(seen)).abs().max()))
    return Claim(
        "a full decoder's weights give the same function up to one block, and at any length with all layers full",
        "—",
        "within 1e-5",
        f"{apart:.1e}",
        apart <= 1e-5,
    )


def borders(seed: int) -> Claim:
    """Which outputs a changed token of the first block moves."""
    ids = rows(1, 6 * BLOCK, torch.Generator().manual_seed(seed))
    changed = ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % RUN
    moved = []
    with torch.no_grad():
        for full in (0, [3]):
            made = model(full, seed)
            moved.append(bool(((made(ids) - made(changed))[0, BLOCK:] != 0).any()))
    return Claim(
        "blocks alone carry nothing across their borders, and one full layer does",
        "—",
        "moved: no, yes",
        f"moved: {', '.join('yes' if m else 'no' for m in moved)}",
        moved == [False, True],
    )


def stream(seed: int) -> Claim:
    """One token a call over several borders, and what is kept."""
    made, length = model(2, seed), 4 * BLOCK + 3
    ids = rows(2, 5 * BLOCK, torch.Generator().manual_seed(seed))[:, :length]
    state = State(2)
    with torch.no_grad():
        whole = made(ids)
        steps = torch.cat([made(ids[:, step : step + 1], state=state) for step in range(length)], 1)
    apart = float((steps - whole).abs().max())
    wanted = 2 * 2 * 32 * 4 * (2 * length + (LAYERS - 2) * BLOCK)
    return Claim(
        "a stream equals one pass across borders of blocks, and block layers keep one block",
        "—",
        f"within 1e-4, {wanted} bytes",
        f"{apart:.1e}, {state.bytes()} bytes",
        apart <= 1e-4 and state.bytes() == wanted,
    )


def mixing(made: Any, length: int) -> int:
    """Multiply-accumulates of the products of queries, keys and values."""
    parts = [part for name, part in made.parts() if name.endswith("attention")]
    shape = Shape.full(1, length)
    held = sum(slot.cost(shape).macs for part in parts for slot in (part.q, part.k, part.v, part.o))
    return sum(part.cost(shape).macs for part in parts) - held


def products() -> Claim:
    """Of the models that are trained here, stated as the conformance suite counts it."""
    share = mixing(model(2, 0), LENGTH) / mixing(model(LAYERS, 0), LENGTH)
    formula = 2 / LAYERS + (1 - 2 / LAYERS) * BLOCK / LENGTH
    return Claim(
        "attention's products fall to l/L + (1 - l/L) b/n",
        "up to 75 % fewer",
        f"{formula:.3f}, at most 0.45",
        f"{share:.3f}",
        abs(share - formula) < 1e-6 and share <= 0.45,
    )


def prefill(quick: bool) -> Claim:
    """Attention layers alone, 1 of 6 full, 4096 tokens, blocks of 512."""
    heads: dict[str, Any] = {"heads": 4, "causal": True}
    full = make_part({"part": "attention", **heads}, 256)
    near = make_part({"part": "local", "block": 512, **heads}, 256)
    x = torch.randn(1, 4096, 256, generator=torch.Generator().manual_seed(0))
    ctx = Context()
    with torch.no_grad():
        for part in (full, near):
            for parameter in part.parameters():
                parameter.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(0))
        times = alternate({"full": lambda: full(x, ctx), "near": lambda: near(x, ctx)}, rounds=3 if quick else 9)
    share = (times["full"].median + 5 * times["near"].median) / (6 * times["full"].median)
    return Claim(
        "prefill of attention layers is faster: 1 of 6 full, 4096 tokens, blocks of 512",
        "—",
        "at most 0.5 of the time",
        f"{share:.2f}",
        share <= 0.5,
        needs="time",
    )


def trained(full: int | list[int], seed: int) -> Any:
    """AdamW with warm-up and linear decay; the same rows for every placement of a seed."""
    made, generator = model(full, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(made.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 40) * (1 - 0.9 * step / STEPS)
        optimizer.zero_grad()
        loss(made, rows(BATCH, SHORT if step < SHORT_STEPS else LENGTH, generator)).backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
    return made.eval()


def loss(made: Any, drawn: Tensor) -> Tensor:
    """Mean nats an answer."""
    wanted = drawn[:, 1:]
    answers = wanted >= VOCAB - VALUES
    return F.cross_entropy(made(drawn[:, :-1])[answers], wanted[answers])


def gap(seed: int) -> list[Claim]:
    """Losses of answers in rows that were not trained on, by placement of the full layers."""
    held = rows(64, LENGTH, torch.Generator().manual_seed(seed + 1000))
    losses = {}
    for name, full in PLACES.items():
        made = trained(full, seed)
        with torch.no_grad():
            losses[name] = float(loss(made, held))
    whole = losses["none"] - losses["all"]
    closed = {name: (losses["none"] - losses[name]) / whole for name in ("bottom", "top", "spread")}
    return [
        Claim(
            "trained, 2 of 6 full layers at the bottom close the gap between blocks alone and full attention",
            "competitive with full attention",
            f">= 70 % of a gap of at least {LEAST} nats an answer",
            f"{closed['bottom']:.0%} of {whole:.3f} nats ({losses['none']:.3f} to {losses['all']:.3f})",
            whole >= LEAST and closed["bottom"] >= 0.7,
        ),
        Claim(
            "trained, the bottom is the best place of the full layers",
            "bottom is best",
            "bottom closes most",
            ", ".join(f"{name} {share:.0%}" for name, share in closed.items()),
            whole >= LEAST and closed["bottom"] == max(closed.values()),
        ),
    ]
