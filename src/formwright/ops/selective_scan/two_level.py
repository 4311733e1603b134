"""The selective scan in two levels of plain tensor operations: about 2 sqrt(L) steps, every dtype and device.

The length is cut into chunks. All chunks run at once from a zero state, token by token; then the chunk's first states
are carried from chunk to chunk; what a first state adds to an output is C_t exp(A sum Delta) h_first. Decays over
several tokens are exponentials of a sum, so nothing is divided and nothing grows. No tensor holds a state for every
token, except what autograd keeps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.ops.rows import clear


def two_level_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial: Tensor,
    lengths: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes as in ``reference``; ``lengths`` None: all tokens are real."""
    x, B, C = clear(x, lengths), clear(B, lengths), clear(C, lengths)
    step = clear(F.softplus(delta) if softplus else delta, lengths)  # a step of 0 leaves the state as it is
    y, final = _states(x, step, A, B, C, initial)
    y = y if D is None else y + D * x
    y = y if z is None else y * F.silu(clear(z, lengths))
    return y, final


def _states(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence and its readout, without skip and gate."""
    length = x.shape[1]
    size = math.isqrt(max(length - 1, 0)) + 1
    added, step, B, C = (_chunks(t, size) for t in (step * x, step, B, C))  # each (B, chunks, size, ...)
    total = step.cumsum(2)
    h = x.new_zeros(*added.shape[:2], *A.shape)
    own = []
    for t in range(size):
        h = _decay(step[:, :, t], A) * h + added[:, :, t, :, None] * B[:, :, t, None]
        own.append(_read(h, C[:, :, t]))
    decay = _decay(total[:, :, -1], A)
    firsts, state = [], initial
    for chunk in range(h.shape[1]):
        firsts.append(state)
        state = decay[:, chunk] * state + h[:, chunk]
    first = torch.stack(firsts, 1) if firsts else h
    y = torch.stack([mine + _read(_decay(total[:, :, t], A) * first, C[:, :, t]) for t, mine in enumerate(own)], 2)
    return y.flatten(1, 2)[:, :length], state


def _decay(step: Tensor, A: Tensor) -> Tensor:
    """(..., E), (E, N) -> (..., E, N)."""
    return torch.exp(step[..., None] * A)


def _read(h: Tensor, C: Tensor) -> Tensor:
    """(..., E, N), (..., N) -> (..., E)."""
    return (h * C[..., None, :]).sum(-1)


def _chunks(t: Tensor, size: int) -> Tensor:
    """(B, L, F) -> (B, ceil(L / size), size, F), zeros at the end."""
    return F.pad(t, (0, 0, 0, -t.shape[1] % size)).unflatten(1, (-1, size))
