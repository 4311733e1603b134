"""Attention over listed keys: the gathered form is the written-out mask, forwards and backwards, at every shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formwright.ops.attention import attention_reference
from formwright.ops.sparse_attention import gathered, narrow, sparse_attention, sparse_attention_reference


def drawn(batch, length, keys, heads, groups, listed, seed=0, width=4, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, length, heads, width, generator=gen, dtype=torch.float64).to(dtype).requires_grad_()
    k, v = (
        torch.randn(batch, keys, groups, width, generator=gen, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in range(2)
    )
    order = torch.rand(batch, heads, length, keys, generator=gen).argsort(-1)[..., :listed]
    hidden = torch.rand(order.shape, generator=gen) < 0.3
    return q, k, v, order.masked_fill(hidden, -1)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 2),
    length=st.integers(0, 9),
    keys=st.integers(1, 9),
    groups=st.sampled_from([1, 2, 4]),
    listed=st.integers(0, 5),
    numbers=st.sampled_from([1, 200, 1 << 21]),
    seed=st.integers(0, 10),
)
def test_values_and_gradients(batch, length, keys, groups, listed, numbers, seed):
    q, k, v, index = drawn(batch, length, keys, 4, groups, min(listed, keys), seed)
    kept, gathered.NUMBERS = gathered.NUMBERS, numbers
    try:
        mine = sparse_attention(q, k, v, index)
        wanted = sparse_attention_reference(q, k, v, index, 4**-0.5)
        assert torch.allclose(mine, wanted, atol=1e-12)
        weights = torch.randn(mine.shape, dtype=torch.float64)
        for one, other in zip(
            torch.autograd.grad(mine, (q, k, v), weights), torch.autograd.grad(wanted, (q, k, v), weights)
        ):
            assert torch.allclose(one, other, atol=1e-11)
    finally:
        gathered.NUMBERS = kept


def test_first_and_second_derivatives():
    q, k, v, index = drawn(1, 3, 4, 2, 1, 2, width=2)
    assert torch.autograd.gradcheck(lambda *t: sparse_attention(*t, index), (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *t: sparse_attention(*t, index), (q, k, v))


def test_all_keys_listed_is_dense_attention():
    q, k, v, _ = drawn(2, 6, 6, 4, 2, 6)
    index = torch.arange(6).expand(2, 4, 6, 6)
    dense, _ = attention_reference(q, k, v)
    assert torch.allclose(sparse_attention(q, k, v, index), dense, atol=1e-12)


def test_what_is_kept_for_the_backward_pass():
    """Lists of two bytes a key and one log sum a row beside q, k, v and the output."""
    q, k, v, index = drawn(1, 64, 64, 2, 2, 8, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sparse_attention(q, k, v, index)
    seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert sum(seen.values()) == 4 * q.numel() * 4 + index.numel() * 2 + 2 * 64 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    q, k, v, index = drawn(1, 5, 5, 2, 1, 3, dtype=dtype)
    mine = sparse_attention(q, k, v, index)
    assert mine.dtype == dtype
    wanted = sparse_attention(q.float(), k.float(), v.float(), index)
    assert torch.equal(mine, wanted.to(dtype))


def test_narrow():
    assert narrow(torch.tensor([3]), 1 << 15).dtype == torch.int16
    assert narrow(torch.tensor([3]), (1 << 15) + 1).dtype == torch.int32
