"""The delta rule's GPU kernels, run by Triton's interpreter on the CPU, against the recurrence."""

from __future__ import annotations

from kernels import interpreted, needs_triton

SCRIPT = """
import torch
from torch.nn import functional as F
from formwright.ops.delta_rule import delta_rule_reference
from formwright.ops.delta_rule import triton as form
from formwright.ops.delta_rule.triton import Kernel, suits

form.CHUNK = 16  # the interpreter is slow, and chunks are what is tried
for rows, length, heads, dk, dv in ((2, 2, 2, 20, 16), (1, 34, 1, 4, 35)):
    generator = torch.Generator().manual_seed(length)
    shapes = ((rows, length, heads, dk),) * 2 + ((rows, length, heads, dv), (rows, heads, dk, dv))
    q, k, v, state = (torch.randn(shape, generator=generator) for shape in shapes)
    beta = 2 * torch.rand(rows, length, heads, generator=generator)
    single = [t.requires_grad_() for t in (q, F.normalize(k, dim=-1), v, beta, state)]
    assert suits(q, v)
    double = [t.detach().double().requires_grad_() for t in single]
    outputs = Kernel.apply(*single, 0.3), delta_rule_reference(*double, scale=0.3)
    directions = [torch.randn(t.shape, generator=generator) for t in outputs[0]]
    grads = [
        torch.autograd.grad(list(pair), held, [d.to(pair[0].dtype) for d in directions])
        for pair, held in zip(outputs, (single, double))
    ]
    for mine, wanted in zip((*outputs[0], *grads[0]), (*outputs[1], *grads[1])):
        torch.testing.assert_close(mine.double(), wanted, rtol=2e-4, atol=2e-4)

out, _ = Kernel.apply(*single, 0.3)
(first,) = torch.autograd.grad(out.square().sum(), single[1], create_graph=True)
assert torch.isfinite(torch.autograd.grad(first.square().sum(), single[1])[0]).all()
"""


@needs_triton
def test_kernels_equal_the_recurrence() -> None:
    interpreted(SCRIPT)
