"""Attention by runs of keys: every form equals the written-out mask, forwards and backwards, at every shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from formwright.ops.attention import attention_reference
from formwright.ops.window_attention import (
    Spans,
    causally,
    chunked,
    joined,
    leading,
    listed,
    merged,
    sliding,
    spans,
    window_attention,
    window_attention_blocked,
    window_attention_reference,
)


def tensors(batch: int, seen: Spans, heads: int, groups: int, head: int, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, seen.length, heads, head), *[(batch, seen.total, groups, head)] * 2)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def table(length: int, block: int, heads: int, seed: int) -> tuple:
    generator = np.random.default_rng(seed)
    blocks = -(-length // block)
    return tuple(
        tuple(tuple(int(b) for b in generator.integers(-1, max(blocks, 1), 2)) for _ in range(blocks))
        for _ in range(heads)
    )


def patterns(length: int, seed: int = 0) -> dict[str, Spans]:
    """One of each kind, and their unions."""
    return {
        "window": sliding(length, 7, 3),
        "causal window": sliding(length, 30, 0),
        "earlier than the last two": sliding(length, length, -2),
        "blocks": chunked(length, 10, 1, 1),
        "causal blocks": chunked(length, 40, 1, 0, True),
        "window and global": joined(sliding(length, 5, 5), leading(length, 3)),
        "causal window and global": causally(joined(sliding(length, 5, 5), leading(length, 3))),
        "listed": joined(chunked(length, 20), listed(length, 20, table(length, 20, 1, seed))),
        "listed by head": joined(sliding(length, 9, 0), listed(length, 8, table(length, 8, 4, seed))),
        "nothing": sliding(length, -1, -1),
    }


NAMES = list(patterns(1))


def gradients(results: tuple[Tensor, Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Of the output and of the finite log sums, weighed at random."""
    out, logs = results
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (out, logs))
    logs = torch.where(torch.isfinite(logs), logs, 0.0)
    loss = sum((t.double() * w).sum() for t, w in zip((out, logs), weights))
    return [t.double() for t in torch.autograd.grad(loss, inputs, retain_graph=True)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [0, 1, 2, 63, 150])
def test_blocked_equals_the_definition(name: str, length: int) -> None:
    seen = patterns(length)[name]
    inputs = tensors(2, seen, 4, 2, 4)
    valid = torch.arange(length)[None] < torch.tensor([length, length // 3])[:, None]
    for shown in (None, valid):
        found, wanted = (
            window_attention(*inputs, seen, valid=shown),
            window_attention_reference(*inputs, seen, valid=shown),
        )
        for mine, theirs in zip(found, wanted):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
        if length:
            for mine, theirs in zip(gradients(found, inputs), gradients(wanted, inputs)):
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("length", "head"), [(1, 16), (50, 4), (150, 16), (131, 24), (97, 80)])
def test_compiled_equals_the_definition(level: str, name: str, length: int, head: int) -> None:
    seen = patterns(length)[name]
    inputs = tensors(2, seen, 4, 2, head, torch.float32)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    valid = torch.arange(length)[None] < torch.tensor([length, length // 3])[:, None]
    for shown in (None, valid):
        found = window_attention(*inputs, seen, valid=shown)
        wanted = window_attention_reference(*exact, seen, valid=shown)
        for mine, theirs in zip((*found, *gradients(found, inputs)), (*wanted, *gradients(wanted, exact))):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=2e-5)


def test_masks_are_what_their_names_say() -> None:
    i, j = np.arange(23)[:, None], np.arange(23)[None]
    near = (j >= i - 4) & (j <= i + 2)
    own = (j // 5 == i // 5) | (j // 5 == i // 5 - 1)
    first = (j < 2) | (i < 2)
    assert np.array_equal(sliding(23, 4, 2).mask()[0], near)
    assert np.array_equal(chunked(23, 5, 1, causal=True).mask()[0], own & (j <= i))
    assert np.array_equal(joined(sliding(23, 4, 2), leading(23, 2)).mask()[0], near | first)
    named = listed(23, 10, (((2, -1), (0, 2), (1, 1)),))
    expected = ((i // 10 == 0) & (j // 10 == 2)) | ((i // 10 == 1) & (j // 10 != 1)) | ((i // 10 == 2) & (j // 10 == 1))
    assert np.array_equal(named.mask()[0], expected)


@given(
    length=st.integers(1, 90),
    total=st.integers(1, 90),
    runs=st.integers(1, 4),
    seed=st.integers(0, 999),
    head=st.sampled_from([3, 16]),
)
def test_any_runs_of_any_keys(length: int, total: int, runs: int, seed: int, head: int) -> None:
    """Runs that overlap, turn back, lie outside or are empty; keys that are another sequence."""
    drawn = np.random.default_rng(seed)
    low, high = (drawn.integers(-9, total + 9, (2, length, runs)) for _ in range(2))
    seen = spans(low, high, total)
    keys = np.arange(total)[None, None, :, None]
    assert np.array_equal(seen.mask(), ((keys >= low[:, :, None]) & (keys < high[:, :, None])).any(-1))
    assert int((seen.high - seen.low).sum()) == int(seen.mask().sum())
    inputs = tensors(1, seen, 2, 1, head, torch.float32)
    wanted = window_attention_reference(*(t.double() for t in inputs), seen)
    for found in (window_attention(*inputs, seen), window_attention_blocked(*inputs, seen, head**-0.5, None)):
        torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-4, atol=1e-5)


def test_the_definition_is_that_of_attention() -> None:
    seen = patterns(40)["window and global"]
    q, k, v = tensors(2, seen, 4, 2, 4)
    wanted, _ = attention_reference(q, k, v, seen=torch.from_numpy(seen.mask()))
    torch.testing.assert_close(window_attention_reference(q, k, v, seen)[0], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_of_derivatives(dtype: torch.dtype) -> None:
    """The kernel's first derivatives, differentiated, are those of the definition."""
    seen = joined(sliding(9, 2, 1), leading(9, 1))
    found = []
    for form in (window_attention, window_attention_reference):
        inputs = tensors(1, seen, 2, 1, 3, dtype)
        first = torch.autograd.grad(form(*inputs, seen)[0].square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_worked_in_single(dtype: torch.dtype) -> None:
    seen = patterns(40)["causal window"]
    inputs = tensors(2, seen, 2, 2, 16, dtype)
    out, logs = window_attention(*inputs, seen)
    assert out.dtype == dtype and logs.dtype == torch.float32
    wanted, _ = window_attention_reference(*(t.double() for t in inputs), seen)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-2, atol=1e-2)


def test_extreme_scores_and_what_is_not_a_number(level: str) -> None:
    seen = patterns(80)["window and global"]
    q, k, v = (t.detach() for t in tensors(1, seen, 2, 2, 16, torch.float32))
    for by in (1e4, 0.0, 1e-30):
        out, logs = window_attention(q * by, k, v, seen)
        wanted, _ = window_attention_reference(q.double() * by, k.double(), v.double(), seen)
        assert torch.isfinite(out).all() and torch.isfinite(logs).all()
        torch.testing.assert_close(out.double(), wanted, rtol=1e-3, atol=1e-3)
    q[0, 30] = torch.nan
    out, _ = window_attention(q, k, v, seen)
    assert torch.isnan(out[0, 30]).all() and torch.isfinite(out[0, :30]).all() and torch.isfinite(out[0, 31:]).all()


def test_parts_of_the_keys_merge_in_any_order() -> None:
    """A row that sees nothing in one part, in several or in all of them stays defined, with its gradients."""
    everyone = sliding(30, 30, -1)
    q, k, v = tensors(2, everyone, 2, 1, 4)
    places = np.arange(30)[:, None]
    parts = [
        window_attention(q, k, v, spans(np.full((30, 1), a), np.minimum(places, b), 30))
        for a, b in ((0, 7), (7, 8), (8, 30))
    ]
    wanted = window_attention(q, k, v, everyone)
    left = merged(merged(parts[0], parts[1]), parts[2])
    right = merged(parts[2], merged(parts[1], parts[0]))
    for found in (left, right):
        for mine, theirs in zip((*found, *gradients(found, [q, k, v])), (*wanted, *gradients(wanted, [q, k, v]))):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_lengths_that_do_not_fit_are_refused() -> None:
    q, k, v = tensors(1, sliding(5, 1, 1), 2, 2, 4)
    with pytest.raises(ValueError, match="the runs are for 6 queries"):
        window_attention(q, k, v, sliding(6, 1, 1))
