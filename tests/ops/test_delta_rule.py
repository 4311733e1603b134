"""Every form of the delta rule against the recurrence: values, gradients, states, lengths, types, instruction sets."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from formwright.kit.errors import SpecError
from formwright.ops import delta_rule as op
from formwright.ops.delta_rule import delta_rule, delta_rule_map, delta_rule_reference
from formwright.ops.delta_rule.chunked import Chunked, chunkwise


def inputs(rows: int, length: int, heads: int, dk: int, dv: int, seed: int = 0, most: float = 1.0) -> list[Tensor]:
    """q, k, v, beta and a state in float64; keys of norm 1, rates in (0, most)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    beta = most * torch.rand(rows, length, heads, generator=generator, dtype=torch.float64)
    k = F.normalize(normal(rows, length, heads, dk), dim=-1)
    return [normal(rows, length, heads, dk), k, normal(rows, length, heads, dv), beta, normal(rows, heads, dk, dv)]


def with_gradients(run, given: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Outputs, last state, and the gradients of all inputs for one random direction of both."""
    given = [t.detach().requires_grad_() for t in given]
    out, last = run(*given)
    if not out.numel():  # an empty output of the definition stands in no graph
        out = out + 0 * given[2]
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (out, last)]
    grads = torch.autograd.grad([out, last], given, directions, allow_unused=True)
    return [out, last, *(torch.zeros_like(t) if g is None else g for t, g in zip(given, grads))]


def close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("length", [0, 1, 2, 31, 64, 70])
@pytest.mark.parametrize("most", [1.0, 2.0])
def test_chunks_equal_the_recurrence(size: int, length: int, most: float) -> None:
    given_ = inputs(2, length, 3, 8, 5, most=most)
    wanted = with_gradients(lambda *t: delta_rule_reference(*t, scale=0.3), given_)
    close(with_gradients(lambda *t: Chunked.apply(*t, 0.3, size), given_), wanted, 1e-10)
    close(with_gradients(lambda *t: chunkwise(*t, 0.3, size), given_), wanted, 1e-10)


@settings(max_examples=15)
@given(
    rows=st.integers(0, 2),
    length=st.integers(0, 75),
    heads=st.integers(1, 2),
    dk=st.integers(1, 70),
    dv=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_any_shape(rows: int, length: int, heads: int, dk: int, dv: int, seed: int) -> None:
    given_ = inputs(rows, length, heads, dk, dv, seed)
    wanted = with_gradients(delta_rule_reference, given_)
    close(with_gradients(delta_rule, given_), wanted, 1e-9)
    close(with_gradients(delta_rule, [t.float() for t in given_]), wanted, 2e-4)


@pytest.mark.parametrize("shape", [(1, 1, 2, 8, 8), (2, 3, 1, 16, 5), (2, 100, 2, 20, 70), (1, 65, 1, 128, 96)])
def test_compiled_equals_the_recurrence(level: str, shape: tuple[int, ...]) -> None:
    given_ = inputs(*shape)
    single = [t.float() for t in given_]
    assert op.suits(*single)
    close(with_gradients(delta_rule, single), with_gradients(delta_rule_reference, given_), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [(), (0,), (1,), (5, 0, 1, 70, 33), (32, 32), (1, 1, 1)])
def test_documents_end_to_end(level: str, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    borders = [0]
    for length in lengths:
        borders.append(borders[-1] + length)
    given_ = inputs(1, borders[-1], 2, 8, 12)[:4]
    given_.append(torch.randn(len(lengths), 2, 8, 12, dtype=torch.float64))

    def alone(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        found = [
            delta_rule_reference(*(t[:, start:stop] for t in (q, k, v, beta)), state[i : i + 1])
            for i, (start, stop) in enumerate(pairwise(borders))
        ]
        if not found:
            return torch.zeros_like(v), state
        return torch.cat([out for out, _ in found], 1), torch.cat([last for _, last in found])

    def together(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return delta_rule(*tensors, borders=borders)

    if not lengths:
        out, last = together(*(t.to(dtype) for t in given_))
        assert out.shape == (1, 0, 2, 12) and last.shape == (0, 2, 8, 12)
        return
    found = with_gradients(together, [t.to(dtype) for t in given_])
    close(found, with_gradients(alone, given_), 1e-4 if dtype == torch.float32 else 1e-10)


def test_a_stream_goes_on_where_it_stood(level: str) -> None:
    q, k, v, beta, _ = (t.float() for t in inputs(2, 80, 2, 16, 16))
    wanted, last = delta_rule(q, k, v, beta)
    state, found = None, []
    for start, stop in pairwise((0, 1, 2, 40, 40, 79, 80)):
        out, state = delta_rule(*(t[:, start:stop] for t in (q, k, v, beta)), state)
        found.append(out)
    close([torch.cat(found, 1), state], [wanted, last], 1e-5)


def test_the_map_times_the_values_is_the_output() -> None:
    q, k, v, beta, _ = inputs(2, 40, 2, 8, 5)
    out, _ = delta_rule_reference(q, k, v, beta)
    mixed = torch.einsum("bhls,bshd->blhd", delta_rule_map(q, k, beta), v)
    torch.testing.assert_close(mixed, out, rtol=1e-10, atol=1e-10)


def test_equal_keys_at_full_rate_replace_exactly() -> None:
    """The hardest case of the triangular solve: all overlaps are 1. Each value replaces the one before it."""
    k = F.normalize(torch.ones(1, 200, 1, 16), dim=-1)
    v = torch.randn(1, 200, 1, 16, generator=torch.Generator().manual_seed(0))
    for kind in (torch.float32, torch.float64):
        out, _ = delta_rule(*(t.to(kind) for t in (k, k, v, torch.ones(1, 200, 1))), scale=1.0)
        torch.testing.assert_close(out, v.to(kind), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 5])
def test_second_derivatives(length: int) -> None:
    given_ = [t.requires_grad_() for t in inputs(1, length, 2, 3, 2)]
    assert torch.autograd.gradcheck(delta_rule, given_)
    assert torch.autograd.gradgradcheck(delta_rule, given_, fast_mode=True)


def test_second_derivatives_of_the_compiled_form() -> None:
    """A penalty on the gradient, whole and of packed documents, gives what float64 gives."""

    def penalty(dtype: torch.dtype, borders: list[int] | None) -> list[Tensor]:
        q, k, v, beta, _ = (t.to(dtype).requires_grad_() for t in inputs(1, 9, 2, 4, 3))
        out, _ = delta_rule(q, k, v, beta, borders=borders)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v, beta), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v, beta)))

    for borders in (None, [0, 4, 9]):
        close(penalty(torch.float32, borders), penalty(torch.float64, borders), 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    q, k, v, beta, _ = (t.to(dtype) for t in inputs(1, 40, 2, 8, 8))
    out, last = delta_rule(q, k, v, beta)
    wanted, state = delta_rule_reference(*(t.double() for t in (q, k, v, beta)))
    assert out.dtype == dtype and last.dtype == torch.float32
    close([out], [wanted], 0.02)
    close([last], [state], 1e-4)


def test_strides_and_vmap_and_meta() -> None:
    q, k, v, beta, state = (t.float() for t in inputs(2, 20, 2, 8, 8))
    out, last = delta_rule(q, k, v, beta, state)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, beta)]
    close(list(delta_rule(*turned, state)), [out, last], 1e-6)
    mapped = torch.func.vmap(lambda *t: delta_rule(*(x[None] for x in t)))(q, k, v, beta, state)
    close([t[:, 0] for t in mapped], [out, last], 1e-5)
    laid = delta_rule(*(t.to("meta") for t in (q, k, v, beta)))
    assert laid[0].shape == out.shape and laid[1].shape == last.shape


def test_nan_stays_in_its_row_and_head_and_out_of_earlier_chunks(level: str) -> None:
    q, k, v, beta, _ = (t.float() for t in inputs(2, 80, 2, 8, 8))
    v[0, 70, 1, 3] = float("nan")
    out, _ = delta_rule(q, k, v, beta)
    assert torch.isfinite(out[1]).all() and torch.isfinite(out[:, :, 0]).all() and torch.isfinite(out[0, :64]).all()
    assert torch.isnan(out[0, 70:, 1, 3]).all()


def test_what_is_wrong_is_said() -> None:
    q, k, v, beta, state = inputs(2, 4, 2, 8, 6)
    with pytest.raises(SpecError, match=r"given q .*beta \(2, 4\)"):
        delta_rule(q, k, v, beta[..., 0])
    with pytest.raises(SpecError, match=r"state must be \(2, 2, 8, 6\)"):
        delta_rule(q, k, v, beta, state.mT)
    with pytest.raises(SpecError, match="borders run from 0 to T=4"):
        delta_rule(*(t[:1] for t in (q, k, v, beta)), borders=(0, 3))
