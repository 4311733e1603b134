"""Spiking neurons: every form gives the definition's spikes, voltages and gradients, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.ops.lif import lif, lif_reference, lif_stepped


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) + 0.5


@given(
    rows=st.integers(0, 3),
    length=st.integers(0, 12),
    channels=st.sampled_from([1, 7, 16, 300]),
    ragged=st.booleans(),
    started=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_definition(
    level: str, rows: int, length: int, channels: int, ragged: bool, started: bool, seed: int
) -> None:
    current = drawn(rows, length, channels, seed=seed)
    start = drawn(rows, channels, seed=seed + 1).abs() / 4 if started else None
    lengths = torch.randint(0, length + 1, (rows,)) if ragged else None
    if lengths is not None:
        current[torch.arange(length) >= lengths[:, None]] = float("nan")
    given_ = [t.requires_grad_() for t in (current, start) if t is not None]
    weights = drawn(rows, length, channels, seed=seed + 2), drawn(rows, channels, seed=seed + 3)
    found = []
    for form in (lif, lif_reference):
        spikes, last = form(current, start, lengths)
        loss = (spikes * weights[0]).sum() + (last * weights[1]).sum()
        found.append((spikes, last, *(torch.autograd.grad(loss, given_) if length else ())))
    assert torch.equal(found[0][0], found[1][0])
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)
    with torch.no_grad():
        stepped = lif_stepped(current, start, lengths, tau=2.0, threshold=1.0)
    assert torch.equal(stepped[0], found[1][0])
    torch.testing.assert_close(stepped[1], found[1][1].detach())


def test_a_stream_gives_the_same_spikes_to_the_bit(level: str) -> None:
    current = drawn(2, 30, 19)
    whole, last = lif(current, tau=3.0, threshold=0.7)
    voltage, pieces = None, []
    for start, stop in ((0, 1), (1, 1), (1, 12), (12, 30)):
        spikes, voltage = lif(current[:, start:stop], voltage, tau=3.0, threshold=0.7)
        pieces.append(spikes)
    assert torch.equal(torch.cat(pieces, 1), whole) and torch.equal(voltage, last)  # type: ignore[arg-type]


def test_second_derivatives_are_those_of_the_definition() -> None:
    current = drawn(2, 5, 3).requires_grad_()
    found = []
    for form in (lif, lif_reference):
        (first,) = torch.autograd.grad(form(current)[0].square().sum(), current, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), current)[0])
    assert found[0].any()
    torch.testing.assert_close(*found)


def test_values_that_are_not_finite_and_half_precision() -> None:
    current = torch.zeros(1, 3, 3)
    current[0, 0] = torch.tensor([float("nan"), float("inf"), 2.0])
    spikes, last = lif(current)
    assert spikes[0, 0].tolist() == [0.0, 1.0, 1.0]
    assert last[0].isnan().tolist() == [True, False, False]
    half, voltage = lif(drawn(2, 4, 3).bfloat16())
    assert half.dtype == torch.bfloat16 and voltage.dtype == torch.float32


@pytest.mark.parametrize("wrong", ({"tau": 0.5}, {"tau": float("nan")}, {"threshold": 0.0}))
def test_wrong_settings_are_said(wrong: dict[str, float]) -> None:
    with pytest.raises(SpecError, match=next(iter(wrong))):
        lif(torch.zeros(1, 1, 1), **wrong)
