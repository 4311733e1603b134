"""The Triton form of the causal product, run by Triton's interpreter on the CPU, in a process of its own."""

from __future__ import annotations

from kernels import interpreted, needs_triton

SCRIPT = """
import torch
from formwright.ops.linear_attention.product import chunked
from formwright.ops.linear_attention.triton import causal_product_triton

made = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(shape, generator=made)
for borders, rows, length in ((None, 2, 37), ((0, 0, 33, 35), 1, 35), (None, 1, 0)):
    documents = rows if borders is None else len(borders) - 1
    a, b, c = draw(rows, length, 2, 5), draw(rows, length, 2, 5), draw(rows, length, 2, 35)
    for reverse in (False, True):
        for start in (None, draw(documents, 2, 5, 35)):
            found = causal_product_triton(a, b, c, start, borders, reverse)
            wanted = chunked(a.double(), b.double(), c.double(),
                             None if start is None else start.double(), borders, reverse)
            for mine, theirs in zip(found, wanted):
                torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
"""


@needs_triton
def test_equals_the_chunked_form() -> None:
    interpreted(SCRIPT)
