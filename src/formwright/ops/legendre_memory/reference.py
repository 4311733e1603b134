"""The definition of the Legendre memory: its matrices, discretised exactly, and the recurrence step by step.

The continuous system dM/dt = A M + B u with

    A_ij = (2i + 1) / theta * (-1 if i < j else (-1)^(i - j + 1)),   B_i = (2i + 1) / theta * (-1)^i

keeps in M the first ``order`` Legendre coefficients of u over the last ``theta`` steps (Voelker, Kajic and Eliasmith,
2019). Holding u for one step gives M_t = transition M_{t-1} + drive u_t, both from one matrix exponential.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from formwright.kit.errors import SpecError

#: Terms of the exponential's series; at a norm of at most 1/2 the first one left out is below 1e-21.
TERMS = 16


@functools.lru_cache(maxsize=64)
def matrices(order: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """(transition (order, order), drive (order,)) in float64. SpecError for no order or no window."""
    if order < 1:
        raise SpecError(f"order={order} must be at least 1: the number of Legendre coefficients that are kept")
    if not 0 < theta < float("inf"):
        raise SpecError(f"theta={theta} must be a finite number above 0: the window in steps")
    i, j = np.arange(order)[:, None], np.arange(order)[None]
    scale = (2 * i + 1) / theta
    joined = np.zeros((order + 1, order + 1))
    joined[:order, :order] = scale * np.where((i < j) | ((i - j) % 2 == 0), -1.0, 1.0)
    joined[:order, order:] = scale * np.where(i % 2 == 0, 1.0, -1.0)
    found = exponential(joined)
    return found[:order, :order], found[:order, order]


def exponential(matrix: np.ndarray) -> np.ndarray:
    """e^matrix by its series at a small norm, squared back up. In numpy, so that nothing that traces torch sees it."""
    halvings = max(0, int(np.ceil(np.log2(max(float(np.linalg.norm(matrix, 1)), 1e-300)))) + 1)
    small = matrix / 2.0**halvings
    total = identity = np.eye(len(matrix))
    for term in range(TERMS, 0, -1):
        total = identity + small @ total / term
    for _ in range(halvings):
        total = total @ total
    return total


def legendre_memory_reference(
    u: Tensor, order: int, theta: float, start: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """u (B, L), start (B, order) or zeros -> M (B, L, order) and the memory after each row's last step (B, order)."""
    transition, drive = (torch.from_numpy(t).to(u) for t in matrices(order, theta))
    memory = u.new_zeros(len(u), order) if start is None else start
    last, seen = memory, []
    for step in range(u.shape[1]):
        memory = memory @ transition.T + u[:, step, None] * drive
        seen.append(memory)
        going = torch.ones(len(u), dtype=torch.bool, device=u.device) if lengths is None else step < lengths
        last = torch.where(going[:, None], memory, last)
    return (torch.stack(seen, 1) if seen else u.new_zeros(len(u), 0, order)), last
