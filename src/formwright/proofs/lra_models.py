"""The proof of the Long Range Arena's ten mixers: each is its mathematics, keeps its order, and grows as it should.

Tay et al., 2021 (2011.04006), and the papers of the mixers. No training: matrices, streams, estimators and times of
single layers. ``quick`` takes fewer draws and times shorter texts.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.engine.state import State
from formwright.kit.errors import FormwrightError
from formwright.measure.timing import alternate
from formwright.ops.attention import attention_reference
from formwright.parts.base import initialise
from formwright.parts.context import Context, Notes, Visible
from formwright.parts.make import make_part
from formwright.parts.mixers.performer import exponents, independent_rows, orthogonal_rows
from formwright.proofs._bytes import one_thread
from formwright.proofs.base import Claim
from formwright.registry import Paper, register

WIDTH = 32
CAUSAL: dict[str, dict[str, Any]] = {
    "local": {"block": 16, "causal": True},
    "sparse": {"stride": 16},
    "longformer": {"window": 16, "causal": True},
    "linear-attention": {"causal": True},
    "performer": {"causal": True},
    "synthesizer": {"kinds": ["dense", "dot"], "length": 256, "causal": True},
}
TIMED: dict[str, dict[str, Any]] = {
    "local": {"block": 64},
    "sparse": {"stride": 64},
    "longformer": {"window": 64},
    "bigbird": {"block": 64},
    "linformer": {"length": 4096, "rank": 64},
    "reformer": {},
    "sinkhorn": {},
    "linear-attention": {"causal": True},
    "performer": {"causal": True},
}


@register("proof", "lra-models", paper=Paper("Tay et al.", 2021, "2011.04006"), summary="ten mixers, each its formula")
def prove(quick: bool, seed: int) -> list[Claim]:
    """Equivalence, order, streams, estimators, sorting, hashing, time, errors."""
    with one_thread(), torch.no_grad():
        return [
            equivalence(seed),
            order(seed),
            hashed_order(seed),
            streams(seed),
            features(quick, seed),
            orthogonal(seed),
            unbiased(quick, seed),
            sorting(seed),
            neighbours(seed),
            times(quick),
            refusals(),
        ]


def made(name: str, seed: int = 0, heads: int = 2, **options: Any) -> Any:
    part = make_part({"part": name, "heads": heads, **options}, WIDTH)
    initialise(part, seed)
    return part.double().eval()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at_most(claim: str, published: str, bar: float, found: dict[str, float]) -> Claim:
    """A claim that holds where the largest figure is below the bar."""
    name = max(found, key=lambda key: found[key])
    return Claim(claim, published, f"<= {bar:g}", f"{found[name]:.1e} ({name}, of {len(found)})", found[name] <= bar)


def equivalence(seed: int) -> Claim:
    """Patterns that cover everything, projections that are the identity, one chunk."""
    x, length = drawn(2, 20, WIDTH, seed=seed), 20
    covering: dict[str, dict[str, Any]] = {
        "local": {"block": length},
        "longformer": {"window": 2 * length + 1},
        "bigbird": {"block": 4, "random": 3},
        "linformer": {"length": length, "rank": length},
        "reformer": {"chunk": length, "buckets": 1, "see_self": True},
    }
    found = {}
    for name, options in covering.items():
        part = made(name, seed, **options)
        if name == "linformer":
            part.e.copy_(torch.eye(length))
            part.f.copy_(torch.eye(length))
        q, v = (slot(x).unflatten(-1, (2, -1)) for slot in (part.q, part.v))
        k = F.normalize(q, dim=-1) if name == "reformer" else part.k(x).unflatten(-1, (2, -1))
        wanted = part.o(attention_reference(q, k, v)[0].flatten(2))
        found[name] = float((part(x, Context(path="here")) - wanted).abs().max())
    return at_most("where everything is covered, sparse and projected forms are full attention", "—", 1e-5, found)


def order(seed: int) -> Claim:
    """A later token exchanged."""
    x, found = drawn(1, 100, WIDTH, seed=seed), {}
    changed = x.clone()
    changed[:, 60:] = drawn(1, 40, WIDTH, seed=seed + 1)
    for name, options in CAUSAL.items():
        part = made(name, seed, **options)
        found[name] = float((part(x, Context()) - part(changed, Context()))[:, :60].abs().max())
    return at_most("in mixers that are declared causal no earlier output changes with a later token", "—", 1e-12, found)


def hashed_order(seed: int) -> Claim:
    """Values of later tokens are hidden; that their hashes move the cuts of the sorted list is not."""
    part, x = made("reformer", seed, chunk=4, buckets=8, causal=True), drawn(1, 100, WIDTH, seed=seed)
    changed = x.clone()
    changed[:, 60:] = drawn(1, 40, WIDTH, seed=seed + 1)
    token = (part(x, Context()) - part(changed, Context()))[0, :60].abs().amax(1)
    (q, v), (_, other) = (part.enter(rows, Context()) for rows in (x, changed))
    buckets, real = part.hashed(q.transpose(1, 2), Context()), torch.ones(1, 100, dtype=torch.bool)
    value = (part.attend(q, v, buckets, real) - part.attend(q, other, buckets, real))[0, :60].abs().amax((1, 2))
    try:
        part(x, Context(visible=Visible(causal=True)))
        refused = False
    except FormwrightError:
        refused = True
    declared = part.traits.causal or part.traits.streams
    return Claim(
        "Reformer under a mask of positions hides what later tokens say but not which ones meet: it is not causal",
        "causal, by a mask of positions",
        "no earlier output changes with later values; not declared causal, and refused where causal order is asked for",
        f"{int((value > 0).sum())} of 60 change with later values, {int((token > 1e-6).sum())} with later tokens; "
        f"{'declared' if declared else 'not declared'}, {'refused' if refused else 'not refused'}",
        not bool(value.any()) and bool((token > 1e-6).any()) and not declared and refused,
    )


def streams(seed: int) -> Claim:
    x, found = drawn(1, 256, WIDTH, seed=seed), {}
    for name, options in CAUSAL.items():
        part, state = made(name, seed, **options), State(1)
        steps = []
        for t in range(256):
            steps.append(part(x[:, t : t + 1], Context(state=state, path="here")))
            state.advance(None, 1)
        found[name] = float((torch.cat(steps, 1) - part(x, Context())).abs().max())
    return at_most("256 tokens, one a call, equal one pass", "—", 1e-5, found)


def _kernel(count: int, orthogonally: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Estimates of exp(q . k / sqrt(d)), (16, 16), and the truth."""
    generator = torch.Generator().manual_seed(seed)
    omega = (orthogonal_rows if orthogonally else independent_rows)(count, 16, generator)
    q, k = 0.3 * drawn(16, 16, seed=1), 0.3 * drawn(16, 16, seed=2)  # larger ones need thousands of features
    return exponents(q, omega).exp() @ exponents(k, omega).exp().T / count, (q @ k.T / 4).exp()


def features(quick: bool, seed: int) -> Claim:
    errors = []
    for count in (32, 64, 128, 256):
        draws = [_kernel(count, True, seed + number) for number in range(50 if quick else 500)]
        errors.append(sum(float((found - true).norm() / true.norm()) for found, true in draws) / len(draws))
    ratios = [a / b for a, b in pairwise(errors)]
    return Claim(
        "Performer: twice the features, an error smaller by the root of 2",
        "error falls as 1 / sqrt(m)",
        "1.4 +- 0.2 for each doubling from 32 to 256",
        ", ".join(f"{ratio:.2f}" for ratio in ratios),
        all(1.2 <= ratio <= 1.6 for ratio in ratios),
    )


def orthogonal(seed: int) -> Claim:
    errors = []
    for orthogonally in (True, False):
        draws = [_kernel(32, orthogonally, seed + number) for number in range(20)]
        errors.append(sum(float((found - true).square().mean()) for found, true in draws) / len(draws))
    return Claim(
        "Performer: orthogonal rows have a smaller mean square error than independent ones",
        "always",
        "below, at m = 32 over 20 draws",
        f"{errors[0]:.4f} against {errors[1]:.4f}",
        errors[0] < errors[1],
    )


def unbiased(quick: bool, seed: int) -> Claim:
    draws = [_kernel(32, True, seed + number) for number in range(200 if quick else 2000)]
    means = torch.stack([found.mean() for found, _ in draws])
    away = float((means.mean() - draws[0][1].mean()) / (means.std() / len(means) ** 0.5))
    return Claim(
        "Performer: the estimate is right on average",
        "unbiased",
        "within 3 standard errors",
        f"{away:+.1f} over {len(draws)} draws",
        abs(away) <= 3,
    )


def sorting(seed: int) -> Claim:
    """Sums of S, and blocks of keys exchanged below a fixed S."""
    part = made("sinkhorn", seed, block=4, iterations=20)
    x, notes = drawn(1, 32, WIDTH, seed=seed), Notes(want={("here", "order")})
    part(x, Context(notes=notes, path="here"))
    found = notes.got["here", "order"]
    off = max(float((found.sum(axis) - 1).abs().max()) for axis in (2, 3))
    k = drawn(1, 8, 4, 2, 16, seed=seed)
    moved = float((part._sorted(found, k) - part._sorted(found, k.flip(1))).abs().max())
    return Claim(
        "Sinkhorn: rows and columns add up to 1, and which block is brought matters",
        "doubly stochastic",
        "within 1e-2 after 20 iterations; keys change when blocks are exchanged",
        f"{off:.1e}; by {moved:.2f}",
        off <= 1e-2 and moved > 0.1,
    )


def neighbours(seed: int) -> Claim:
    """128 tokens and their copies, 8 rounds of hashing."""
    part = made("reformer", seed, chunk=16, buckets=16, rounds=8)
    half = drawn(1, 128, WIDTH, seed=seed)
    x = torch.cat((half, half), 1)
    buckets = part.hashed(part.q(x).unflatten(-1, (2, -1)).transpose(1, 2), Context())
    ranks = (buckets * 256 + torch.arange(256)).argsort(-1).argsort(-1) // part.chunk
    apart = (ranks[..., :128] - ranks[..., 128:]).abs()
    share = float((apart <= 1).any(2).double().mean())
    return Claim(
        "Reformer: 8 rounds let a token meet its copy",
        "best quality at 8 rounds",
        ">= 95 % of pairs",
        f"{share:.1%}",
        share >= 0.95,
    )


def times(quick: bool) -> Claim:
    short, long = (256, 1024) if quick else (1024, 4096)
    runs = {}
    for name, options in TIMED.items():
        part = made(name, **options).float()
        for length in (short, long):
            x = drawn(1, length, WIDTH).float()
            runs[f"{name} {length}"] = lambda part=part, x=x: part(x, Context(path="here"))
    # The best of many rounds: a neighbour on the machine slows large tensors more than small ones, but not every time.
    found = alternate(runs, rounds=3 if quick else 60)
    ratios = {name: found[f"{name} {long}"].best / found[f"{name} {short}"].best for name in TIMED}
    return Claim(
        f"four times the length takes about four times the time ({short} to {long})",
        "linear or nearly so",
        "time ratio <= 5 for every mixer but Synthesizer",
        ", ".join(f"{name} {ratio:.1f}" for name, ratio in ratios.items()),
        all(ratio <= 5 for ratio in ratios.values()),
        needs="time",
    )


def refusals() -> Claim:
    """Causal order where there is none, texts beyond a table, an odd number of buckets."""
    causal = Context(visible=Visible(causal=True))
    long = drawn(1, 9, WIDTH)
    tried: list[Any] = [
        *(
            lambda name=name, options=options: made(name, **options)(long, causal)
            for name, options in (
                ("linformer", {"length": 9, "rank": 2}),
                ("bigbird", {"block": 2}),
                ("sinkhorn", {}),
                ("reformer", {}),
            )
        ),
        lambda: made("linformer", length=8, rank=2)(long, Context()),
        lambda: made("synthesizer", length=8, kinds=["random"])(long, Context()),
        lambda: made("reformer", buckets=7),
    ]
    refused = 0
    for run in tried:
        try:
            run()
        except FormwrightError:
            refused += 1
    return Claim(
        "causal order without a causal form, texts beyond a table and odd buckets are refused",
        "—",
        f"all {len(tried)}",
        f"{refused} of {len(tried)}",
        refused == len(tried),
    )
