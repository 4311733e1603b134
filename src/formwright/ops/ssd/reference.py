"""The state-space dual written out twice: step by step, and as masked linear attention over the whole sequence.

Both are definitions that the faster forms are compared with: any dtype, no blocks, no tricks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logarithms(dt: Tensor, A: Tensor, resets: Tensor | None) -> Tensor:
    """Logarithms of the decays (B, L, H); nothing passes a token that begins a document."""
    logs = dt * A
    return logs if resets is None else logs.masked_fill(resets[..., None], float("-inf"))


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    start: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, a token at a time; shapes as in :func:`formwright.ops.ssd.ssd`."""
    B, C, state = _per_head(x, B, C, start)
    decay = logarithms(dt, A, resets).exp()
    out = []
    for t in range(x.shape[1]):
        written = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        if resets is not None:
            state = state.masked_fill(resets[:, t, None, None, None], 0.0)
        state = decay[:, t, :, None, None] * state + written
        out.append((state * C[:, t, :, None]).sum(-1))
    y = torch.stack(out, 1) if out else torch.zeros_like(x)
    return (y if D is None else y + D[:, None] * x), state


def ssd_quadratic(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    start: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The dual form: C are queries, B keys and Δ x values of linear attention under a mask of products of decays."""
    B, C, state = _per_head(x, B, C, start)
    length = x.shape[1]
    if length == 0:
        return torch.zeros_like(x), state
    decay = logarithms(dt, A, resets).exp().transpose(1, 2)  # (B, H, L)
    mask = torch.stack([_row(decay, t) for t in range(length)], 2)
    values = dt[..., None] * x
    y = torch.einsum("bhij,bihn,bjhn,bjhp->bihp", mask, C, B, values)
    since = decay.cumprod(-1)
    y = y + torch.einsum("bhi,bhpn,bihn->bihp", since, state, C)
    final = torch.einsum("bhj,bjhp,bjhn->bhpn", mask[:, :, -1], values, B) + since[:, :, -1, None, None] * state
    return (y if D is None else y + D[:, None] * x), final


def _row(decay: Tensor, t: int) -> Tensor:
    """What is left at place ``t`` of each earlier token: the product of the decays after it."""
    later = decay[..., 1 : t + 1].flip(-1).cumprod(-1).flip(-1)
    ahead = decay.new_zeros(*decay.shape[:-1], decay.shape[-1] - t - 1)
    return torch.cat((later, torch.ones_like(decay[..., :1]), ahead), -1)


def _per_head(x: Tensor, B: Tensor, C: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """B and C for every head (B, L, H, N), and the state before the first token."""
    rows, _, heads, width = x.shape
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    return B, C, x.new_zeros(rows, heads, width, B.shape[-1]) if start is None else start
