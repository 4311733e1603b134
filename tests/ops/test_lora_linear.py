"""A linear and its LoRA in one step are the two terms, forwards, backwards and twice backwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from formwright.ops.lora_linear import lora_linear, lora_linear_reference


def drawn(*shape: int, dtype: torch.dtype = torch.float64, inputs: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((*shape, 6), (5, 6), (5,), (3, 6), (5, 3))
    made = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    for place in (0, 3, 4) if inputs else (3, 4):
        made[place].requires_grad_()
    return made


@pytest.mark.parametrize("shape", [(4, 7), (3,), (0, 2), ()])
@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_its_definition(shape: tuple[int, ...], inputs: bool, bias: bool) -> None:
    found = []
    for run in (lora_linear, lora_linear_reference):
        held = drawn(*shape, inputs=inputs)
        y = run(held[0], held[1], held[2] if bias else None, held[3], held[4], 0.7)
        y.square().sum().backward()
        found.append([y.detach(), *[held[place].grad for place in (0, 3, 4) if held[place].grad is not None]])
    assert len(found[0]) == (4 if inputs else 3)
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_gradients_of_gradients() -> None:
    x, weight, bias, a, b = drawn(4)
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, weight, bias, a, b, 0.7), (x, a, b))
    assert torch.autograd.gradgradcheck(lambda x, a, b: lora_linear(x, weight, bias, a, b, 0.7), (x, a, b))
    a.requires_grad_(False)
    assert torch.autograd.gradgradcheck(lambda x, b: lora_linear(x, weight, bias, a, b, 0.7), (x, b))


def test_a_fixed_factor_keeps_no_input() -> None:
    x, weight, bias, a, b = drawn(4)
    kept: set[int] = set()

    def pack(t: Tensor) -> Tensor:
        kept.add(t.data_ptr())
        return t

    for trains in (True, False):
        a.requires_grad_(trains)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            lora_linear(x, weight, bias, a, b, 0.7)
        assert (x.data_ptr() in kept) == trains


def test_where_the_step_does_not_run_the_definition_does() -> None:
    x, weight, bias, a, b = drawn(4, dtype=torch.float32)
    weight.requires_grad_()
    lora_linear(x, weight, bias, a, b, 1.0).sum().backward()
    assert weight.grad is not None
    weight.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lora_linear(x, weight, bias, a, b, 1.0).dtype == torch.bfloat16
    rows = torch.func.vmap(lambda x: lora_linear(x, weight, bias, a, b, 1.0))(x.detach())
    torch.testing.assert_close(rows, lora_linear(x, weight, bias, a, b, 1.0), rtol=1e-5, atol=1e-5)
