"""Short causal convolution: every form equals the definition, values and gradients, in both layouts and over any split
of a stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.ops.causal_conv import causal_conv, causal_conv_reference


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


@pytest.mark.parametrize("length", [0, 1, 7])
@pytest.mark.parametrize("silu", [False, True])
def test_equals_the_definition(length: int, silu: bool) -> None:
    lengths = torch.tensor([length, 0, length // 2])
    given = (drawn(3, length, 5), drawn(5, 4), drawn(5))
    found = causal_conv(*given, initial=drawn(3, 3, 5), lengths=lengths, silu=silu)
    for mine, theirs in zip(found, causal_conv_reference(*given, drawn(3, 3, 5), lengths, silu)):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_packed_documents_and_splits_change_nothing() -> None:
    x, weight = drawn(1, 9, 5), drawn(5, 3)
    whole, last = causal_conv(x, weight)
    first, window = causal_conv(x[:, :4], weight)
    second, end = causal_conv(x[:, 4:], weight, initial=window)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    assert torch.equal(end, last)
    packed, _ = causal_conv(x, weight, offsets=torch.tensor([0, 4, 4, 9]))
    torch.testing.assert_close(packed, torch.cat((first, causal_conv(x[:, 4:], weight)[0]), 1))


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(SpecError, match="9 taps"):
        causal_conv(drawn(1, 4, 5), drawn(5, 9))
    with pytest.raises(SpecError, match="weight is for"):
        causal_conv(drawn(1, 4, 6), drawn(5, 3))
    with pytest.raises(SpecError, match="bias has shape"):
        causal_conv(drawn(1, 4, 5), drawn(5, 3), drawn(1))
    with pytest.raises(SpecError, match="initial has shape"):
        causal_conv(drawn(1, 4, 5), drawn(5, 3), initial=drawn(1, 3, 5))


def with_gradients(run, tensors: list[Tensor]) -> list[Tensor]:
    """Outputs and the gradients of a fixed weighing of them."""
    held = [t.detach().requires_grad_() for t in tensors]
    found = run(*held)
    weighed = sum((out * drawn(*out.shape).to(out)).sum() for out in found)
    return [*found, *torch.autograd.grad(weighed, held, materialize_grads=True, allow_unused=True)]


def assert_near(found: list[Tensor], wanted: list[Tensor]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == theirs.shape
        scale = float(theirs.detach().abs().max()) + 1e-6 if theirs.numel() else 1.0
        torch.testing.assert_close(mine.double() / scale, theirs / scale, rtol=0, atol=2e-6)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(0, 5, 4), (1, 16, 4), (2, 20, 8), (9, 16, 2), (140, 40, 4), (261, 3, 3)], ids=str)
def test_compiled_form_equals_the_definition(level: str, shape: tuple[int, int, int], silu: bool) -> None:
    length, channels, taps = shape
    lengths = torch.tensor([length, 0, length // 2])
    given = [drawn(3, length, 2 * channels), drawn(channels, taps), drawn(channels), drawn(3, taps - 1, channels)]

    def run(form, x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        return form(x[..., channels:], weight, bias, initial)

    found = with_gradients(
        lambda *held: run(lambda x, w, b, i: causal_conv(x, w, b, initial=i, lengths=lengths, silu=silu), *held),
        [t.float() for t in given],
    )
    wanted = with_gradients(
        lambda *held: run(lambda *four: causal_conv_reference(*four, lengths, silu), *held),
        [t.float().double() for t in given],
    )
    assert_near(found, wanted)


@pytest.mark.parametrize("taps", range(2, 9))
def test_compiled_form_of_packed_documents(level: str, taps: int) -> None:
    borders = torch.tensor([0, 0, 70, 71, 71, 300, 303])
    given = [drawn(1, 303, 24), drawn(24, taps), drawn(6, taps - 1, 24)]

    def run(x: Tensor, weight: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv(x, weight, initial=initial, offsets=borders, silu=True)

    narrow = [t.float() for t in given]
    assert_near(with_gradients(run, narrow), with_gradients(run, [t.double() for t in narrow]))
    assert_near(list(run(*narrow)), list(run(*(t.double() for t in narrow))))


def test_threads_and_padding_change_no_digit() -> None:
    x, weight, lengths = drawn(3, 300, 20).float(), drawn(20, 4).float(), torch.tensor([300, 7, 150])

    def run(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv(x, weight, lengths=lengths, silu=True)

    single = with_gradients(run, [x, weight])
    x[1, 7:] = x[2, 150:] = float("nan")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        double = with_gradients(run, [x, weight])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(single, double):
        assert torch.equal(one, two)


def test_second_derivatives_go_through_the_general_form() -> None:
    def penalty(x: Tensor, weight: Tensor) -> Tensor:
        y, final = causal_conv(x, weight, silu=True)
        (grad,) = torch.autograd.grad((y**2).sum() + final.sum(), x, create_graph=True)
        return (grad**2).sum()

    given = [drawn(2, 6, 5), drawn(5, 4)]
    wide, narrow = ([t.to(dtype).requires_grad_() for t in given] for dtype in (torch.float64, torch.float32))
    for theirs, mine in zip(torch.autograd.grad(penalty(*wide), wide), torch.autograd.grad(penalty(*narrow), narrow)):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


def test_overflow_and_nan_stay_where_they_are() -> None:
    x = torch.zeros(1, 6, 16)
    x[0, 1, 3], x[0, 1, 4] = float("nan"), 200.0
    y, _ = causal_conv(x, torch.ones(16, 2), silu=True)
    assert torch.equal(y.isnan().nonzero()[:, 1:], torch.tensor([[1, 3], [2, 3]]))
    assert y[0, 1, 4] == 200.0 and not y[0, 3:].any()
