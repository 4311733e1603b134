"""The GPU kernels of attention by runs of keys, run by Triton's interpreter, have the definition's gradients."""

from __future__ import annotations

from kernels import interpreted, needs_triton

SCRIPT = """
import torch
from formwright.ops.window_attention import (
    _Runs, joined, leading, listed, sliding, triton, window_attention_reference,
)

def check(seen, batch, heads, groups, head, valid=None):
    shapes = ((batch, seen.length, heads, head), *[(batch, seen.total, groups, head)] * 2)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    found = []
    for out, logs in (
        _Runs.apply(*inputs, valid, seen, head**-0.5, triton), window_attention_reference(*exact, seen, valid=valid)
    ):
        logs = torch.where(torch.isfinite(logs), logs, 0.0)
        wanted = inputs if out.dtype == torch.float32 else exact
        found.append((out, logs, *torch.autograd.grad(out.sin().sum() + logs.cos().sum(), wanted)))
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)

torch.manual_seed(0)
rows = torch.arange(70)[None] < torch.tensor([70, 0])[:, None]
check(sliding(90, 30, 0), 2, 2, 1, 20)
check(joined(sliding(70, 5, 5), leading(70, 3)), 2, 2, 2, 16, rows)
check(listed(100, 20, (((1,), (-1,), (4,), (0,), (2,)), ((3,), (0,), (-1,), (2,), (1,)))), 1, 2, 1, 8)
check(sliding(1, 0, 0), 1, 1, 1, 4)
"""


@needs_triton
def test_kernels_in_the_interpreter() -> None:
    interpreted("from formwright.ops.window_attention import triton\n" + SCRIPT)
