"""The state-space dual: recurrence, masked attention and chunks say the same, forward and backward."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from formwright.kit.errors import SpecError
from formwright.ops.ssd import _Ssd, ssd, ssd_quadratic, ssd_reference
from formwright.ops.ssd.chunked import Chunked

FORMS = {"recurrence": ssd_reference, "masked attention": ssd_quadratic}


def draw(
    rows: int, length: int, heads: int, groups: int, width: int = 3, size: int = 5, seed: int = 0, dtype=torch.float64
) -> tuple[list[Tensor], Tensor]:
    """x, Δ, A, B, C, D and the start, all with gradient, and where documents begin."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [normal(rows, length, heads, width), 2 * uniform(rows, length, heads), -3 * uniform(heads)]
    tensors += [normal(rows, length, groups, size), normal(rows, length, groups, size), normal(heads)]
    tensors.append(normal(rows, heads, width, size))
    return [t.requires_grad_() for t in tensors], torch.rand(rows, length, generator=generator) < 0.15


def outcome(form, tensors: list[Tensor], resets: Tensor | None, create_graph: bool = False, **how) -> list[Tensor]:
    """y, the final state, and the gradient of every input under fixed weights."""
    *given_, start = tensors
    y, final = form(*given_, start=start, resets=resets, **how)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (y, final)]
    loss = (y * weights[0]).sum() + (final * weights[1]).sum()
    grads = torch.autograd.grad(loss, tensors, create_graph=create_graph, allow_unused=True)
    return [y, final, *(torch.zeros_like(t) if g is None else g for t, g in zip(tensors, grads))]


def alike(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for mine, theirs in zip(found, wanted):
        scale = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * (1 + scale))


@given(
    rows=st.integers(0, 3),
    length=st.sampled_from([0, 1, 2, 7, 16, 33]),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]),
    chunk=st.sampled_from([1, 4, 16, 64]),
    resets=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_equals_the_definitions(rows, length, heads, chunk, resets, seed) -> None:
    tensors, begins = draw(rows, length, *heads, seed=seed)
    begins = begins if resets else None
    wanted = outcome(ssd_reference, tensors, begins)
    alike(outcome(ssd_quadratic, tensors, begins), wanted, 1e-10)
    alike(outcome(ssd, tensors, begins, chunk=chunk), wanted, 1e-10)
    alike(outcome(ssd, tensors, begins, create_graph=True, chunk=chunk), wanted, 1e-10)


def exactly(tensors: list[Tensor], resets: Tensor | None) -> list[Tensor]:
    """The recurrence in double precision, rounded."""
    exact = [t.detach().double().requires_grad_() for t in tensors]
    return [t.float() for t in outcome(ssd_reference, exact, resets)]


@pytest.mark.parametrize("chunk", [16, 64, 256])
@pytest.mark.parametrize("groups", [1, 4])
def test_single_precision_by_pytorch(chunk: int, groups: int) -> None:
    def chunked(*given_: Tensor, start: Tensor, resets: Tensor) -> tuple[Tensor, Tensor]:
        return _Ssd.apply(Chunked(chunk), chunk, *given_, start, resets)

    tensors, begins = draw(2, 300, 4, groups, 16, 8, dtype=torch.float32)
    alike(outcome(chunked, tensors, begins), exactly(tensors, begins), 1e-5)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(2, 1, 2, 1, 3, 5), (0, 9, 2, 1, 4, 4), (2, 64, 4, 2, 16, 16), (3, 150, 4, 4, 20, 17), (1, 130, 12, 1, 64, 33)],
)
def test_compiled_equals_the_definition(level: str, shape: tuple[int, ...], resets: bool) -> None:
    tensors, begins = draw(*shape, dtype=torch.float32)
    begins = begins if resets else None
    wanted = exactly(tensors, begins)
    alike(outcome(ssd, tensors, begins), wanted, 3e-6)
    with torch.no_grad():
        alike(list(ssd(*tensors[:6], start=tensors[6], resets=begins)), wanted[:2], 3e-6)


def test_compiled_does_without_what_is_not_given(level: str) -> None:
    """No D, no start, no gradient of y or of the final state; slices of a wider tensor as a model hands them over."""
    wide = torch.randn(2, 70, 4 * 6 + 2 * 2 * 5, generator=torch.Generator().manual_seed(0))
    (_, dt, A, *_), _ = draw(2, 70, 4, 2, dtype=torch.float32)

    def call(wide: Tensor, dt: Tensor, A: Tensor, form=ssd) -> tuple[Tensor, Tensor]:
        x, B, C = wide.split((24, 10, 10), -1)
        return form(x.unflatten(-1, (4, 6)), dt, A, B.unflatten(-1, (2, 5)), C.unflatten(-1, (2, 5)))

    single = [t.detach().requires_grad_() for t in (wide, dt, A)]
    double = [t.detach().double().requires_grad_() for t in single]
    mine, wanted = call(*single), call(*double, form=ssd_reference)
    for which in range(2):
        weight = torch.linspace(-1, 1, mine[which].numel()).reshape(mine[which].shape)
        found = torch.autograd.grad(mine[which], single, weight, retain_graph=True)
        exact = torch.autograd.grad(wanted[which], double, weight.double(), retain_graph=True)
        alike([mine[which], *found], [t.float() for t in (wanted[which], *exact)], 3e-6)
    with FlopCounterMode(display=False) as counted:  # what is counted must be PyTorch's operations
        again = torch.autograd.grad(mine[1], single, weight)
    alike(list(again), list(found), 3e-6)
    assert counted.get_total_flops() > 0


def test_threads_change_nothing() -> None:
    tensors, begins = draw(2, 200, 6, 2, 16, 16, dtype=torch.float32)
    alone = outcome(ssd, tensors, begins)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = outcome(ssd, tensors, begins)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone[1:], together[1:]))


def test_what_is_not_finite_stays_in_its_row_and_head_and_out_of_earlier_chunks(level: str) -> None:
    (x, dt, A, B, C, D, start), _ = draw(2, 140, 2, 1, 8, 8, dtype=torch.float32)
    with torch.no_grad():
        x[0, 70, 1, 3] = float("nan")
        A[1] = 1.0
        dt[:, :, 1] *= 1e-3
        dt[1, 130, 1] = 100.0  # exp(100) overflows
        y, final = ssd(x, dt, A, B, C, D, start=start)
    assert torch.isfinite(y[:, :, 0]).all() and torch.isfinite(y[:, :64]).all() and torch.isfinite(y[1, :128]).all()
    assert torch.isfinite(final[:, 0]).all() and torch.isfinite(y[0, :, 1, :3]).all()
    assert torch.isnan(y[0, 70:, 1, 3]).all() and torch.isnan(final[0, 1, 3]).all()
    assert not torch.isfinite(y[1, 130:, 1]).any() and not torch.isfinite(final[1, 1]).any()


def test_a_stream_of_calls_is_one_call() -> None:
    """Gradients flow through the states between the calls; a token with Δ = 0 is passed over."""
    (x, dt, A, B, C, D, start), _ = draw(2, 20, 4, 2)
    dt = dt * (torch.arange(20) % 5 != 3)[None, :, None]
    whole, final = ssd(x, dt, A, B, C, D, start=start, chunk=8)
    state, pieces = start, []
    for first, last in ((0, 1), (1, 9), (9, 9), (9, 20)):
        now = slice(first, last)
        y, state = ssd(x[:, now], dt[:, now], A, B[:, now], C[:, now], D, start=state, chunk=8)
        pieces.append(y)
    alike([torch.cat(pieces, 1), state], [whole, final], 1e-12)
    inputs = (x, A, B, C, D, start)
    mine = torch.autograd.grad(torch.cat(pieces, 1).square().sum() + state.sum(), inputs)
    alike(list(mine), list(torch.autograd.grad(whole.square().sum() + final.sum(), inputs)), 1e-11)


def test_documents_end_to_end_are_alone() -> None:
    (x, dt, A, B, C, D, _), _ = draw(1, 23, 2, 1)
    borders = [0, 5, 6, 19, 23]
    begins = torch.zeros(1, 23, dtype=torch.bool)
    begins[0, borders[:-1]] = True
    y, final = ssd(x, dt, A, B, C, D, resets=begins, chunk=8)
    for first, last in pairwise(borders):
        now = slice(first, last)
        alone, end = ssd(x[:, now], dt[:, now], A, B[:, now], C[:, now], D)
        alike([y[:, now]], [alone], 1e-12)
    alike([final], [end], 1e-12)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("form", [ssd, ssd_reference])
def test_what_is_not_finite_stays_in_its_document(form, dtype: torch.dtype, twice: bool, level: str) -> None:
    """Documents shorter than a chunk and of several; outputs, the last state, and gradients of what tokens bring."""
    tensors, _ = draw(1, 110, 2, 1, dtype=dtype)
    begins = torch.zeros(1, 110, dtype=torch.bool)
    begins[0, [5, 9, 80, 84]] = True  # what is before the first begins with the given state
    broken = [t.detach().clone().requires_grad_() for t in tensors]
    with torch.no_grad():
        for tokens in (broken[0], broken[1], broken[3], broken[4]):
            tokens[:, 9:80] = float("nan")
    clean, found = (outcome(form, held, begins, create_graph=twice) for held in (tensors, broken))
    for index in (0, 2, 3, 5, 6):  # y, and the gradients of x, Δ, B and C
        for inside in (slice(0, 9), slice(80, 110)):
            torch.testing.assert_close(found[index][:, inside], clean[index][:, inside])
        assert torch.isnan(found[index][:, 9:80]).any()
    for index in (1, 8):  # the last state, and the gradient of the start
        torch.testing.assert_close(found[index], clean[index])


def test_strong_decay_and_long_memory_stay_finite(level: str) -> None:
    """Decays from 1 to exp(-20000) in one chunk, where differences of running sums would cancel."""
    (x, _, A, B, C, D, start), _ = draw(1, 200, 2, 1, dtype=torch.float32)
    dt = torch.where(torch.arange(200) % 50 == 7, 1e4, 1e-4)[None, :, None].expand(1, 200, 2).requires_grad_()
    tensors = [x, dt, A, B, C, D, start]
    found = outcome(ssd, tensors, None)
    assert all(bool(torch.isfinite(t).all()) for t in found)
    alike(found, exactly(tensors, None), 1e-5)


def test_half_precision_is_computed_in_single() -> None:
    tensors, _ = draw(2, 40, 4, 2)
    for dtype in (torch.bfloat16, torch.float16):
        low = [t.detach().to(dtype) for t in tensors]
        y, final = ssd(*low[:6], start=low[6])
        wanted, end = ssd(*(t.float() for t in low[:6]), start=low[6].float())
        assert y.dtype == dtype and final.dtype == torch.float32
        assert torch.equal(y, wanted.to(dtype)) and torch.equal(final, end)


def test_second_derivatives() -> None:
    tensors, begins = draw(1, 5, 2, 1, 2, 2)

    def call(*given_: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(*given_[:6], start=given_[6], resets=begins, chunk=2)

    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


def test_transforms_and_meta() -> None:
    (x, dt, A, B, C, D, _), _ = draw(2, 9, 2, 1)
    per_row = torch.func.vmap(lambda x, dt, B, C: ssd(x[None], dt[None], A, B[None], C[None], D)[0][0])
    torch.testing.assert_close(per_row(x, dt, B, C), ssd(x, dt, A, B, C, D)[0])
    meta = [t.detach().to("meta") for t in (x, dt, A, B, C, D)]
    assert ssd(*meta)[0].shape == x.shape


def test_groups_that_do_not_divide_are_refused() -> None:
    (x, dt, A, B, C, D, _), _ = draw(1, 4, 4, 3)
    with pytest.raises(SpecError, match="must divide 4 heads"):
        ssd(x, dt, A, B, C, D)
