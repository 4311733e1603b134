"""The selective scan token by token: the definition that every faster form is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def selective_scan_reference(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial: Tensor,
    lengths: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """x, delta, z (B, L, E), A (E, N), B and C (B, L, N), D (E,), initial (B, E, N), lengths (B,) -> y (B, L, E), zero
    in the padding, and the state after each row's last token (B, E, N)."""
    h, outputs = initial, []
    for t in range(x.shape[1]):
        step = F.softplus(delta[:, t]) if softplus else delta[:, t]
        new = torch.exp(step[..., None] * A) * h + step[..., None] * B[:, t, None] * x[:, t, :, None]
        h = torch.where((t < lengths)[:, None, None], new, h)
        y = (new * C[:, t, None]).sum(-1)
        y = y if D is None else y + D * x[:, t]
        y = y if z is None else y * F.silu(z[:, t])
        outputs.append(torch.where((t < lengths)[:, None], y, 0.0))
    return torch.stack(outputs, 1) if outputs else x, h
