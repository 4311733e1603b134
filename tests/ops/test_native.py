"""The compiled ops: every instruction set gives the definition's integers, fused forms what their steps give."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import formwright as fw
import small
from formwright.ops import int8_linear as op
from formwright.ops import native
from formwright.ops.attention import attention_reference, packed_attention
from formwright.ops.attention.native import Heads, packed_attention_native
from formwright.ops.int8_linear.native import ACTIVATIONS, NativeWeight, Norm, Step, Tail, Term, linear

pytestmark = pytest.mark.skipif(native.library() is None, reason="the compiled ops were not built on this machine")
REACHED: dict[str, object] = {
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "none": lambda x: x,
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def laid_out(out: int, columns: int, seed: int = 0, scale: float = 1.0) -> tuple[NativeWeight, Tensor, Tensor]:
    q, step, _ = op.quantize_weight(drawn(out, columns, seed=seed) * scale)
    return NativeWeight(q, step), q, step


@given(rows=st.integers(1, 200), columns=st.integers(1, 200), out=st.integers(1, 200), seed=st.integers(0, 99))
def test_integers_are_exact_on_every_instruction_set(level: str, rows: int, columns: int, out: int, seed: int) -> None:
    q = torch.randint(-127, 128, (out, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    x = torch.randint(-127, 128, (rows, columns), generator=torch.Generator().manual_seed(seed + 1)).float()
    x[:, 0] = 127.0  # so that the step of every row is 1
    y = linear(x, [Term(NativeWeight(q, torch.ones(out)))])[0]
    assert torch.equal(y.double(), x.double() @ q.double().T)


def test_the_largest_sums_do_not_clip(level: str) -> None:
    q = torch.full((70, 4096), 127, dtype=torch.int8)
    q[1::2] = -127
    x = torch.full((9, 4096), 127.0)
    x[::3] = -127.0
    y = linear(x, [Term(NativeWeight(q, torch.ones(70)))])[0]
    assert torch.equal(y.double(), (x.double() @ q.double().T).float().double())


@given(rows=st.integers(1, 120), count=st.integers(0, 3), seed=st.integers(0, 99))
def test_layers_equal_the_definition(level: str, rows: int, count: int, seed: int) -> None:
    x, bias = drawn(rows, 70, seed=seed), drawn(33, seed=seed + 1)
    weight, q, step = laid_out(33, 70, seed)
    outliers = torch.tensor([3, 40, 69])[:count]
    x[:, outliers] *= 50
    columns = op.dequantize_weight(q, step)[:, outliers].T.contiguous()
    y = linear(x, [Term(weight, bias, outliers if count else None, columns if count else None)])[0]
    wanted = op.int8_linear_reference(x, q, step, bias, outliers=outliers)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-4)


def test_undefined_rows_stay_undefined_and_alone(level: str) -> None:
    x, bias = drawn(6, 20), drawn(5)
    x[1], x[4] = 0.0, 1e-42
    x[2, 3], x[3, 4] = torch.nan, torch.inf
    y = linear(x, [Term(laid_out(5, 20)[0], bias)])[0]
    assert torch.equal(y[1], bias) and torch.isnan(y[2]).all() and not torch.isfinite(y[3]).any()
    assert torch.isfinite(y[[0, 1, 4, 5]]).all()


def mlp(x: torch.Tensor, up: Term, down: Term, activation: str, norm: Norm | None = None, joins: bool = False):
    """down(activation(up(x))) as one compiled step."""
    return Step.run((Step(None, [up, down], norm, joins=joins, activation=activation),), x, [])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_the_float_ones(level: str, name: str) -> None:
    identity = NativeWeight(torch.eye(64, dtype=torch.int8) * 127, torch.full((64,), 1 / 127))
    x = torch.linspace(-12, 12, 64 * 50).view(50, 64)
    plain = linear(x, [Term(identity)])[0]
    # The second product reads the activated values; one that lies on the border of two steps may fall either way.
    made = mlp(x, Term(identity), Term(identity), name)
    wanted = linear(REACHED[name](plain), [Term(identity)])[0]  # type: ignore[operator]
    steps = REACHED[name](plain).abs().amax(1, keepdim=True) / 127  # type: ignore[operator]
    assert ((made - wanted).abs() <= 1e-5 + 1.001 * steps).all()
    assert (made - wanted).abs().mean() < 1e-3


@given(
    rows=st.integers(1, 150), order=st.sampled_from(["none", "after", "before"]), shifted=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_norms_and_residuals_are_those_of_the_sublayer(level: str, rows: int, order: str, shifted: bool, seed: int):
    x, gain, shift = drawn(rows, 40, seed=seed), drawn(40, seed=2), drawn(40, seed=3) if shifted else None
    up, down = Term(laid_out(90, 40, seed)[0], drawn(90)), Term(laid_out(40, 90, seed)[0], drawn(40))
    norm = None if order == "none" else Norm(gain, shift, 1e-5, order == "before")

    def normal(values: torch.Tensor, when: str) -> torch.Tensor:
        return F.layer_norm(values, (40,), gain, shift, 1e-5) if order == when else values

    wanted = normal(x + mlp(normal(x, "before"), up, down, "gelu"), "after")
    made = mlp(x, up, down, "gelu", norm, joins=True)
    # Values on the border of two steps may fall either way where a norm before them is summed in another order.
    apart = (made - wanted).abs()
    assert (apart.max() if order != "before" else apart.mean()) <= 1e-4
    residual = drawn(rows, 40, seed=seed + 1)
    whole = residual + linear(x, [down_of := Term(laid_out(40, 40, seed)[0], drawn(40))])[0]
    tail = Tail(residual, gain if order == "after" else None, shift if order == "after" else None, 1e-5)
    torch.testing.assert_close(linear(x, [down_of], tail)[0], normal(whole, "after"), rtol=1e-4, atol=1e-4)


def test_the_number_of_threads_changes_nothing(level: str) -> None:
    up, down = Term(laid_out(200, 64)[0], drawn(200)), Term(laid_out(64, 200)[0])
    threads = torch.get_num_threads()
    for rows in (3, 47, 96, 301):
        x = drawn(rows, 64, seed=rows)
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append((mlp(x, up, down, "gelu"), linear(x, [up])[0]))
        torch.set_num_threads(threads)
        assert all(torch.equal(a, found[0][0]) and torch.equal(b, found[0][1]) for a, b in found)


def test_an_empty_text_and_more_threads_than_cores(level: str) -> None:
    made = fw.apply(small.encoder(), "llm-int8", evidence=["some words", ""])
    threads = torch.get_num_threads()
    alone = made.encode([""])
    torch.set_num_threads((os.cpu_count() or 1) + 3)
    try:
        crowded = made.encode(["", "some more words than none"])
    finally:
        torch.set_num_threads(threads)
    assert alone.shape == (1, crowded.shape[1]) and np.isfinite(alone).all()
    np.testing.assert_allclose(alone[0], crowded[0], atol=1e-6)


@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=6),
    groups=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    width=st.sampled_from([16, 32, 48, 80]),
    causal=st.booleans(),
)
def test_packed_attention_equals_the_definition(
    lengths: list[int], groups: tuple[int, int], width: int, causal: bool
) -> None:
    total, (heads, held) = sum(lengths), groups
    q, k, v = (drawn(1, total, n, width, seed=i) for i, n in enumerate((heads, held, held)))
    spans, at = [], 0
    for length in lengths:
        spans.append((at, at + length))
        at += length
    found = packed_attention(q, k, v, spans, causal=causal)
    for start, stop in spans:
        if stop > start:
            steps = torch.arange(stop - start)
            seen = (steps[None] <= steps[:, None])[None] if causal else None
            rows = (t[:, start:stop].double() for t in (q, k, v))
            wanted, _ = attention_reference(*rows, scale=width**-0.5, seen=seen)
            torch.testing.assert_close(found[:, start:stop].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(native.level() != "avx512-vnni", reason="the attention kernel needs AVX-512")
@pytest.mark.skipif(native.level() != "avx512-vnni", reason="the attention kernel needs AVX-512")
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(sum),
    groups=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    causal=st.booleans(),
    normed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_whole_attention_sublayer_is_its_steps(
    lengths: list[int], groups: tuple[int, int], causal: bool, normed: bool, seed: int
) -> None:
    width, rows = 16, sum(lengths)
    edges = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    spans = list(itertools.pairwise(edges))
    sizes = [groups[0] * width, groups[1] * width, groups[1] * width]
    terms = [Term(laid_out(size, 40, seed + i)[0], drawn(size, seed=i)) for i, size in enumerate(sizes)]
    out = Term(laid_out(40, sizes[0], seed)[0], drawn(40, seed=9))
    x, gain, shift = drawn(rows, 40, seed=seed), drawn(40, seed=2), drawn(40, seed=3)
    tail = Tail(x, gain if normed else None, shift if normed else None, 1e-5)
    q, k, v = (y.view(1, rows, -1, width) for y in linear(x, terms))
    mixed = packed_attention_native(q, k, v, spans, 0.3, causal)
    assert mixed is not None
    wanted = linear(mixed.reshape(rows, -1), [out], tail)[0]
    norm = Norm(gain, shift, 1e-5) if normed else None
    attends = Step(None, [*terms, out], norm, heads=Heads(width, 0.3, causal))
    assert torch.equal(Step.run((attends,), x, spans), wanted)
    # Together with others, whatever comes first and wherever the norms are, they do what they do one by one.
    less = [Term(laid_out(width, 40, seed + i)[0]) for i in range(3)]
    fewer = Step(None, [*less, Term(laid_out(40, width, seed)[0])], norm, heads=Heads(width, 0.3, causal))
    up, down = Term(laid_out(90, 40, seed)[0], drawn(90)), Term(laid_out(40, 90, seed)[0], drawn(40))
    thinks = Step(None, [up, down], norm, activation="gelu")
    ahead = Step(None, [up, down], Norm(gain, shift, 1e-5, True), activation="relu")
    looks = Step(None, [*terms, out], Norm(gain, None, 1e-5, True), heads=Heads(width, 0.3, causal))
    kinds = [attends, thinks, ahead, looks, fewer]
    chain = [kinds[i] for i in torch.randint(0, 5, (6,), generator=torch.Generator().manual_seed(seed)).tolist()]
    wanted = x
    for step in chain:
        wanted = Step.run((step,), wanted, spans)
    assert torch.equal(Step.run(chain, x, spans), wanted)


def test_a_step_takes_any_leading_axes(level: str) -> None:
    x = drawn(3, 5, 24)
    up, down = Term(laid_out(90, 24)[0], drawn(90)), Term(laid_out(24, 90)[0], drawn(24))
    wanted = mlp(x.view(15, 24), up, down, "gelu", joins=True)
    assert torch.equal(mlp(x, up, down, "gelu", joins=True), wanted.view(3, 5, 24))
