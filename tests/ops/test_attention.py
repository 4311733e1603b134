"""Softmax attention: the fast form equals the definition in double precision, forward and backward, at every shape."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from formwright.ops import attention as op
from formwright.ops.attention import attention, attention_reference, blocks, packed_attention


def tensors(batch: int, length: int, total: int, heads: int, groups: int, head: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, length, heads, head), (batch, total, groups, head), (batch, total, groups, head))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def rule(length: int, total: int, causal: bool, window: int | None) -> Tensor:
    q, k = torch.arange(length)[:, None], torch.arange(total)[None]
    seen = k <= q if causal else torch.ones(length, total, dtype=torch.bool)
    if window is not None:
        seen = seen & (k > q - window) & (k < q + window)
    return seen[None]


def as_function(full: Tensor):
    """A written-out mask or bias (B, L, S) or (B, H, L, S), asked for block by block."""
    return lambda rows, columns: full[..., rows, columns]


@given(
    batch=st.integers(0, 3),
    length=st.integers(0, 9),
    total=st.integers(0, 9),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    causal=st.booleans(),
    masked=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_definition(batch, length, total, heads, causal, masked, biased, seed) -> None:
    q, k, v = tensors(batch, length, total, *heads, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    seen = rule(length, total, causal, None).expand(batch, -1, -1)
    mask = bias = None
    if masked:
        # Includes rows that see nothing.
        seen = seen & (torch.rand(batch, length, total, generator=generator) < 0.4)
        mask = as_function(seen)
    if biased:
        added = torch.randn(1, heads[0], length, total, generator=generator, dtype=torch.float64)
        bias = as_function(added)
    tracked = [t.requires_grad_() for t in (q, k, v)]
    out = attention(q, k, v, causal=causal, mask=mask, bias=bias)
    wanted, _ = attention_reference(q, k, v, seen=seen, bias=added if biased else None)
    if total == 0:
        wanted = torch.zeros_like(out)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    if out.numel() and total:
        weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        for mine, theirs in zip(*(torch.autograd.grad((y * weights).sum(), tracked) for y in (out, wanted))):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_one_causal_query_stands_at_the_first_key() -> None:
    q, k, v = tensors(2, 1, 5, 2, 1)
    torch.testing.assert_close(attention(q, k, v, causal=True), v[:, :1].expand(-1, -1, 2, -1))


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    q, k, v = tensors(2, 3, 4, 2, 2)
    none = torch.zeros(2, 3, 4, dtype=torch.bool)
    assert not attention(q, k, v, mask=as_function(none)).any()
    zero = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
    assert not attention(q, k, v, mask=as_function(none), bias=as_function(zero)).any()
    out, probs = attention_reference(q, k, v, seen=none)
    assert not out.any() and not probs.any()
    assert not attention(q, k[:, :0], v[:, :0]).any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 3, 8, 40, None])
@pytest.mark.parametrize("biased", [True, False])
def test_windows_across_the_borders_of_blocks(causal: bool, window: int | None, biased: bool, monkeypatch) -> None:
    monkeypatch.setattr(op, "CHUNK", 8)
    length = 37
    q, k, v = tensors(2, length, length, 4, 2)
    seen = rule(length, length, causal, window)
    added = torch.randn(1, 4, length, length, dtype=torch.float64)
    out = attention(
        q, k, v, causal=causal, window=window, mask=as_function(seen), bias=as_function(added) if biased else None
    )
    wanted, _ = attention_reference(q, k, v, seen=seen, bias=added if biased else None)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)


@given(length=st.integers(0, 3000), window=st.none() | st.integers(1, 700), causal=st.booleans())
def test_blocks_cover_every_query_once_and_all_it_may_see(length: int, window: int | None, causal: bool) -> None:
    found = list(blocks(length, length, window, causal))
    assert [place for rows, _ in found for place in range(rows.start, rows.stop)] == list(range(length))
    for rows, columns in found:
        first = 0 if window is None else max(0, rows.start - window + 1)
        last = rows.stop - 1 if causal else (length if window is None else min(length, rows.stop - 1 + window)) - 1
        assert columns.start <= first and columns.stop > last
        assert columns.stop <= length


@given(lengths=st.lists(st.integers(0, 7), max_size=6), causal=st.booleans(), window=st.none() | st.integers(1, 4))
def test_packed_equals_each_document_alone(lengths: list[int], causal: bool, window: int | None) -> None:
    borders = [0]
    for length in lengths:
        borders.append(borders[-1] + length)
    q, k, v = tensors(1, borders[-1], borders[-1], 4, 2)
    spans = list(pairwise(borders))
    longest = max(lengths, default=0)
    seen = rule(longest, longest, causal, window)
    mask = None if window is None else as_function(seen)
    out = packed_attention(q, k, v, spans, causal=causal, mask=mask, window=window)
    assert out.shape == q.shape
    for start, stop in spans:
        length = stop - start
        wanted, _ = attention_reference(
            q[:, start:stop], k[:, start:stop], v[:, start:stop], seen=rule(length, length, causal, window)
        )
        if length:
            torch.testing.assert_close(out[:, start:stop], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [0.0, 0.3, None])
def test_extreme_scores(scale: float | None) -> None:
    """Scores of thousands, equal scores, and one very large key: no NaN, and the definition's values."""
    q, k, v = tensors(1, 5, 6, 2, 2)
    for by in (1e3, 0.0, 1e-300):
        out = attention(q * by, k, v, scale=scale)
        torch.testing.assert_close(out, attention_reference(q * by, k, v, scale=scale)[0], rtol=1e-9, atol=1e-9)
        assert torch.isfinite(out).all()


def test_second_derivatives() -> None:
    """The definition can be differentiated twice; so can the fast form wherever a bias with gradient stands in it."""
    q, k, v = (t.requires_grad_() for t in tensors(1, 3, 4, 2, 1))
    assert torch.autograd.gradcheck(lambda *a: attention_reference(*a)[0], (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *a: attention_reference(*a)[0], (q, k, v))
    added = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def biased(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
        return attention(q, k, v, bias=as_function(added))

    assert torch.autograd.gradcheck(biased, (q, k, v, added), fast_mode=True)
    assert torch.autograd.gradgradcheck(biased, (q, k, v, added), fast_mode=True)


@pytest.mark.parametrize("causal", [True, False])
def test_the_fused_kernel_can_be_differentiated_twice(causal: bool) -> None:
    q, k, v = (t.requires_grad_() for t in tensors(1, 4, 4, 2, 2))
    assert torch.autograd.gradgradcheck(lambda *a: attention(*a, causal=causal), (q, k, v), fast_mode=True)


def test_first_derivatives_free_the_graph_and_may_be_taken_again() -> None:
    q, k, v = (t.requires_grad_() for t in tensors(2, 5, 5, 2, 2))
    out = attention(q, k, v, causal=True).square().sum()
    once = torch.autograd.grad(out, (q, k, v), retain_graph=True)
    again = torch.autograd.grad(out, (q, k, v), retain_graph=True)
    twice = torch.autograd.grad(out, (q, k, v), create_graph=True)
    for a, b, c in zip(once, again, twice):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)
    only_k = attention(q.detach(), k, v.detach()).square().sum()
    assert torch.autograd.grad(only_k, k)[0].shape == k.shape


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    q, k, v = (t.requires_grad_() for t in tensors(2, 5, 5, 2, 2))
    plain = torch.autograd.grad(attention(q, k, v, causal=True).square().sum(), (q, k, v))
    out = checkpoint(lambda q, k, v: attention(q, k, v, causal=True), q, k, v, use_reentrant=reentrant)
    out.square().sum().backward()
    for tensor, wanted in zip((q, k, v), plain):
        torch.testing.assert_close(tensor.grad, wanted, rtol=1e-12, atol=1e-12)


@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5).filter(sum),
    groups=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    width=st.sampled_from([16, 32, 48, 80]),
    causal=st.booleans(),
)
def test_packed_gradients_by_the_kernel_are_the_definition(
    lengths: list[int], groups: tuple[int, int], width: int, causal: bool
) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    total, (heads, held) = sum(lengths), groups
    borders = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    spans = list(pairwise(borders))
    # Keys and values as two halves of one product, so that their rows lie apart.
    q = torch.randn(1, total, heads, width, generator=generator, requires_grad=True)
    both = torch.randn(1, total, 2, held, width, generator=generator, requires_grad=True)
    grad = torch.randn(1, total, heads, width, generator=generator)
    y = packed_attention(q, both[:, :, 0], both[:, :, 1], spans, causal=causal, scale=0.3)
    found = torch.autograd.grad(y, (q, both), grad)
    exact = [t.detach().double().requires_grad_() for t in (q, both)]
    wanted = packed_attention(exact[0], exact[1][:, :, 0], exact[1][:, :, 1], spans, causal=causal, scale=0.3)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    for one, two in zip(found, torch.autograd.grad(wanted, exact, grad.double())):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=2e-5)


def test_second_derivatives_of_packed_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    spans, found = [(0, 5), (5, 6), (6, 9)], []
    tensors = [torch.randn(1, 9, 2, 16, generator=generator) for _ in range(3)]
    for dtype in (torch.float32, torch.float64):
        q, k, v = (t.to(dtype).requires_grad_() for t in tensors)
        y = packed_attention(q, k, v, spans, causal=True)
        (first,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (q, k, v)))
    for one, two in zip(*found):
        torch.testing.assert_close(one.double(), two, rtol=1e-3, atol=1e-3)
