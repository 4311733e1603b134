"""The proof of Mamba: all forms of the scan are one, the published sizes are exact, and selection is what it needs.

Gu and Dao, 2023 (2312.00752). The paper trains selective copying over 4,096 tokens for 400,000 steps, and induction
heads at 256 tokens; here both are small enough for minutes. ``quick``: what needs no trained model; seconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.engine.state import State
from formwright.models.build import build
from formwright.models.recipes import recipe
from formwright.ops.selective_scan import selective_scan, selective_scan_reference
from formwright.proofs._bytes import one_thread
from formwright.proofs.base import Claim
from formwright.registry import Paper, register

PUBLISHED = {
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
}
#: Selective copying: tokens of noise and data, how many of them are data, and ids (noise, the cue and six values).
LENGTH, DATA, VOCAB = 64, 4, 8
#: Induction: trained at the first length, tested at the others; ids, of which the first is the special one.
TRAINED, TESTED, IDS = 64, (64, 256, 4096), 16

#: rows, generator -> tokens (B, L) and the ids that the last outputs of each row must be (B, n)
Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


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

    lengths = torch.full((rows,), length)
    wanted = run(lambda *ts: selective_scan_reference(*ts, lengths, True), torch.float64)
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


def copying(seed: int) -> Claim:
    """Data at random places between noise, to be said again in order: what a fixed kernel cannot pick out."""
    found = {}
    for name, chosen in (("selective", None), ("constant", [])):
        model = small(seed, VOCAB, 64, selective=chosen)
        train(model, copies, 700, 3e-3, seed)
        found[name] = accuracy(model, copies, 8, seed + 1)
    return Claim(
        "trained on selective copying, the selective model copies and the one with constants does not",
        "99.8 % against 56.4 %",
        ">= 97 % against <= 60 %",
        f"{found['selective']:.1%} against {found['constant']:.1%} ({LENGTH} tokens, {DATA} of them data)",
        found["selective"] >= 0.97 and found["constant"] <= 0.60,
    )


def copies(rows: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """0 is noise; 1 stands once for each value to be said."""
    places = torch.rand(rows, LENGTH, generator=gen).argsort(1)[:, :DATA].sort(1).values
    values = torch.randint(2, VOCAB, (rows, DATA), generator=gen)
    seen = torch.zeros(rows, LENGTH, dtype=torch.long).scatter(1, places, values)
    return torch.cat((seen, torch.ones(rows, DATA, dtype=torch.long)), 1), values


def induction(seed: int) -> Claim:
    model = small(seed, IDS, 64)
    train(model, inductions(TRAINED), 1000, 2e-3, seed)
    found = {length: accuracy(model, inductions(length), 8, seed + 1) for length in TESTED}
    return Claim(
        f"trained on induction at {TRAINED} tokens, it finds what followed the special one at {TESTED[-1]:,}",
        "perfect at 2^20, trained at 256",
        ">= 99 % at every length",
        ", ".join(f"{value:.1%} at {length:,}" for length, value in found.items()),
        min(found.values()) >= 0.99,
    )


def inductions(length: int) -> Draw:
    """The special token, 0, stands once, followed by any other; at the end it comes again."""

    def draw(rows: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(1, IDS, (rows, length), generator=gen)
        places = torch.randint(0, length - 2, (rows, 1), generator=gen)
        follower = tokens.gather(1, places + 1)
        tokens = tokens.scatter(1, places, 0)
        tokens[:, -1] = 0
        return tokens, follower

    return draw


def train(model: Any, draw: Draw, steps: int, lr: float, seed: int, rows: int = 32) -> None:
    """AdamW with warm-up and linear decay; the loss is on the last outputs of each row, for which answers are drawn."""
    gen = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (1 - 0.9 * step / steps)
        tokens, wanted = draw(rows, gen)
        loss = F.cross_entropy(model(tokens)[:, -wanted.shape[1] :].flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: Any, draw: Draw, batches: int, seed: int, rows: int = 32) -> float:
    gen, right, total = torch.Generator().manual_seed(seed), 0, 0
    for _ in range(batches):
        tokens, wanted = draw(rows, gen)
        right += int((model(tokens)[:, -wanted.shape[1] :].argmax(-1) == wanted).sum())
        total += wanted.numel()
    return right / total
