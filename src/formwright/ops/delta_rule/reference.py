"""The delta rule written out: the recurrence, token by token, and the attention map that it amounts to."""

from __future__ import annotations

import torch
from torch import Tensor


def delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None = None, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """q, k (B, L, H, dk), v (B, L, H, dv), beta (B, L, H), state (B, H, dk, dv) -> (B, L, H, dv) and the last state."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if state is None:
        state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    found = []
    for step in range(q.shape[1]):
        error = v[:, step] - torch.einsum("bhkv,bhk->bhv", state, k[:, step])
        written = beta[:, step, :, None] * error
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, step], written)
        found.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, step]))
    return (torch.stack(found, 1) if found else torch.zeros_like(v)), state


def delta_rule_map(q: Tensor, k: Tensor, beta: Tensor, *, scale: float | None = None) -> Tensor:
    """(B, H, L, L): how much of each value is in each output of a text that starts from nothing.

    The product with v is the output. For looking at: it costs L^2 memory and L^3 operations a head.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, beta = q.transpose(1, 2), k.transpose(1, 2), beta.transpose(1, 2)
    overlap = (beta[..., None] * (k @ k.mT)).tril(-1)
    eye = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
    corrected = torch.linalg.solve_triangular(eye + overlap, torch.diag_embed(beta), upper=False, unitriangular=True)
    return scale * (q @ k.mT).tril() @ corrected
