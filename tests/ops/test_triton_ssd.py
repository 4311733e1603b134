"""The state-space dual's GPU kernels: run by Triton's interpreter against the recurrence, and compiled."""

from __future__ import annotations

from kernels import compiled, interpreted, needs_triton

SCRIPT = """
from functools import partial
import torch
from formwright.ops.ssd import _Ssd, ssd_reference
from formwright.ops.ssd.documents import apart
from formwright.ops.ssd import triton as form

form.CHUNK = 16  # the interpreter is slow, and chunks are what is tried
cases = ((2, 19, 2, 1, 20, 16, True), (1, 18, 2, 2, 4, 35, False))
for rows, length, heads, groups, width, size, whole in cases:
    generator = torch.Generator().manual_seed(length)
    shapes = ((rows, length, heads, width), (rows, length, groups, size), (rows, length, groups, size), (heads,))
    x, B, C, D = (torch.randn(shape, generator=generator) for shape in shapes)
    dt, A = 2 * torch.rand(rows, length, heads, generator=generator), -3 * torch.rand(heads, generator=generator)
    start = torch.randn(rows, heads, width, size, generator=generator)
    resets = torch.rand(rows, length, generator=generator) < 0.15
    single = [x, dt, A, B, C, D, start] if whole else [x, dt, A, B, C]
    single = [t.requires_grad_() for t in single]
    double = [t.detach().double().requires_grad_() for t in single]
    kernels = form.Kernels()
    assert kernels.suits(x, B)
    if whole:
        mine = _Ssd.apply(kernels, 64, *single, resets)
        wanted = ssd_reference(*double[:6], start=double[6], resets=resets)
    else:
        mine, wanted = _Ssd.apply(kernels, 64, *single, None, None, None), ssd_reference(*double)
    count = 2 if whole else 1  # the final state has a gradient of its own, or none
    directions = [torch.randn(t.shape, generator=generator) for t in mine[:count]]
    grads = [
        torch.autograd.grad(out[:count], held, [d.to(out[0].dtype) for d in directions])
        for out, held in ((mine, single), (wanted, double))
    ]
    for found, exact in zip((*mine, *grads[0]), (*wanted, *grads[1])):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)

begins = torch.zeros(1, 18, dtype=torch.bool)
begins[0, [3, 7]] = True
outputs = []
for bad in (0.0, float("nan")):
    held = [t.detach().clone() for t in single]
    for tokens in (held[0], held[1], held[3], held[4]):
        tokens[:, 3:7] += bad
    held = [t.requires_grad_() for t in held]
    y, final = apart(partial(_Ssd.apply, kernels, kernels.q), [*held, None, None, begins], kernels.q)
    outputs.append((y, *torch.autograd.grad(y[:, :3].sum() + y[:, 7:].sum(), (held[0], held[1], held[3], held[4]))))
    assert torch.isfinite(final).all()
for clean, broken in zip(*outputs):
    for inside in (slice(0, 3), slice(7, 18)):
        torch.testing.assert_close(broken[:, inside], clean[:, inside])

y, _ = _Ssd.apply(kernels, 64, *single, None, None, None)
(first,) = torch.autograd.grad(y.square().sum(), single[1], create_graph=True)
assert torch.isfinite(torch.autograd.grad(first.square().sum(), single[1])[0]).all()
"""


@needs_triton
def test_kernels_equal_the_recurrence() -> None:
    interpreted(SCRIPT)


@needs_triton
def test_kernels_compile() -> None:
    from formwright.ops.ssd import triton as form

    for kernel in (form.forward_kernel, form.backward_kernel):
        compiled(kernel, "", q=16, wide=16, deep=16)
