"""Summed embeddings: the compiled kernel is the definition, gradients flow, and ids outside a table are an error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formwright.ops.embedding import Source, embedding, embedding_reference
from formwright.ops.int8_linear import quantize_weight

WIDTH = 37


def drawn(rows: int, length: int, seed: int, bytes: bool) -> list[Source]:
    """Tokens, places and a type that is the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    tables = [torch.randn(size, WIDTH, generator=generator) for size in (50, 20, 2)]
    ids = [torch.randint(0, size, (rows, length), generator=generator) for size in (50, 20)]
    steps = None
    if bytes:
        tables[0], steps, _ = quantize_weight(tables[0])
    return [Source(tables[0], steps, ids[0], 1.5), Source(tables[1], None, ids[1]), Source(tables[2], None, None)]


@given(
    rows=st.integers(0, 3), length=st.integers(0, 90), bytes=st.booleans(), normed=st.booleans(), seed=st.integers(0, 9)
)
def test_the_kernel_is_the_definition(level: str, rows: int, length: int, bytes: bool, normed: bool, seed: int) -> None:
    sources = drawn(rows, length, seed, bytes)
    norm = (torch.linspace(0.5, 2, WIDTH), torch.linspace(-1, 1, WIDTH), 1e-5) if normed else ()
    torch.testing.assert_close(embedding(sources, *norm), embedding_reference(sources, *norm), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_definition() -> None:
    sources = drawn(2, 5, 0, bytes=False)
    table = sources[0].table.double().requires_grad_()
    gain = torch.rand(WIDTH, dtype=torch.float64, requires_grad=True)
    rest = [Source(s.table.double(), None, s.ids) for s in sources[1:]]
    assert torch.autograd.gradcheck(
        lambda t, g: embedding([Source(t, None, sources[0].ids), *rest], g, None, 1e-5), (table, gain)
    )
    float32 = sources[0].table.clone().requires_grad_()
    embedding([Source(float32, None, sources[0].ids), *sources[1:]]).sum().backward()
    assert float32.grad is not None and float32.grad.abs().sum() > 0


@pytest.mark.parametrize("bad", [-1, 50])
def test_ids_outside_a_table_are_an_error(level: str, bad: int) -> None:
    first, *others = drawn(1, 4, 0, bytes=False)
    ids = first.ids.clone()
    ids[0, 2] = bad
    with pytest.raises(IndexError, match="outside the 50 rows"):
        embedding([first._replace(ids=ids), *others])


def test_a_row_of_nan_is_alone(level: str) -> None:
    first, *others = drawn(1, 6, 3, bytes=False)
    first.table[first.ids[0, 1]] = torch.nan
    made = embedding([first, *others], torch.ones(WIDTH))
    same = first.ids[0] == first.ids[0, 1]
    assert made[0, same].isnan().all() and not made[0, ~same].isnan().any()
