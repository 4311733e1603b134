"""The proof of LMUFormer: a memory that is a delay line, streams equal to one pass, the published counts, and learning.

Liu, Datta, Li and Beerel, 2024 (2402.04882). Trained on scikit-learn's digits, read row by row (8 steps) or pixel by
pixel in a fixed random order (64 steps), and on tones and chirps in noise; ``quick`` trains nothing.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from formwright.engine.state import State
from formwright.models.build import build
from formwright.models.recipes import recipe
from formwright.ops.legendre_memory import legendre_memory, legendre_memory_reference, matrices
from formwright.parts.base import Shape
from formwright.parts.norms.batch import BatchNorm
from formwright.parts.spikes import LIF
from formwright.proofs._bytes import one_thread
from formwright.proofs._frames import SOUNDS, Rows, accuracy, digits, fit, sounds
from formwright.proofs.base import Claim
from formwright.registry import Paper, register

COUNTS = {
    "lmuformer": 1_621_796,
    "spiking-lmuformer": 1_689_894,
    "lmu-psmnist": 166_798,
    "spiking-lmu-psmnist": 166_092,
}

#: Of each order of the digits and each model: width, epochs, learning rate.
TRAINING = {
    "row": {"lmuformer": (48, 15, 5e-3), "spiking-lmuformer": (48, 25, 1e-2)},
    "pixel": {"lmuformer": (64, 10, 5e-3), "spiking-lmuformer": (48, 15, 1e-2)},
}
#: Width of the Transformer that it is compared with.
TRANSFORMER = 128
#: Energy of an operation on 32-bit floats in 45 nm.
PICOJOULES = {"add": 0.9, "multiply": 4.6}


@register(
    "proof", "lmuformer", paper=Paper("Liu, Datta, Li and Beerel", 2024, "2402.04882"), summary="a streaming classifier"
)
def prove(quick: bool, seed: int) -> list[Claim]:
    """The memory, the stream, the sizes; in the full form what is learned as well."""
    with one_thread():
        exact = [delay_line(), parallel(seed), *(stream(name, seed) for name in list(COUNTS)[:2]), counted(), smaller()]
        return exact if quick else [*exact, *learned(seed)]


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
    """Frame by frame in float64, the answer after every frame against that of one pass over the frames so far."""
    model = build(recipe(name, features=16, width=32, classes=5, theta=32), seed=seed).double()
    values = 2 * torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, BatchNorm):
                norm.weight.fill_(2.5)  # so that neurons are lively
        model.train()
        for _ in range(20):
            model(values)
    wanted, found = whole(model.eval(), values), streamed(model, values)
    error, apart = float((found - wanted).abs().max()), float((wanted[-1, 0] - wanted[-1, 1]).abs().max())
    return Claim(
        f"{name}: a stream frame by frame says after each what one pass says", "five frames late", "within 1e-9",
        f"{error:.1e} over 40 frames, where two rows differ by {apart:.2f}", error <= 1e-9 < apart,
    )  # fmt: skip


@torch.no_grad()
def streamed(model: Any, values: Tensor) -> Tensor:
    """Logits (L, B, classes) after every frame of values (B, L, features), which come one a call; each answer is that
    of a fork of the stream that ends there."""
    state, end, said = State(len(values)), torch.ones(len(values), 1, dtype=torch.bool), []
    for step in range(values.shape[1]):
        model(values[:, step : step + 1], state=state)
        said.append(model(values[:, :0], state=state.fork(), marks={"end": end}))
    return torch.stack(said)


@torch.no_grad()
def whole(model: Any, values: Tensor) -> Tensor:
    """The same by one pass over every prefix."""
    return torch.stack([model(values[:, : step + 1]) for step in range(values.shape[1])])


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


class Learned(NamedTuple):
    """The digits in one order, and both models trained on them."""

    rows: Rows
    plain: Any
    spiking: Any

    def scores(self) -> tuple[float, float]:
        """Accuracy of both on the digits held out."""
        return tuple(accuracy(model, self.rows.tested, self.rows.wanted) for model in self[1:])  # type: ignore[return-value]


def learned(seed: int) -> list[Claim]:
    """Everything that has to be trained first."""
    found = {by: train(by, seed) for by in TRAINING}
    scores = {by: one.scores() for by, one in found.items()}
    return [
        *(accurate(by, one.rows, scores[by][0], seed) for by, one in found.items()),
        larger(found["row"], scores["row"][0], seed),
        *(close(by, *scores[by]) for by in found),
        sparse(found),
        anytime(found["row"]),
        early(seed),
    ]


def train(by: str, seed: int) -> Learned:
    rows = digits(by, seed)
    _, length, features = rows.values.shape
    models = []
    for name, (width, epochs, lr) in TRAINING[by].items():
        model = build(recipe(name, features=features, classes=10, width=width, theta=length), seed=seed)
        models.append(fit(model, rows.values, rows.labels, epochs, seed, lr))
    return Learned(rows, *models)


def accurate(by: str, rows: Rows, score: float, seed: int) -> Claim:
    """Against a linear read-out of the last step, which has no memory."""
    torch.manual_seed(seed)
    last = fit(nn.Linear(rows.values.shape[2], 10), rows.values[:, -1], rows.labels, 15, seed, 1e-2)
    without = accuracy(last, rows.tested[:, -1], rows.wanted)
    return Claim(
        f"it reads digits {by} by {by}",
        "96.5 % of Speech Commands; about 98.5 % of permuted pixels of MNIST",
        ">= 95 %, and 10 points above a linear of the last step",
        f"{score:.1%}; the last step alone {without:.1%}",
        score >= 0.95 and score >= without + 0.1,
        needs="training",
    )


def larger(one: Learned, score: float, seed: int) -> Claim:
    """A Transformer that looks both ways, with learned positions."""
    rows, width = one.rows, TRANSFORMER
    _, length, features = rows.values.shape
    positions = {"kind": "learned", "max": length}
    layers = [{"part": "attention", "heads": 4}, {"part": "mlp", "hidden": 4 * width}]
    spec = {
        "stem": {"part": "linear", "features": features, "width": width, "positions": positions},
        "defaults": {"norm": "layernorm", "order": "pre"},
        "layers": [{"repeat": 3, "layers": layers}],
        "final_norm": "layernorm",
        "head": {"part": "sequence-classifier", "classes": 10, "pool": "mean"},
    }
    model = fit(build(spec, seed=seed), rows.values, rows.labels, 8, seed, 1e-3)
    theirs = accuracy(model, rows.tested, rows.wanted)
    sizes = [sum(p.numel() for p in made.parameters()) for made in (one.plain, model)]
    return Claim(
        "row by row it is as good as a far larger Transformer that looks both ways",
        "96.5 % against 98.1 % with 53x the parameters",
        "within 1.5 points of one with at least 10x the parameters",
        f"{score:.1%} with {sizes[0]:,}, {theirs:.1%} with {sizes[1]:,}",
        score >= theirs - 0.015 and sizes[1] >= 10 * sizes[0],
        needs="training",
    )


def close(by: str, plain: float, spiking: float) -> Claim:
    return Claim(
        f"spiking neurons keep the accuracy {by} by {by}",
        "96.1 % against 96.5 %",
        "at most 2 points below the model without them",
        f"{spiking:.1%} against {plain:.1%}",
        spiking >= plain - 0.02,
        needs="training",
    )


def sparse(found: dict[str, Learned]) -> Claim:
    """What enters the linears of the spiking models while they read the digits held out."""
    shown, right = [], True
    for by, one in found.items():
        rate, share, energy, only = fired(one.spiking, one.rows.tested)
        shown.append(
            f"{by} by {by} {rate:.2f}, {share:.0%} of the products as additions, {energy:.0%} of the energy"
            + ("" if only else ", and values that are no spikes")
        )
        right = right and only and rate < 0.5
    return Claim(
        "nothing but spikes enters the linears behind the first convolution, and few",
        "additions of 0.9 pJ for products of 4.6 pJ",
        "only 0 and 1 up to the head's mean; mean firing rate below 0.5",
        "; ".join(shown),
        right,
        needs="training",
    )


@torch.no_grad()
def fired(model: Any, values: Tensor) -> tuple[float, float, float, bool]:
    """The mean firing rate; the share of the linears' products that meet no zero, and of their energy; whether nothing
    but 0 and 1 enters between the first convolution and the head."""
    spikes: list[Tensor] = []
    entered: dict[str, tuple[int, int, bool]] = {}  # products, those of no zero, whether all are 0 or 1

    def enter(name: str, slot: Any) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            x, out = given[0], slot.out_features
            entered[name] = (x.numel() * out, int(x.count_nonzero()) * out, bool(((x == 0) | (x == 1)).all()))

        return slot.register_forward_pre_hook(hook)

    handles = [enter(name, slot) for name, slot in model.slots().items()]
    handles += [
        layer.register_forward_hook(lambda _, given, out: spikes.append(out))
        for layer in model.modules()
        if isinstance(layer, LIF)
    ]
    try:
        model(values)
    finally:
        for handle in handles:
            handle.remove()
    rate = sum(float(s.sum()) for s in spikes) / sum(s.numel() for s in spikes)
    inner = [one for name, one in entered.items() if "convs.0" not in name and not name.startswith("head")]
    products = sum(one[0] for one in entered.values())
    added = sum(one[1] for one in inner)
    multiplied = products - sum(one[0] for one in inner)
    energy = (PICOJOULES["add"] * added + PICOJOULES["multiply"] * multiplied) / (PICOJOULES["multiply"] * products)
    return rate, added / products, energy, all(one[2] for one in inner)


def anytime(one: Learned) -> Claim:
    """Streams of all digits held out, both models in float64."""
    worst, curves = 0.0, []
    for model in one[1:]:
        values = one.rows.tested.double()
        wanted, found = whole(model.double(), values), streamed(model, values)
        worst = max(worst, float((found - wanted).abs().max()))
        right = (found.argmax(-1) == one.rows.wanted).double().mean(1)
        curves.append(", ".join(f"{share:.0%}" for share in right.tolist()))
        model.float()
    return Claim(
        "trained, a stream of rows answers at every row what one pass over the rows so far answers",
        "any time",
        "within 1e-9, both models",
        f"{worst:.1e}; right after each row: {curves[0]}; spiking: {curves[1]}",
        worst <= 1e-9,
        needs="training",
    )


def early(seed: int) -> Claim:
    """Sounds of 64 frames, decided at the frame that the published model stops at (87 of 128)."""
    frames, bands = 64, 16
    values, labels = sounds(1500, frames, bands, seed)
    tested, wanted = sounds(500, frames, bands, seed + 1_000_003)
    made = recipe("lmuformer", features=bands, classes=len(SOUNDS), width=32, theta=frames)
    model = fit(build(made, seed=seed), values, labels, 10, seed, 5e-3)
    stops = [frames * part // 100 for part in (25, 50, 68, 100)]
    right = {stop: accuracy(model, tested[:, :stop], wanted) for stop in stops}
    return Claim(
        "two thirds of a sound are enough to name it",
        "accuracy almost kept at frame 87 of 128",
        f">= 97 % of the final accuracy at frame {stops[2]} of {frames}, tones and chirps in noise",
        ", ".join(f"{share:.1%} at {stop}" for stop, share in right.items()),
        right[stops[2]] >= 0.97 * right[frames],
        needs="training",
    )
