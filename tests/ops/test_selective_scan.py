"""Selective scan: every form equals the definition, values and gradients, at every shape and layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.ops import native
from formwright.ops.selective_scan import selective_scan, selective_scan_reference

NAMES = ("x", "delta", "A", "B", "C", "D", "z", "initial")


def drawn(rows: int, length: int, channels: int, states: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    tokens, memory = (rows, length, channels), (rows, length, states)
    shapes = (tokens, tokens, (channels, states), memory, memory, (channels,), tokens, (rows, channels, states))
    made = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in zip(NAMES, shapes)
    }
    made["A"] = -made["A"].abs()
    return made


def with_gradients(run, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and the gradients of a fixed weighing of them."""
    held = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    found = run(held)
    generator = torch.Generator().manual_seed(5)
    weighed = sum(
        (out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)).sum() for out in found
    )
    return [*found, *torch.autograd.grad(weighed, list(held.values()), materialize_grads=True, allow_unused=True)]


def defined(tensors: dict[str, Tensor], lengths: Tensor) -> list[Tensor]:
    return with_gradients(lambda held: selective_scan_reference(*held.values(), lengths, True), tensors)


@pytest.mark.parametrize("length", [0, 1, 2, 9, 10, 37])
def test_two_levels_equal_the_definition(length: int) -> None:
    tensors, lengths = drawn(3, length, 4, 5), torch.tensor([length, 0, length // 2])
    found = with_gradients(lambda held: selective_scan(**held, lengths=lengths), tensors)
    for mine, theirs in zip(found, defined(tensors, lengths)):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(1, 5, 3), (9, 16, 16), (130, 40, 7)], ids=str)
def test_compiled_form_equals_the_definition(level: str, shape: tuple[int, int, int]) -> None:
    tensors, lengths = drawn(3, *shape, dtype=torch.float32), torch.tensor([shape[0], 0, shape[0] // 2])
    found = with_gradients(lambda held: selective_scan(**held, lengths=lengths), tensors)
    wanted = defined({name: t.double() for name, t in tensors.items()}, lengths)
    for mine, theirs in zip(found, wanted):
        scale = float(theirs.detach().abs().max()) + 1e-6
        torch.testing.assert_close(mine.double() / scale, theirs / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_packed_documents_stand_alone(dtype: torch.dtype) -> None:
    tensors = drawn(1, 90, 6, 4, dtype)
    tensors["initial"] = tensors["initial"].repeat(3, 1, 1)
    borders = torch.tensor([0, 70, 70, 90])
    y, final = selective_scan(**tensors, offsets=borders)
    for index, (start, stop) in enumerate(zip(borders[:-1].tolist(), borders[1:].tolist())):
        own = {
            name: t[:, start:stop] if name in ("x", "delta", "B", "C", "z") else t for name, t in tensors.items()
        } | {"initial": tensors["initial"][index : index + 1]}
        alone, state = selective_scan(**own)
        torch.testing.assert_close(y[:, start:stop], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(final[index : index + 1], state, rtol=1e-5, atol=1e-5)


def test_second_derivatives_and_half_precision() -> None:
    tensors = drawn(1, 3, 2, 2, torch.float32)
    x = tensors.pop("x").requires_grad_()
    (once,) = torch.autograd.grad(selective_scan(x, **tensors)[0].square().sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(once.sum(), x)
    exact = {name: t.double() for name, t in tensors.items()}
    wide = x.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(selective_scan(wide, **exact)[0].square().sum(), wide, create_graph=True)
    torch.testing.assert_close(twice.double(), torch.autograd.grad(first.sum(), wide)[0], rtol=1e-4, atol=1e-4)
    half = {name: t.bfloat16() for name, t in tensors.items()}
    y, final = selective_scan(x.detach().bfloat16(), **half)
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32


def test_what_does_not_fit_is_named() -> None:
    tensors = drawn(2, 3, 4, 5)
    with pytest.raises(SpecError, match="delta has shape"):
        selective_scan(**{**tensors, "delta": tensors["delta"][:, :2]})
    with pytest.raises(SpecError, match="initial state has 1 rows"):
        selective_scan(**{**tensors, "initial": tensors["initial"][:1]})
    with pytest.raises(SpecError, match="complex"):
        selective_scan(**{**tensors, "A": tensors["A"].to(torch.complex64)})


@pytest.mark.skipif(native.library() is None, reason="the compiled ops were not built on this machine")
def test_rows_beyond_the_tensor_are_refused() -> None:
    tensors = drawn(2, 3, 4, 5, torch.float32)
    with pytest.raises(SpecError, match="lengths must be 0 to 3"):
        selective_scan(**tensors, lengths=torch.tensor([3, 4]))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)], ids=str)
def test_empty_rows_keep_their_state(shape: tuple[int, int]) -> None:
    tensors = drawn(*shape, 4, 5, torch.float32)
    y, final = selective_scan(**tensors)
    assert y.shape == (*shape, 4) and torch.equal(final, tensors["initial"])


def test_undefined_tokens_stay_in_their_row() -> None:
    tensors = drawn(2, 5, 4, 5, torch.float32)
    tensors["x"][0, 2], tensors["delta"][1, 4] = torch.nan, torch.nan
    y, final = selective_scan(**tensors, lengths=torch.tensor([5, 4]))
    assert torch.isfinite(y[0, :2]).all() and torch.isnan(y[0, 2:]).all()
    assert torch.isfinite(y[1]).all() and torch.isfinite(final[1]).all()
