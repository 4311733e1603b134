"""The proof of Break-for-Make's algebra: blocks, fixed halves, roles, fusing, preconditioned steps.

Xu et al., 2024 (2403.19456) learn a content and a style as two halves of one low-rank adapter. Here: what the halves
multiply to, how nearly the fixed ones cancel, what each role moves, what a fused adapter holds and weighs, and which
steps do not know how a product is split. ``quick`` takes fewer steps; all of it takes seconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formwright.hub import save_adapter
from formwright.kit.errors import FormwrightError
from formwright.models.build import build
from formwright.parts.base import initialise
from formwright.proofs._bytes import one_thread, spec
from formwright.proofs.base import Claim
from formwright.registry import Paper, register
from formwright.surgery import apply, plan
from formwright.surgery.adapt.fuse import halves
from formwright.surgery.adapt.partly_learnable import PartlyLearnable
from formwright.surgery.adapt.precondition import preconditioned
from formwright.surgery.adapt.switch import use
from formwright.surgery.samples import state


@register("proof", "break-for-make", paper=Paper("Xu et al.", 2024, "2403.19456"), summary="adapters that fuse")
def prove(quick: bool, seed: int) -> list[Claim]:
    """The adapter's algebra."""
    with one_thread():
        steps = 20 if quick else 100
        return [blocks(seed), cancelling(seed), roles(steps, seed), fused(seed), smaller(seed), split(seed), refusals()]


def change(size: int, rank: int, seed: int, prior: str = "orthogonal") -> PartlyLearnable:
    made = PartlyLearnable(size, size, rank=rank, prior=prior).double()
    initialise(made, seed)
    return made


def decoder(seed: int) -> Any:
    """A small language model; the method does not ask what a model is for."""
    return build(spec(64, 2), seed=seed)


def trained(model: Any, name: str, steps: int, seed: int) -> dict[str, Tensor]:
    """Values before ``steps`` of AdamW with weight decay on the adapter of that name, the only one that may train."""
    before = state(use(model, name))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(0, 256, (4, 17), generator=generator)
        said = model(rows[:, :-1])
        torch.nn.functional.cross_entropy(said.flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before


def pair(model: Any, steps: int, seed: int) -> Any:
    """A content and a style adapter of rank 8, trained one after the other."""
    for role in ("content", "style"):
        apply(model, "partly-learnable", rank=8, role=role, name=role, seed=seed)
        trained(model, role, steps, seed)
    return model


def blocks(seed: int) -> Claim:
    """The four blocks of the product."""
    one = change(96, 16, seed)
    with torch.no_grad():
        one.B.normal_()
        folded, _ = one.folded(torch.zeros(96, 96, dtype=torch.float64), None)
        wanted = torch.cat([torch.cat([up @ down for down in (one.C, one.D)], 1) for up in (one.A, one.B)])
    error = float((folded - wanted).abs().max())
    return Claim("the change is four blocks: A C, A D, B C, B D", "—", "within 1e-6", f"{error:.1e}", error <= 1e-6)


def cancelling(seed: int, size: int = 256, rank: int = 16) -> Claim:
    """|A C| beside |A| |C| for the three ways to draw them."""

    def share(one: PartlyLearnable) -> float:
        with torch.no_grad():
            return float((one.A @ one.C).norm() / (one.A.norm() * one.C.norm()))

    drawn = sum(share(change(size, rank, seed + i)) for i in range(8)) / 8
    whole, exact = share(change(size, size, seed)), share(change(size, rank, seed, "exact"))
    expected = rank**-0.5
    return Claim(
        "orthonormal halves cancel only at full rank; halves of the rank do always",
        "meant to vanish",
        f"within 20 % of 1/sqrt({rank}) = {expected:.3f}; below 1e-12 at rank {size}; exactly 0",
        f"{drawn:.3f}; {whole:.1e}; {exact:.1e}",
        abs(drawn / expected - 1) <= 0.2 and whole <= 1e-12 and exact == 0,
    )


def roles(steps: int, seed: int) -> Claim:
    """What moves under weight decay in each role."""
    found = {}
    for role in ("content", "style", "both"):
        model = apply(decoder(seed), "partly-learnable", rank=8, role=role, name=role, seed=seed)
        before = trained(model, role, steps, seed)
        found[role] = {k.rpartition(".")[2] for k, v in state(model).items() if not torch.equal(v, before[k])}
    return Claim(
        "fixed halves stay bit for bit under weight decay, and each role moves its own",
        "the published training lets decay shrink them",
        f"after {steps} steps: content D, style B, both B and D, nothing else",
        "; ".join(f"{role} {' and '.join(sorted(moved))}" for role, moved in found.items()),
        found == {"content": {"D"}, "style": {"B"}, "both": {"B", "D"}},
    )


def fused(seed: int) -> Claim:
    """Which halves a fused adapter holds."""
    model = apply(pair(decoder(seed), 5, seed), "fuse")
    made, content, style = (halves(model, name) for name in ("fused", "content", "style"))
    right = all(
        torch.equal(one.up(), style[a].up())
        and torch.equal(one.D, content[a].D)
        and torch.equal(one.C, style[a].C)
        and torch.equal(content[a].A, style[a].A)
        for a, one in made.items()
    )
    return Claim(
        "the fused adapter has the style's up, the content's learned half of down, and the fixed halves of both",
        "—",
        "bit-equal",
        f"{len(made)} linears {'bit-equal' if right else 'differ'}",
        right and len(made) == 8,
    )


def smaller(seed: int) -> Claim:
    """Counts, and bytes of files beside two LoRAs of the same rank."""
    width, rank, places = 256, 16, ["q", "k", "v", "o"]
    model, plain = (build(spec(width, 1), seed=seed) for _ in range(2))
    for name in ("content", "style"):
        apply(model, "partly-learnable", rank=rank, role=name, name=name, seed=seed)
    once = halves(model, "content")
    right = all(c.B.numel() + c.D.numel() == rank * (width + width) // 2 for c in once.values())
    with tempfile.TemporaryDirectory() as folder:
        apply(model, "fuse")
        save_adapter(model, "fused", Path(folder, "fused"))
        for name in ("one", "two"):
            apply(plain, "lora", rank=rank, where=places, name=name)
            save_adapter(plain, name, Path(folder, name))
        size = {n: Path(folder, n, "adapter.safetensors").stat().st_size for n in ("fused", "one", "two")}
    share = size["fused"] / (size["one"] + size["two"])
    return Claim(
        "r (m + n) / 2 numbers are learned, and a fused adapter weighs half of two that are merged",
        "0.5",
        "exact; file at most 0.51 of two LoRAs",
        f"{'exact' if right else 'not exact'}; {share:.3f}",
        right and share <= 0.51,
    )


def split(seed: int) -> Claim:
    """One step of each form, from the same product split three ways."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((24, 4), (4, 16), (24, 16))
    up, down, target = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)

    def step(s: float, form: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        u, d = s * up, down / s
        error = u @ d - target
        to_up, to_down = form(u, d, error @ d.t(), u.t() @ error)
        return (u - 1e-3 * to_up) @ (d - 1e-3 * to_down) - u @ d

    forms: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
        "preconditioned": preconditioned,
        "plain": lambda u, d, to_up, to_down: (to_up, to_down),
        # The first step of Adam is the sign of the gradient.
        "Adam of preconditioned": lambda *given: tuple(t.sign() for t in preconditioned(*given)),  # type: ignore[dict-item, return-value]
    }
    apart = {}
    for name, form in forms.items():
        base = step(1.0, form)
        apart[name] = max(float((step(s, form) - base).norm() / base.norm()) for s in (0.1, 10.0))
    return Claim(
        "a preconditioned step of gradient descent does not know how the product is split; others do",
        "—",
        "relative difference below 1e-4 for s = 0.1 and 10; plain and Adam's above 0.1",
        ", ".join(f"{name} {value:.1e}" for name, value in apart.items()),
        apart["preconditioned"] < 1e-4 and min(apart["plain"], apart["Adam of preconditioned"]) > 0.1,
    )


def refusals() -> Claim:
    """What would be meaningless is refused, and nothing is broadcast."""
    model = decoder(0)
    given: list[tuple[str, dict[str, Any]]] = [
        ("style", {"seed": 1}),
        ("style2", {"rank": 4}),
        ("style3", {"where": ["q"]}),
    ]
    apply(model, "partly-learnable", rank=8, name="content", where=["q", "v"])
    tried: list[Callable[[], Any]] = [lambda: PartlyLearnable(7, 8, rank=2), lambda: PartlyLearnable(8, 7, rank=2)]
    for name, options in given:
        apply(model, "partly-learnable", **{"rank": 8, "where": ["q", "v"], "name": name, **options})
        tried.append(lambda name=name: plan(model, "fuse", style=name))  # type: ignore[misc]
    tried += [
        lambda: plan(model, "fuse", style="styl"),
        lambda: plan(model, "partly-learnable", rank=3, prior="exact", name="x"),
    ]
    refused = 0
    for run in tried:
        try:
            run()
        except FormwrightError:
            refused += 1
    return Claim(
        "odd sizes, other seeds, other ranks, missing slots and unknown names are refused",
        "silent",
        f"all {len(tried)}",
        f"{refused} of {len(tried)}",
        refused == len(tried),
    )
