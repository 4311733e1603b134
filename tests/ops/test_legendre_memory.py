"""The Legendre memory: exact matrices, every parallel form the recurrence, streams, and a delay line that it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conformance.counting import Counter
from formwright.kit.errors import SpecError
from formwright.ops import legendre_memory as op
from formwright.ops.legendre_memory import (
    legendre_memory,
    legendre_memory_macs,
    legendre_memory_reference,
    matrices,
    reach,
)


@pytest.mark.parametrize(("order", "theta"), ((1, 4.0), (16, 8.0), (40, 128.0)))
def test_matrices_are_the_exponential(order: int, theta: float) -> None:
    joined = torch.zeros(order + 1, order + 1, dtype=torch.float64)
    for i in range(order):
        joined[i, order] = (2 * i + 1) / theta * (-1) ** i
        for j in range(order):
            joined[i, j] = (2 * i + 1) / theta * (-1 if i < j else (-1) ** (i - j + 1))
    wanted = torch.matrix_exp(joined)
    transition, drive = (torch.from_numpy(t) for t in matrices(order, theta))
    torch.testing.assert_close(transition, wanted[:order, :order], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(drive, wanted[:order, order], rtol=1e-9, atol=1e-12)
    assert np.abs(np.linalg.eigvals(transition.numpy())).max() < 1


@pytest.mark.parametrize(("direct", "block"), ((64, 4096), (4, 4096), (4, 16), (100, 16)))
@pytest.mark.parametrize("length", (0, 1, 4, 16, 50))
@pytest.mark.parametrize("started", (False, True))
def test_parallel_is_the_recurrence(
    monkeypatch: pytest.MonkeyPatch, direct: int, block: int, length: int, started: bool
) -> None:
    monkeypatch.setattr(op, "DIRECT", direct)
    monkeypatch.setattr(op, "BLOCK", block)
    generator = torch.Generator().manual_seed(length)
    u = torch.randn(3, length, dtype=torch.float64, generator=generator)
    start = torch.randn(3, 6, dtype=torch.float64, generator=generator) if started else None
    lengths = torch.tensor([length, 0, length // 2])
    given = [t.requires_grad_() for t in (u, start) if t is not None]
    found = []
    for form in (legendre_memory, legendre_memory_reference):
        memory, last = form(u, 6, 9.0, start, lengths)
        real = memory * (torch.arange(length) < lengths[:, None])[..., None]
        loss = real.square().sum() + last.sum()
        found.append((real, last, *(torch.autograd.grad(loss, given) if length else ())))
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_a_longer_row_recomputes_the_response_and_precision_holds() -> None:
    for length in (70, 300, 100):
        u = torch.randn(2, length)
        wanted, _ = legendre_memory_reference(u.double(), 64, 128.0)
        found, _ = legendre_memory(u, 64, 128.0)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        legendre_memory(torch.randn(1, 90), 5, 11.0)
    u = torch.randn(1, 90, requires_grad=True)
    legendre_memory(u, 5, 11.0)[0].sum().backward()
    assert u.grad is not None
    assert legendre_memory(torch.randn(1, 9).bfloat16(), 5, 11.0)[0].dtype == torch.bfloat16


def test_a_start_is_left_out_where_nothing_of_it_is_left() -> None:
    """Two blocks, the last one shorter than what it begins with reaches; products are counted as they are made."""
    assert reach(6, 9.0, op.BLOCK) < 200 and reach(6, 9.0, 3) == 3
    u, start = torch.randn(1, op.BLOCK + 50, dtype=torch.float64), torch.randn(1, 6, dtype=torch.float64)
    for given in (None, start):
        wanted = legendre_memory_reference(u, 6, 9.0, given)
        with Counter() as counted:
            found = legendre_memory(u, 6, 9.0, given)
        for mine, theirs in zip(found, wanted):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
        assert counted.macs == legendre_memory_macs(u.shape[1], 6, 9.0, given is not None)


def test_what_stands_behind_a_row_changes_nothing() -> None:
    u = torch.randn(1, 100)
    wanted = legendre_memory(u[:, :80], 8, 30.0)[1]
    u[:, 80:] = float("nan")
    memory, last = legendre_memory(u, 8, 30.0, None, torch.tensor([80]))
    torch.testing.assert_close(last, wanted, rtol=1e-5, atol=1e-6)
    assert memory[:, :80].isfinite().all()


@pytest.mark.parametrize(("order", "theta"), ((0, 4.0), (4, 0.0), (4, float("inf"))))
def test_wrong_settings_are_said(order: int, theta: float) -> None:
    with pytest.raises(SpecError, match=r"at least 1|above 0"):
        legendre_memory(torch.zeros(1, 3), order, theta)
