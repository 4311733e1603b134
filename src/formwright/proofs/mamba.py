"""The proof of Mamba: all forms of the scan are one, the published sizes are exact, and selection is what it needs.

Gu and Dao, 2023 (2312.00752). The paper trains selective copying over 4,096 tokens for 400,000 steps, and induction
heads at 256 tokens for 200,000; here both are small enough for minutes, in lessons of growing length. ``quick``: what
needs no trained model; seconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from formwright.engine.state import State
from formwright.models.build import build
from formwright.models.recipes import recipe
from formwright.ops.selective_scan import selective_scan, selective_scan_reference
from formwright.proofs._bytes import one_thread
from formwright.proofs._recall import Lesson, accuracy, train
from formwright.proofs.base import Claim
from formwright.registry import Paper, register

PUBLISHED = {
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
}
#: Induction: trained on texts of up to so many tokens, tested at these.
TRAINED, TESTED = 128, (128, 1024, 8192)


@register("proof", "mamba", paper=Paper("Gu and Dao", 2023, "2312.00752"), summary="selection by the token")
def prove(quick: bool, seed: int) -> list[Claim]:
    """The claims that any implementation must satisfy, and then those of the paper about what training finds."""
    with one_thread():
        claims = [*one_scan(seed), counts(), published(seed)]
        return claims if quick else [*claims, copying(seed), induction(seed)]


def one_scan(seed: int) -> list[Claim]:
    """Every form against the definition, at lengths of one token, of no multiple of a chunk, and behind a state."""
    claims = []
    for dtype, bar in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        apart = max(_apart(length, dtype, seed) for length in (1, 7, 150))
        word = str(dtype).removeprefix("torch.")
        claims.append(
            Claim(f"the scan is its definition in {word}", "the same", f"within {bar:g}", f"{apart:.1e}", apart <= bar)
        )
    apart = _cut(seed)
    claims.append(
        Claim(
            "token by token, or cut anywhere, is one pass", "the same", "within 1e-10", f"{apart:.1e}", apart <= 1e-10
        )
    )
    return claims


def _apart(length: int, dtype: torch.dtype, seed: int) -> float:
    """Largest difference from the definition in double precision, over the largest value: outputs, state, gradients."""
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    rows, inner, state = 2, 6, 16
    wide, narrow = (rows, length, inner), (rows, length, state)
    x, delta, z, B, C = draw(*wide), draw(*wide) - 2, draw(*wide), draw(*narrow), draw(*narrow)
    A, D, initial = -torch.exp(draw(inner, state)), draw(inner), draw(rows, inner, state)
    weights = draw(*wide), draw(rows, inner, state)

    def run(form: Callable[..., Any], given: torch.dtype) -> list[Tensor]:
        tensors = [t.to(given).requires_grad_() for t in (x, delta, A, B, C, D, z, initial)]
        y, h = form(*tensors)
        grads = torch.autograd.grad([y, h], tensors, [weight.to(given) for weight in weights])
        return [y.detach(), h.detach(), *grads]

    def definition(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        x, delta, A, B, C, D, z, initial = tensors
        return selective_scan_reference(x, delta, A, B, C, D, z, initial, torch.full((rows,), length), True)

    wanted = run(definition, torch.float64)
    found = run(lambda *ts: selective_scan(*ts[:6], z=ts[6], initial=ts[7]), dtype)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted))


@torch.no_grad()
def _cut(seed: int) -> float:
    model = small(seed).double()
    ids = torch.randint(0, 50, (2, 37), generator=torch.Generator().manual_seed(seed))
    whole, apart = model(ids), 0.0
    for sizes in ([1] * 37, [20, 1, 16], [3, 34]):
        state = State(2)
        pieces = torch.cat([model(piece, state=state) for piece in ids.split(sizes, 1)], 1)
        apart = max(apart, float((pieces - whole).abs().max()))
    return apart


def small(seed: int, vocab: int = 50, width: int = 32, **mixer: Any) -> Any:
    """Two layers of Mamba."""
    spec = recipe("mamba-130m", vocab=vocab, width=width, layers=2)
    spec["layers"][0]["layers"][0].update(mixer)
    return build(spec, seed=seed)


def counts() -> Claim:
    found = {name: sum(p.numel() for p in build(recipe(name), device="meta").parameters()) for name in PUBLISHED}
    return Claim(
        "the five sizes have the published numbers of parameters",
        ", ".join(f"{count:,}" for count in PUBLISHED.values()),
        "equal",
        ", ".join(f"{count:,}" for count in found.values()),
        found == PUBLISHED,
    )


@torch.no_grad()
def published(seed: int) -> Claim:
    """The same tensors in the independent implementation of the transformers package."""
    from formwright.hub.huggingface import write

    claim, bar = "transformers' Mamba says the same with the same tensors", "logits within 1e-4"
    try:
        from transformers import MambaForCausalLM
    except ImportError:
        return Claim(claim, "the same", bar, "not tried: transformers is not installed", False)
    model = small(seed)
    model.stem.tokens.weight.mul_(50.0)  # logits of the size of 1, not of the start
    ids = torch.randint(0, 50, (2, 41), generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as directory:
        write(model, f"{directory}/model")
        other = MambaForCausalLM.from_pretrained(f"{directory}/model").eval()
    apart = float((model(ids) - other(ids).logits).abs().max())
    return Claim(claim, "the same", bar, f"{apart:.1e}", apart <= 1e-4)


@dataclass(frozen=True)
class Copying:
    """``data`` values at random places of ``length`` tokens of noise (0); then a cue (1) for each, in their order."""

    length: int
    data: int = 8
    vocab: int = 16

    def batch(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        places = torch.rand(rows, self.length, generator=generator).argsort(1)[:, : self.data].sort(1).values
        values = torch.randint(2, self.vocab, (rows, self.data), generator=generator)
        seen = torch.zeros(rows, self.length, dtype=torch.long).scatter(1, places, values)
        return torch.cat((seen, torch.ones_like(values)), 1), torch.cat((torch.full_like(seen, -1), values), 1)


def copying(seed: int) -> Claim:
    """What a fixed kernel cannot pick out."""
    task, found = Copying(256), {}
    chosen: dict[str, list[str] | None] = {"selective": None, "constant": []}
    lessons = [Lesson(Copying(32), 400, 64), Lesson(Copying(96), 300, 32), Lesson(task, 600, 16)]
    for name, selective in chosen.items():
        model = train(small(seed, task.vocab, 64, selective=selective), lessons, seed, lr=5e-3)
        found[name] = accuracy(model, task, seed)
    return Claim(
        "trained on selective copying, the selective model copies and the one with constants does not",
        "99.8 % against 56.4 % (4,096 tokens, 16 of them data, 400,000 steps)",
        ">= 97 % against <= 60 %",
        f"{found['selective']:.1%} against {found['constant']:.1%} ({task.length} tokens, {task.data} of them data)",
        found["selective"] >= 0.97 and found["constant"] <= 0.60,
    )


@dataclass(frozen=True)
class Induction:
    """The special token, 0, stands once, followed by any other; at the end it comes again, and asks for that one."""

    length: int
    vocab: int = 16

    def batch(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(1, self.vocab, (rows, self.length), generator=generator)
        places = torch.randint(0, self.length - 2, (rows, 1), generator=generator)
        follower = tokens.gather(1, places + 1)
        tokens = tokens.scatter(1, places, 0)
        tokens[:, -1] = 0
        targets = torch.full_like(tokens, -1)
        targets[:, -1:] = follower
        return tokens, targets


def induction(seed: int) -> Claim:
    """Long after the answers are right, steps of full size make the state hold on longer: Adam takes them where its
    ``eps`` is below what is left of the gradient."""
    lessons = [Lesson(Induction(16), 200, 64), Lesson(Induction(48), 100, 32), Lesson(Induction(TRAINED), 2500, 8)]
    model = train(small(seed, Induction.vocab, 64), lessons, seed, lr=1e-2, eps=1e-15)
    found = {}
    for length in TESTED:
        right = [accuracy(model, Induction(length), seed + batch, rows=16) for batch in range(8)]
        found[length] = sum(right) / len(right)
    return Claim(
        f"trained on induction at {TRAINED} tokens, it finds what followed the special one at {TESTED[-1]:,}",
        "perfect at 2^20, trained at 256",
        ">= 99 % at every length",
        ", ".join(f"{value:.1%} at {length:,}" for length, value in found.items()),
        min(found.values()) >= 0.99,
    )
