"""The last product with its cross entropy equals its definition, forwards, backwards and twice backwards."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.ops import linear_cross_entropy as op
from formwright.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


def inputs(rows: int, vocab: int = 11, width: int = 5, scale: float = 1.0, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rows, width), (vocab, width))]
    bias = torch.randn(vocab, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[1::3] = -100
    x, weight, bias = ((scale * t).to(dtype).requires_grad_() for t in (*made, bias))
    return [x, weight, targets, bias]


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 20])
@pytest.mark.parametrize("options", [{}, {"smoothing": 0.2}, {"z": 0.3}, {"smoothing": 0.1, "z": 0.1}])
def test_equals_its_definition_with_all_gradients_however_it_is_cut(rows: int, options: dict) -> None:
    for scale in (1.0, 30.0):
        for logits in (None, 1, 11, 40):
            x, weight, targets, bias = inputs(rows, scale=scale)
            for given in (bias, None):
                wanted = linear_cross_entropy_reference(x, weight, targets, given, **options)
                got = linear_cross_entropy(x, weight, targets, given, logits=logits, **options)
                torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
                leaves = [t for t in (x, weight, given) if t is not None]
                grads = [torch.autograd.grad(3.0 * out, leaves, allow_unused=True) for out in (got, wanted)]
                for one, two in zip(*grads):
                    one = torch.zeros_like(two) if one is None else one
                    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
            with torch.no_grad():
                again = linear_cross_entropy(x, weight, targets, bias, logits=logits, **options)
            torch.testing.assert_close(
                again, linear_cross_entropy_reference(x, weight, targets, bias, **options), rtol=1e-11, atol=1e-11
            )


def test_first_and_second_derivatives_by_differences() -> None:
    x, weight, targets, bias = inputs(4, vocab=5, width=3)

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, bias, smoothing=0.1, z=0.2, logits=10)

    assert torch.autograd.gradcheck(loss, (x, weight, bias))
    assert torch.autograd.gradgradcheck(loss, (x, weight, bias))


def test_a_frozen_weight_gets_no_gradient_and_a_transform_sees_the_definition() -> None:
    x, weight, targets, _ = inputs(6)
    loss = linear_cross_entropy(x, weight.detach(), targets)
    loss.backward()
    assert x.grad is not None and x.grad[targets == -100].abs().sum() == 0
    gradient = torch.func.grad(lambda t: linear_cross_entropy(t, weight.detach(), targets.clamp(min=0)))(x.detach())
    own = x.detach().clone().requires_grad_()
    linear_cross_entropy(own, weight.detach(), targets.clamp(min=0)).backward()
    torch.testing.assert_close(gradient, own.grad)


def test_garbage_where_no_target_is_stays_there() -> None:
    x, weight, targets, bias = inputs(7, dtype=torch.float32)
    spoilt = torch.where((targets == -100)[:, None], math.nan, x).detach().requires_grad_()
    loss = linear_cross_entropy(spoilt, weight, targets, bias)
    torch.testing.assert_close(loss, linear_cross_entropy(x, weight, targets, bias))
    loss.backward()
    assert bool(spoilt.grad[targets == -100].eq(0).all()) and bool(spoilt.grad.isfinite().all())
    nothing = linear_cross_entropy(spoilt, weight, torch.full_like(targets, -100), bias)
    assert nothing.item() == 0.0 and nothing.requires_grad


def test_large_logits_and_half_precision() -> None:
    x, weight, targets, bias = inputs(9, scale=1e3, dtype=torch.float32)
    loss = linear_cross_entropy(x, weight, targets, bias)
    assert bool(loss.isfinite())
    torch.testing.assert_close(loss, linear_cross_entropy_reference(x, weight, targets, bias), rtol=1e-5, atol=0.0)
    x, weight, targets, bias = inputs(300, vocab=40, dtype=torch.bfloat16)
    loss = linear_cross_entropy(x, weight, targets, bias, logits=40 * 64)
    loss.backward()
    assert loss.dtype == torch.float32 and {x.grad.dtype, weight.grad.dtype, bias.grad.dtype} == {torch.bfloat16}
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    wanted = linear_cross_entropy_reference(exact[0], exact[1], targets, exact[2])
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=3e-3)
    for narrow, wide in zip((x, weight, bias), exact):
        assert ((narrow.grad - wide.grad).norm() / wide.grad.norm()).item() < 0.02


def test_under_autocast_products_are_narrow_and_gradients_are_not() -> None:
    x, weight, targets, _ = inputs(30, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(linear_cross_entropy_reference(x, weight, targets).item(), rel=1e-2)


def test_never_holds_more_logits_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    mm = torch.mm

    def watched(*args: Tensor, **more: Tensor) -> Tensor:
        held.append(mm(*args, **more))
        return held[-1]

    x, weight, targets, _ = inputs(50, vocab=20, width=4)
    monkeypatch.setattr(op.chunked.torch, "mm", watched)
    linear_cross_entropy(x, weight, targets, logits=100).backward()
    assert max(made.numel() for made in held) <= 100 and len(held) > 10


def test_bad_input_is_said() -> None:
    x, weight, targets, bias = inputs(4)
    with pytest.raises(SpecError, match=r"x \(4, 5\) and weight \(5, 11\) must be"):
        linear_cross_entropy(x, weight.t(), targets)
    with pytest.raises(SpecError, match=r"targets \(3,\) must be \(4,\)"):
        linear_cross_entropy(x, weight, targets[:3])
    with pytest.raises(SpecError, match=r"bias \(2,\) must be \(11,\)"):
        linear_cross_entropy(x, weight, targets, bias[:2])
    with pytest.raises(SpecError, match=r"smoothing=2\.0 must lie between 0 and 1"):
        linear_cross_entropy(x, weight, targets, smoothing=2.0)
    with pytest.raises(IndexError, match="target 11 is none of 11 rows"):
        linear_cross_entropy(x, weight, torch.full_like(targets, 11))
    with pytest.raises(IndexError, match="target -1 is none of 11 rows"):
        linear_cross_entropy(x, weight, torch.full_like(targets, -1))
