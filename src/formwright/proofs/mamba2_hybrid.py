"""The proof of Mamba-2 and its hybrids: one recurrence in all forms, exact sizes and patterns, and why attention helps.

Dao and Gu, 2024 (2405.21060); Waleffe et al., 2024 (2406.07887). The papers train models of up to 8 billion parameters;
here the sizes are counted, the caches measured, and recall is trained at three layers. ``quick``: what needs no trained
model; seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.engine.state import State
from formwright.models.build import build
from formwright.models.recipes import recipe
from formwright.models.recipes._pattern import allocated
from formwright.ops.ssd import ssd, ssd_quadratic, ssd_reference
from formwright.proofs._bytes import one_thread
from formwright.proofs._recall import Lesson, accuracy, train
from formwright.proofs.base import Claim
from formwright.registry import Paper, register

PUBLISHED = {
    "mamba2-130m": 128_989_632,
    "mamba2-370m": 368_346_624,
    "mamba2-780m": 780_161_280,
    "mamba2-1.3b": 1_343_757_312,
    "mamba2-2.7b": 2_702_599_680,
    "mamba2-hybrid-8b": 8_654_517_248,
    "mamba2-8b": 8_236_999_680,
    "mamba-8b": 8_148_783_104,
    "transformer-8b": 8_540_135_424,
}
PATTERNS = {
    56: "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-",
    48: "M-M-M--M-*M-M-M-M--*M-M-M-M-*M--M-M-M-*M-M--M-M-",
}


@register("proof", "mamba2-hybrid", paper=Paper("Waleffe et al.", 2024, "2406.07887"), summary="attention for recall")
def prove(quick: bool, seed: int) -> list[Claim]:
    """What any implementation must satisfy, and then what a little attention adds."""
    with one_thread():
        claims = [*one_recurrence(seed), streamed(seed), counted(), spelled(), caches()]
        return claims if quick else [*claims, recall(seed)]


def one_recurrence(seed: int) -> list[Claim]:
    """Chunks and masked attention against the recurrence: values and gradients, behind a state, documents ending."""
    claims = []
    for dtype, bar in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        apart = max(_apart(chunk, groups, dtype, seed) for chunk, groups in ((16, 1), (64, 4), (256, 1)))
        name = str(dtype).removeprefix("torch.")
        claims.append(
            Claim(
                f"chunks, masked attention and recurrence are one in {name}, gradients too",
                "the same",
                f"within {bar:g} of the largest value",
                f"{apart:.1e}",
                apart <= bar,
            )
        )
    return claims


def _apart(chunk: int, groups: int, dtype: torch.dtype, seed: int) -> float:
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    rows, length, heads, width, size = 1, 150, 4, 8, 8
    shared = (rows, length, groups, size)
    tensors = [draw(rows, length, heads, width), F.softplus(draw(rows, length, heads) - 2), -draw(heads).exp()]
    tensors += [draw(*shared), draw(*shared), draw(heads), draw(rows, heads, width, size)]
    resets = torch.rand(rows, length, generator=gen) < 0.02
    weights = draw(rows, length, heads, width), draw(rows, heads, width, size)

    def run(form: Callable[..., Any], kind: torch.dtype, **how: Any) -> list[Tensor]:
        given = [t.to(kind).requires_grad_() for t in tensors]
        y, final = form(*given[:6], start=given[6], resets=resets, **how)
        grads = torch.autograd.grad([y, final], given, [weight.to(kind) for weight in weights])
        return [y.detach(), final.detach(), *grads]

    wanted = run(ssd_reference, torch.float64)
    found = [run(ssd, dtype, chunk=chunk)]
    if dtype == torch.float64 and chunk == 64:
        found.append(run(ssd_quadratic, dtype))
    return max(float((a.double() - b).abs().max() / b.abs().max()) for form in found for a, b in zip(form, wanted))


def small(pattern: str, seed: int | None, **sizes: Any) -> Any:
    """A hybrid of any pattern at width 32."""
    told = {"vocab": 50, "width": 32, "heads": 4, "kv_heads": 2, "attention_width": 8, "state": 8, "head_width": 16}
    return build(recipe("mamba2-hybrid-8b", pattern=pattern, **{**told, "groups": 2, **sizes}), seed=seed)


@torch.no_grad()
def streamed(seed: int) -> Claim:
    model = small("M-*M", seed).double()
    ids = torch.randint(0, 50, (2, 37), generator=torch.Generator().manual_seed(seed))
    whole, apart = model(ids), 0.0
    for sizes in ([1] * 37, [20, 1, 16], [3, 34]):
        state = State(2)
        pieces = torch.cat([model(piece, state=state) for piece in ids.split(sizes, 1)], 1)
        apart = max(apart, float((pieces - whole).abs().max()))
    return Claim(
        "a hybrid token by token, or cut anywhere, is one pass", "the same", "within 1e-10", f"{apart:.1e}",
        apart <= 1e-10,
    )  # fmt: skip


def counted() -> Claim:
    found = {name: sum(p.numel() for p in build(recipe(name), device="meta").parameters()) for name in PUBLISHED}
    return Claim(
        "the nine models have the published numbers of parameters",
        ", ".join(f"{count:,}" for count in PUBLISHED.values()),
        "equal",
        ", ".join(f"{count:,}" for count in found.values()),
        found == PUBLISHED,
    )


def spelled() -> Claim:
    found = {layers: allocated(layers, 0.08, 0.5) for layers in PATTERNS}
    shares = [round(100 * found[56].count(letter) / 56) for letter in "M*-"]
    return Claim(
        "shares of 8 % attention and 50 % MLPs give the published patterns",
        "43 / 7 / 50 % of 56 layers, letter by letter",
        "both patterns equal",
        f"{'equal' if found == PATTERNS else 'not equal'}; {' / '.join(map(str, shares))} %",
        found == PATTERNS and shares == [43, 7, 50],
    )


@torch.no_grad()
def caches() -> Claim:
    """Bytes that a token adds to the state of a stack with the published layers at width 32, against the Transformer's
    32 layers of full attention."""
    sizes = {"heads": 32, "attention_width": 2, "state": 4, "groups": 2}
    hybrid = small(PATTERNS[56], 0, **sizes, kv_heads=8)
    full = small("*-" * 32, 0, **sizes, kv_heads=32)
    grown = [_grown(model) for model in (hybrid, full)]
    ratio = grown[1] / grown[0]
    return Claim(
        "a token adds 32 times less to the hybrid's cache than to the Transformer's",
        "32x",
        "exactly 32, in bytes held",
        f"{grown[1]:,} / {grown[0]:,} bytes a token: {ratio:g}x",
        ratio == 32,
    )


def _grown(model: Any) -> int:
    state, held = State(1), []
    for _ in range(2):
        model(torch.ones(1, 8, dtype=torch.long), state=state)
        held.append(state.bytes())
    return (held[1] - held[0]) // 8


@dataclass(frozen=True)
class Pairs:
    """``pairs`` of a key and a value, and then all keys in another order: each asks for its value."""

    pairs: int
    keys: int = 96

    def batch(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        def drawn(among: int) -> Tensor:
            return torch.rand(rows, among, generator=generator).argsort(1)[:, : self.pairs]

        keys, values, order = drawn(self.keys), self.keys + drawn(self.keys), drawn(self.pairs)
        shown = torch.stack((keys, values), 2).flatten(1)
        targets = torch.cat((torch.full_like(shown, -1), values.gather(1, order)), 1)
        return torch.cat((shown, keys.gather(1, order)), 1), targets


def recall(seed: int) -> Claim:
    """Associative recall: a state of a few numbers a channel cannot hold what one layer of attention looks up."""
    task = Pairs(64)
    lessons = [Lesson(Pairs(8), 200, 32), Lesson(Pairs(16), 150, 16), Lesson(task, 150, 8)]
    sizes = {"vocab": 2 * task.keys, "width": 64, "attention_width": 16, "state": 4, "groups": 1}
    found, count = {}, {}
    for name, pattern in (("hybrid", "M*M"), ("pure", "MMM")):
        model = train(small(pattern, seed, **sizes, kv_heads=4), lessons, seed, lr=3e-3)
        found[name] = accuracy(model, task, seed)
        count[name] = sum(p.numel() for p in model.parameters())
    return Claim(
        f"trained, one layer of attention in three recalls {task.pairs} pairs; a pure stack with a state of 4 does not",
        "pure stacks lag where answers are looked up; the hybrid does not",
        "hybrid >= 95 %, pure, no smaller, at least 20 points lower",
        ", ".join(f"{name} {share:.1%} ({count[name]:,} parameters)" for name, share in found.items())
        + f" after {sum(lesson.steps for lesson in lessons)} steps",
        found["hybrid"] >= 0.95 and found["pure"] <= found["hybrid"] - 0.2 and count["pure"] >= count["hybrid"],
    )
