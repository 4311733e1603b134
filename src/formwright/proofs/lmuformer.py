"""The proof of LMUFormer's memory and sizes: a delay line, one pass equal to its stream, the published counts.

Liu, Datta, Li and Beerel, 2024 (2402.04882). Nothing is trained here; ``quick`` and the full form are the same.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from formwright.engine.state import State
from formwright.models.build import build
from formwright.models.recipes import recipe
from formwright.ops.legendre_memory import legendre_memory, legendre_memory_reference, matrices
from formwright.parts.base import Shape
from formwright.parts.norms.batch import BatchNorm
from formwright.proofs._bytes import one_thread
from formwright.proofs.base import Claim
from formwright.registry import Paper, register

COUNTS = {
    "lmuformer": 1_621_796,
    "spiking-lmuformer": 1_689_894,
    "lmu-psmnist": 166_798,
    "spiking-lmu-psmnist": 166_092,
}


@register(
    "proof", "lmuformer", paper=Paper("Liu, Datta, Li and Beerel", 2024, "2402.04882"), summary="a streaming classifier"
)
def prove(quick: bool, seed: int) -> list[Claim]:
    """The memory, the stream, the sizes."""
    with one_thread():
        return [delay_line(), parallel(seed), *(stream(name, seed) for name in list(COUNTS)[:2]), counted(), smaller()]


def delay_line() -> Claim:
    """Legendre polynomials of the delay read the past out of the memory: two slow sines, float64."""
    errors, radius = {}, 0.0
    for order, theta in ((16, 128), (32, 784)):
        steps = torch.arange(4 * theta, dtype=torch.float64) * 2 * math.pi / theta
        u = torch.sin(steps) + 0.5 * torch.sin(2.3 * steps + 1)
        memory, _ = legendre_memory(u[None], order, theta)
        worst = 0.0
        for delay in (0, theta // 4, theta // 2, theta - 1):
            read = np.polynomial.legendre.legval(2 * delay / theta - 1, np.eye(order))
            found, wanted = (memory[0] @ torch.from_numpy(read))[2 * theta :], u[2 * theta - delay : 4 * theta - delay]
            worst = max(worst, float((found - wanted).norm() / wanted.norm()))
        errors[order, theta] = worst
        radius = max(radius, float(np.abs(np.linalg.eigvals(matrices(order, theta)[0])).max()))
    return Claim(
        "the memory is a delay line of theta steps",
        "by construction",
        "relative error at most 0.05 at order 16, theta 128, and 0.01 at 32, 784; spectral radius below 1",
        ", ".join(f"{error:.4f} at {order}, {theta}" for (order, theta), error in errors.items())
        + f"; radius {radius:.4f}",
        errors[16, 128] <= 0.05 and errors[32, 784] <= 0.01 and radius < 1,
    )


def parallel(seed: int) -> Claim:
    """Lengths of the direct form, of the transformed form and beyond theta, against the recurrence in float64."""
    generator, worst = torch.Generator().manual_seed(seed), 0.0
    for length in (1, 50, 128, 500):
        u = torch.randn(2, length, generator=generator)
        wanted, _ = legendre_memory_reference(u.double(), 256, 128)
        worst = max(worst, float((legendre_memory(u, 256, 128)[0] - wanted).abs().max()))
    return Claim(
        "the parallel form is the recurrence, at any length", "equal", "within 1e-5", f"{worst:.1e}", worst <= 1e-5
    )


def stream(name: str, seed: int) -> Claim:
    """Frame by frame in float64, logits at the end against those of one pass."""
    model = build(recipe(name, features=16, width=32, classes=5, theta=32), seed=seed).double()
    values = 2 * torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    state = State(2)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, BatchNorm):
                norm.weight.fill_(2.5)  # so that neurons are lively
        model.train()
        for _ in range(20):
            model(values)
        wanted = model.eval()(values)
        for step in range(40):
            end = {"end": torch.full((2, 1), step == 39)}
            last = model(values[:, step : step + 1], state=state, marks=end)
    error, apart = float((last - wanted).abs().max()), float((wanted[0] - wanted[1]).abs().max())
    return Claim(
        f"{name}: a stream frame by frame says what one pass says", "five frames late", "within 1e-9",
        f"{error:.1e}, where two rows differ by {apart:.2f}", error <= 1e-9 < apart,
    )  # fmt: skip


def counted() -> Claim:
    """Parameters of the four models, and products of the convolutions for 128 frames."""
    models = {name: build(recipe(name), device="meta") for name in COUNTS}
    found = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    slots = models["lmuformer"].slots().items()
    convolutions = sum(
        slot.cost(Shape.full(1, 128)).macs
        for address, slot in slots
        if ":cell." not in address and not address.startswith("head")
    )
    return Claim(
        "the models have the published sizes",
        ", ".join(f"{count:,}" for count in COUNTS.values()) + "; about 1.89e8 products",
        "the same parameters, 188,743,680 products in convolutions",
        ", ".join(f"{count:,}" for count in found.values()) + f"; {convolutions:,}",
        found == COUNTS and convolutions == 188_743_680,
    )


def smaller() -> Claim:
    """Against the layers of a spectrogram Transformer: 12 of width 768 over 146 patches of 16 x 16."""
    layers = [{"repeat": 12, "layers": [{"part": "attention", "heads": 12}, {"part": "mlp", "hidden": 3072}]}]
    stem = {"part": "linear", "features": 256, "width": 768, "positions": {"kind": "learned", "max": 146}}
    theirs = build({"stem": stem, "layers": layers}, device="meta").cost(Shape.full(1, 146))
    ours = build(recipe("lmuformer"), device="meta").cost(Shape.full(1, 128))
    sizes, products = theirs.parameters / ours.parameters, theirs.macs / ours.macs
    return Claim(
        "it is far smaller than a spectrogram Transformer",
        "53x parameters, 65x operations",
        "at least 50x and 60x",
        f"{sizes:.1f}x, {products:.1f}x",
        sizes >= 50 and products >= 60,
    )
