"""The causal product on a GPU: one program for each document, head and block of value columns, chunk after chunk.

The state of a block stays in registers. Products are in full float32 precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 32
#: Columns of values that one program takes.
COLUMNS = 32


def causal_product_triton(
    a: Tensor, b: Tensor, c: Tensor, start: Tensor | None, borders: Sequence[int] | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """As ``causal_product``; float32, inner width up to 256."""
    import triton

    from formwright.ops.linear_attention._kernel import causal_product_kernel

    rows, length, heads, inner = a.shape
    outer = c.shape[-1]
    a, b, c = (t.contiguous() for t in (a, b, c))
    ends = [row * length for row in range(rows + 1)] if borders is None else list(borders)
    offsets = torch.tensor(ends, dtype=torch.long, device=a.device)
    out = torch.empty_like(c)
    state = c.new_zeros(len(ends) - 1, heads, inner, outer) if start is None else start.clone().contiguous()
    grid = ((len(ends) - 1) * heads, triton.cdiv(outer, COLUMNS))
    if all(grid):
        causal_product_kernel[grid](
            a, b, c, out, state, offsets, heads, inner, outer,
            REVERSE=reverse, CHUNK=CHUNK, INNER=max(16, triton.next_power_of_2(inner)), COLUMNS=COLUMNS,
        )  # fmt: skip
    return out, state
