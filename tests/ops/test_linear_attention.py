"""Linear attention: every form is the token-by-token definition, with all its gradients, at every shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from formwright.ops.linear_attention import (
    causal_product,
    linear_attention,
    linear_attention_macs,
    linear_attention_reference,
    product,
)
from formwright.ops.linear_attention.product import chunked


def mapped(rows: int, length: int, heads: int, inner: int, outer: int, seed: int = 0) -> list[Tensor]:
    """q and k not negative, v, and a state."""
    made = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made, dtype=torch.float64)

    sizes = (rows, length, heads)
    return [
        draw(*sizes, inner).square(),
        draw(*sizes, inner).square(),
        draw(*sizes, outer),
        draw(rows, heads, inner, outer + 1).square(),
    ]


def grads(out: tuple[Tensor, Tensor], tensors: list[Tensor], seed: int = 3) -> tuple[Tensor, ...]:
    """Gradients of a random sum of the outputs and the last state."""
    made = torch.Generator().manual_seed(seed)
    total = sum((t * torch.randn(t.shape, generator=made, dtype=torch.float64).to(t.dtype)).sum() for t in out)
    return torch.autograd.grad(total, tensors)


def close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float) -> None:
    for mine, theirs in zip(found, wanted):
        scale = max(1.0, float(theirs.detach().abs().max())) if theirs.numel() else 1.0
        torch.testing.assert_close(mine.double() / scale, theirs.double() / scale, rtol=tolerance, atol=tolerance)


@settings(max_examples=40)
@given(
    rows=st.integers(0, 3),
    length=st.integers(0, 11),
    heads=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    causal=st.booleans(),
    started=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_definition(rows, length, heads, widths, causal, started, seed) -> None:
    """Chunks of four tokens, so that lengths are empty, short, full and ragged."""
    tensors = [t.requires_grad_() for t in mapped(rows, length, heads, *widths, seed=seed)]
    q, k, v, state = tensors
    state, tensors = (state, tensors) if started else (None, tensors[:3])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(product, "CHUNK", 4)
        found = linear_attention(q, k, v, causal=causal, state=state)
        wanted = linear_attention_reference(q, k, v, causal=causal, state=state)
        close(found, wanted, 1e-11)
        if rows and length:
            close(grads(found, tensors), grads(wanted, tensors), 1e-9)


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(0, 9), max_size=5), causal=st.booleans(), started=st.booleans())
def test_documents_end_to_end(lengths: list[int], causal: bool, started: bool) -> None:
    borders = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    q, k, v, _ = mapped(1, borders[-1], 2, 3, 4)
    state = mapped(len(lengths), 0, 2, 3, 4, seed=5)[3] if started else None
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        given_state = None if state is None else state.to(dtype)
        found = linear_attention(*(t.to(dtype) for t in (q, k, v)), causal=causal, state=given_state, borders=borders)
        assert found[0].shape == v.shape and found[1].shape == (len(lengths), 2, 3, 5)
        if lengths:
            wanted = linear_attention_reference(q, k, v, causal=causal, state=state, borders=borders)
            close(found, wanted, tolerance)


@pytest.mark.parametrize("shape", [(2, 1, 1, 1, 1), (1, 64, 2, 16, 15), (2, 131, 3, 21, 33), (1, 70, 1, 7, 80)])
@pytest.mark.parametrize("reverse", [False, True])
def test_compiled_form(level: str, shape: tuple[int, ...], reverse: bool) -> None:
    """Values and gradients of every instruction set against the PyTorch form in double precision."""
    a, b, c, start = (t.sub(0.5) for t in mapped(*shape))
    start = start[..., :-1]
    exact = [t.clone().requires_grad_() for t in (a, b, c, start)]
    wanted = chunked(*exact, reverse=reverse)
    single = [t.float().requires_grad_() for t in (a, b, c, start)]
    found = causal_product(*single, reverse=reverse)
    close(found, wanted, 1e-5)
    close(grads(found, single), grads(wanted, exact), 1e-5)


def test_compiled_form_reads_strided_tensors_and_documents(level: str) -> None:
    both = torch.randn(3, 40, 2, 24)
    a, b, c = both[..., :8], both[:, :, :, 8:16], both[1:2, :, :, 16:].expand(3, -1, -1, -1)
    close(causal_product(a, b, c), chunked(*(t.double() for t in (a, b, c))), 1e-5)
    borders = (0, 0, 7, 7, 39, 40)
    one = [t[:1] for t in (a, b, c)]
    close(causal_product(*one, borders=borders), chunked(*(t.double() for t in one), borders=borders), 1e-5)


def test_derivatives_of_every_order() -> None:
    tensors = [t.requires_grad_() for t in mapped(1, 5, 2, 2, 2)]
    for causal in (True, False):

        def call(q: Tensor, k: Tensor, v: Tensor, state: Tensor, causal: bool = causal) -> tuple[Tensor, Tensor]:
            return linear_attention(q, k, v, causal=causal, state=state)

        assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


def test_only_the_gradients_that_are_asked_for() -> None:
    q, k, v, _ = mapped(2, 6, 1, 3, 3)
    for index in range(3):
        tensors = [q, k, v]
        tensors[index] = tensors[index].clone().requires_grad_()
        out, _ = linear_attention(*tensors)
        assert torch.autograd.grad(out.sum(), tensors[index])[0].shape == tensors[index].shape


def test_two_calls_are_one() -> None:
    q, k, v, state = mapped(2, 9, 2, 3, 4)
    whole = linear_attention(q, k, v, state=state)
    first, middle = linear_attention(q[:, :4], k[:, :4], v[:, :4], state=state)
    second, last = linear_attention(q[:, 4:], k[:, 4:], v[:, 4:], state=middle)
    close((torch.cat((first, second), 1), last), whole, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    """Sums that pass the largest half-precision number."""
    q, k, v, _ = (t.to(dtype) for t in mapped(1, 300, 2, 8, 8))
    out, state = linear_attention(q, k * 1e3, v)
    wanted, _ = linear_attention_reference(q.double(), k.double() * 1e3, v.double())
    assert out.dtype == dtype and state.dtype == torch.float32 and float(state.max()) > 65504
    assert float((out.double() - wanted).norm() / wanted.norm()) < 0.01


def test_what_meets_no_key_is_zero() -> None:
    q, k, v, _ = mapped(1, 4, 1, 2, 3)
    k[:, :2] = 0
    out, _ = linear_attention(q, k, v)
    assert not out[:, :2].any() and bool(out[:, 2:].all())


def test_compiled_graphs_and_function_transforms() -> None:
    q, k, v, _ = mapped(3, 6, 2, 3, 3)
    wanted, _ = linear_attention(q, k, v)
    each = torch.func.vmap(lambda q, k, v: linear_attention(q[None], k[None], v[None])[0][0])(q, k, v)
    torch.testing.assert_close(each, wanted)


def test_multiply_accumulates() -> None:
    """With chunks, products grow linearly; a whole chunk more costs the same whatever came before."""
    sizes = [linear_attention_macs(128 * chunks, 16, 8, True) for chunks in (1, 2, 3)]
    assert sizes[1] == 2 * sizes[0] and sizes[2] == 3 * sizes[0]
    assert linear_attention_macs(0, 16, 8, True) == 0
    assert linear_attention_macs(10, 16, 8, False) == 2 * 10 * 16 * 9
