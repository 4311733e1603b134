"""A product that skips zeros is the product, on every instruction set; NaN arrives and tolerance is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formwright.ops import native
from formwright.ops.active_product import active_product, active_product_reference
from formwright.ops.active_product.native import active_product_native

built = pytest.mark.skipif(native.level() is None, reason="the compiled ops are not built")


@built
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 8),
    inner=st.integers(1, 70),
    outer=st.integers(1, 450),
    bias=st.booleans(),
    share=st.sampled_from([0.0, 0.1, 1.0]),
    tolerance=st.sampled_from([0.0, 0.5]),
    level=st.sampled_from([0, 1, 2]),
)
def test_native_is_the_definition(tokens, inner, outer, bias, share, tolerance, level):
    gen = torch.Generator().manual_seed(tokens * inner + outer)
    h = torch.randn(tokens, inner, generator=gen)
    h = torch.where(torch.rand(h.shape, generator=gen) < share, h, 0.0)
    weight, shift = torch.randn(inner, outer, generator=gen), torch.randn(outer, generator=gen) if bias else None
    native.level(level)
    try:
        found = active_product_native(h, weight, shift, tolerance)
    finally:
        native.level(2)
    assert found is not None
    wanted = active_product_reference(h.double(), weight.double(), None if shift is None else shift.double(), tolerance)
    assert torch.allclose(found.double(), wanted, atol=1e-4, rtol=1e-5)


@built
def test_nan_arrives_and_silent_columns_are_not_read():
    h = torch.tensor([[0.0, 1.0, 0.0]])
    weight = torch.full((3, 20), float("nan"))
    weight[1] = 2.0
    assert torch.equal(active_product(h, weight), torch.full((1, 20), 2.0))
    h[0, 0] = float("nan")
    assert active_product(h, weight).isnan().all()


def test_many_tokens_and_gradients_take_the_definition():
    h, weight = torch.randn(9, 5), torch.randn(5, 4, requires_grad=True)
    assert active_product_native(h, weight.detach(), None, 0.0) is None
    assert torch.autograd.gradcheck(
        lambda a, b: active_product(a, b, tolerance=0.1), (h.double().requires_grad_(), weight.double())
    )
