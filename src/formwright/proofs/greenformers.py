"""The proof of low-rank Transformers: exact counts, the least error, a real encoder at half its weights, speed.

Winata et al., 2020 (1910.13923) train speech models whose linears are two thin ones: half the parameters, 1.35 times
the speed, lower error. Cahyawijaya, 2021 (2108.10808) makes a toolkit of it. Here: the algebra; a sentence encoder
whose linears keep half their weights, then healed; a language model of bytes trained so from the start; times on this
machine. ``quick``: one block of the encoder, no training; seconds.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

from formwright import registry
from formwright.kit.errors import DataError, FormwrightError
from formwright.measure.timing import alternate
from formwright.models.build import build
from formwright.parts.base import Shape
from formwright.parts.linears.dense import dense_of
from formwright.parts.linears.low_rank import LowRank, break_even
from formwright.proofs._bytes import loss, one_thread, rows, spec, text, train
from formwright.proofs.base import Claim
from formwright.proofs.llm_int8 import MODEL, sentences
from formwright.registry import Paper, register
from formwright.surgery import apply, copy, plan, surgery
from formwright.surgery.compress._factors import factorise

TEXTS, TESTED = 256, 128
SHAPES = ((192, 192), (192, 768), (768, 192))


@register("proof", "greenformers", paper=Paper("Winata et al.", 2020, "1910.13923"), summary="low-rank linears")
def prove(quick: bool, seed: int) -> list[Claim]:
    """Algebra first, then models."""
    with one_thread():
        found = [exact(seed), truncated(seed), counted(), dense_above_break_even()]
        found += encoder(quick, seed) if quick else from_scratch(seed)
        found.append(faster(quick, seed))
    found += [] if quick else encoder(quick, seed)
    return [*found, refusals()]


def exact(seed: int) -> Claim:
    """Full rank, and multiplying out, at shapes wider, taller and square."""
    worst = merged = 0.0
    generator = torch.Generator().manual_seed(seed)
    for rows_, columns in SHAPES:
        weight = torch.randn(rows_, columns, generator=generator) * columns**-0.5
        x = torch.randn(32, columns, generator=generator)
        for rank in (min(rows_, columns), 96):
            slot = LowRank(columns, rows_, True, "up", rank=rank)
            made = factorise(weight, rank)
            values = {"first.weight": made.first, "second.weight": made.second, "second.bias": torch.zeros(rows_)}
            slot.load_state_dict(values)
            with torch.no_grad():
                y = slot(x)
                merged = max(merged, float((dense_of(slot)(x) - y).abs().max()))
                if rank == min(rows_, columns):
                    worst = max(worst, float((y - x @ weight.T).abs().max()))
    return Claim(
        "at full rank the outputs are the dense ones, and any factors multiply out to one weight",
        "—",
        "within 1e-5, both",
        f"{worst:.1e}, {merged:.1e}",
        worst <= 1e-5 and merged <= 1e-5,
    )


def truncated(seed: int) -> Claim:
    """Eckart and Young: the error is the root of the summed squares of the dropped singular values."""
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for rows_, columns in SHAPES:
        weight = torch.randn(rows_, columns, generator=generator)
        values = torch.linalg.svdvals(weight.double())
        for rank in (16, 64, 150):
            made = factorise(weight, rank)
            error = (weight.double() - made.second.double() @ made.first.double()).norm()
            worst = max(worst, abs(float(error / values[rank:].square().sum().sqrt()) - 1))
    return Claim(
        "a truncated weight is off by what its dropped singular values say",
        "Eckart and Young, 1936",
        "within 1e-4, relative",
        f"{worst:.1e}",
        worst <= 1e-4,
    )


def counted() -> Claim:
    """BERT-base laid out without weights, every linear of its layers at rank 256."""
    model = build(registry.resolve("recipe", "bert-base")(), device="meta")
    slots = {address: slot for address, slot in model.slots().items() if address.startswith("b")}
    before = sum(slot.in_features * slot.out_features for slot in slots.values())
    by = surgery("low-rank")
    by.reshape(model, by.made(model, {}, {"ranks": dict.fromkeys(slots, 256)}))
    bias = sum(slot.out_features for slot in slots.values())
    after = sum(model.slot(address).cost(Shape.full(1, 1)).parameters for address in slots) - bias
    layer, formula = after // 12, 13_824 * 256
    return Claim(
        "BERT-base at rank 256 has half the weights in its layers",
        "13,824 r a layer against 7,077,888",
        "exactly half, and the formula",
        f"{after:,} of {before:,}; {layer:,} a layer, formula {formula:,}",
        2 * after == before and layer == formula and before == 12 * 7_077_888,
    )


def dense_above_break_even() -> Claim:
    """A rank that saves nothing is not carried out."""
    known = {(768, 768): 384, (768, 3072): 614, (512, 512): 256, (512, 2048): 409}
    right = all(break_even(*shape) == rank for shape, rank in known.items())
    model = build(spec(32, 1), seed=0)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        decided = plan(model, "low-rank", rank=20)
    kept = [address for address in model.slots() if address in decided.decisions["kept"]]
    return Claim(
        "from the break-even rank on a linear stays dense, and it is said",
        "384 at 768 x 768, 614 at 768 x 3072",
        "the four ranks of the paper; square linears of a model of width 32 kept at rank 20",
        f"{'equal' if right else 'not equal'}; kept {len(kept)} ({', '.join(kept)}), {len(heard)} warning",
        right and len(kept) == 4 and len(heard) == 1,
    )


def encoder(quick: bool, seed: int) -> list[Claim]:
    """Mean cosine of a sentence encoder's vectors to its own before, by solver and after healing."""
    from formwright.hub import load

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = load(MODEL)
    except DataError:
        return [
            Claim("half the weights of a real encoder", "—", "—", f"not run: install {MODEL}", False, needs="install")
        ]
    count = 48 if quick else TESTED
    texts = sentences(count + (64 if quick else 2048))
    tested = texts[:: len(texts) // count][:count]
    learned = [one for one in texts if one not in set(tested)]
    options: dict[str, Any] = {"rank": 0.5, "where": ["b5.*"]} if quick else {"parameters": 0.5}
    wanted = model.encode(tested, as_tensor=True)
    found: dict[str, float] = {}
    cut = model
    for solver in ("random", "svd", "whitened"):
        cut = copy(model)
        decided = plan(cut, "low-rank", learned[:TEXTS], solver=solver, seed=seed, **options)
        apply(cut, decided)
        found[solver] = float((cut.encode(tested, as_tensor=True) * wanted).sum(-1).mean())
        before, after = decided.decisions["parameters"]
    share = f"{after / before:.0%} of the weights of {'the last block' if quick else 'all layers'}"
    ordered = found["random"] < found["svd"] < found["whitened"]
    if not quick:
        from formwright.training import heal

        heal(cut, model, learned, steps=240, seed=seed, show=False)
        found["healed"] = float((cut.encode(tested, as_tensor=True) * wanted).sum(-1).mean())
    shown = ", ".join(f"{name} {cosine:.4f}" for name, cosine in found.items())
    claims = [
        Claim(
            "factors fitted to the inputs keep more than those fitted to the weights",
            "—",
            f"mean cosine random < svd < whitened, {share}",
            shown,
            ordered,
        )
    ]
    if not quick:
        claims.append(
            Claim(
                "a short distillation brings the vectors back",
                "speech: lower error at half the parameters",
                "mean cosine >= 0.95, above whitened",
                f"{found['healed']:.4f} after 240 steps",
                found["healed"] >= 0.95 and found["healed"] > found["whitened"],
                needs="training",
            )
        )
    return claims


def from_scratch(seed: int) -> list[Claim]:
    """A model of bytes: dense, low-rank at 45 % of its linears, and dense but narrower; equal steps, equal rows."""
    width, blocks, steps, share = 96, 3, 1000, 0.45
    data, held = text()
    drawn = rows(held, 24, 128)
    dense, thin = build(spec(width, blocks), seed=seed), build(spec(width, blocks), seed=seed)
    apply(thin, "low-rank", rank=share, solver="random", multiple_of=1, seed=seed)
    sizes = {name: _parameters(model) for name, model in (("dense", dense), ("low-rank", thin))}
    narrow_width = min(
        range(8, width, 8), key=lambda w: abs(_parameters(build(spec(w, blocks), seed=None)) - sizes["low-rank"])
    )
    narrow = build(spec(narrow_width, blocks), seed=seed)
    sizes["narrower"] = _parameters(narrow)
    losses = {
        name: loss(train(model, data, steps, seed), drawn)
        for name, model in (("dense", dense), ("low-rank", thin), ("narrower", narrow))
    }
    shown = ", ".join(f"{name} {losses[name]:.4f} ({sizes[name]:,})" for name in losses)
    over = losses["low-rank"] / losses["dense"] - 1
    return [
        Claim(
            f"trained with {share:.0%} of the linears' weights, a model is nearly as good",
            "speech: better than dense at half the parameters",
            f"held-out loss within 3 % of dense after {steps} steps",
            f"{over:+.1%}: {shown}",
            over <= 0.03,
            needs="training",
        ),
        Claim(
            "and better than a narrower dense one of as many parameters",
            "—",
            "lower held-out loss",
            f"{losses['low-rank']:.4f} against {losses['narrower']:.4f} at width {narrow_width}",
            losses["low-rank"] < losses["narrower"],
            needs="training",
        ),
    ]


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def faster(quick: bool, seed: int) -> Claim:
    """A pass of two encoder blocks at rank d / 4, at lengths where linears dominate."""
    width = 384
    layers = [{"repeat": 2, "layers": [{"part": "attention", "heads": 6}, {"part": "mlp", "hidden": 4 * width}]}]
    head = {"part": "mean-pool"}
    dense = build(
        {"stem": {"part": "token-embedding", "vocab": 64, "width": width}, "layers": layers, "head": head}, seed
    )
    thin = apply(copy(dense), "low-rank", rank=width // 4, solver="random", seed=seed)
    found = {}
    generator = torch.Generator().manual_seed(seed)
    for length in (64, 256) if quick else (64, 128, 256, 512, 1024, 2048):
        ids: Tensor = torch.randint(0, 64, (1, length), generator=generator)
        contenders = {name: partial(model, ids) for name, model in (("dense", dense), ("thin", thin))}
        with torch.inference_mode():
            times = alternate(contenders, rounds=9 if quick else 25, warmup=2)
        found[length] = times["dense"].best / times["thin"].best
    least = min(ratio for length, ratio in found.items() if length <= 256)
    return Claim(
        f"rank d/4 at width {width} is faster than dense where linears dominate",
        "1.35x; lengths up to about 512",
        ">= 1.3x at every length up to 256, one thread",
        ", ".join(f"{length}: {ratio:.2f}x" for length, ratio in found.items()),
        least >= 1.3,
        needs="time",
    )


def refusals() -> Claim:
    """Nonsense is refused in words."""
    model = build(spec(32, 1), seed=0)
    tried: list[dict[str, Any]] = [
        {"rank": 0},
        {"rank": -4},
        {"rank": 1.5},
        {"rank": 4, "solver": "nmf"},
        {"rank": 4, "where": "stem:tokens"},
        {"rank": 4, "solver": "whitened"},
        {},
    ]
    refused = 0
    for options in tried:
        try:
            plan(model, "low-rank", **options)
        except FormwrightError:
            refused += 1
    return Claim(
        "rank 0, negative ranks, fractions above 1, nmf of signed weights and tied tables are refused",
        "nmf fails inside",
        f"all {len(tried)}",
        f"{refused} of {len(tried)}",
        refused == len(tried),
    )
