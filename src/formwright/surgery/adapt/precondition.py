"""Preconditioned gradients of a product of two factors: steps that do not depend on how the product is split.

    G_up <- G_up (down down^T + delta I)^-1,   G_down <- (up^T up + delta I)^-1 G_down

Zhang and Pilanci, 2024 (2402.02347), used by Xu et al., 2024 (2403.19456). Under ``up -> s up, down -> down / s`` a
step of plain gradient descent along these changes ``up down`` the same for every s, and one along plain gradients does
not (nor does any form of Adam, which takes the scale of a gradient away). Cost: two r x r inverses a pair and step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from formwright.surgery.base import Companion

#: Gram matrices below this norm are left out: a factor that is zero says nothing about the other's scale.
LEAST = 1e-6


def preconditioned(
    up: Tensor, down: Tensor, to_up: Tensor, to_down: Tensor, delta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Factors up (out, r) and down (r, in) and gradients of (some rows of) up (m, r), (columns of) down (r, n) -> the
    gradients, preconditioned."""
    return _divided(to_up, down @ down.t(), delta), _divided(to_down.t(), up.t() @ up, delta).t()


def _divided(rows: Tensor, gram: Tensor, delta: float) -> Tensor:
    """rows (m, r) times the inverse of gram (r, r) + delta I."""
    if float(gram.norm()) < LEAST:
        return rows
    whole = gram + delta * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # Of lower rank where a factor is (half of it may be zero still): directions without length stay as they are.
    return rows @ torch.linalg.pinv(whole, hermitian=True)


class Preconditioner(Companion):
    """Does so at every step of a training run, before the optimizer sees the gradients of B and D."""

    def __init__(self, changes: Sequence[Any], delta: float) -> None:
        self.changes, self.delta = changes, delta

    @torch.no_grad()
    def gradients(self, run: Any) -> None:
        for change in self.changes:
            up, down = change.up(), change.down()
            if change.B.grad is not None:
                change.B.grad = _divided(change.B.grad, down @ down.t(), self.delta)
            if change.D.grad is not None:
                change.D.grad = _divided(change.D.grad.t(), up.t() @ up, self.delta).t().contiguous()
