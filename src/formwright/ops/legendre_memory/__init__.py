"""The Legendre memory of a scalar signal: ``M_t = transition M_{t-1} + drive u_t``, fixed, for all steps at once.

Voelker, Kajic and Eliasmith, 2019; the parallel form: Chilkuri and Eliasmith, 2021 (2102.11417). No step waits for the
one before it, because the impulse response H_t = transition^t drive is known: M = H * u, a causal convolution. Up to
``DIRECT`` steps it is one product with a Toeplitz matrix of u (no output depends, even by rounding, on a later input);
up to ``BLOCK`` steps fast Fourier transforms along time, padded to twice the length; beyond that block after block,
each with the answer to the memory that it begins with, transition^t M_0, by repeated doubling, until nothing is left
of it after some ``theta`` steps. H is computed in float64 once for each (order, theta), and again when a longer one is
asked for.

Cost: B L min(L, DIRECT) order multiply-accumulates in the direct form, transforms of order x 2L values otherwise, and
behind a memory that is not empty order^2 for each step that it reaches, about 4 theta in a block. Memory: linear in
length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.ops.legendre_memory.reference import legendre_memory_reference, matrices
from formwright.ops.legendre_memory.response import Response, reach, response_of
from formwright.registry import Paper, register

__all__ = [
    "BLOCK",
    "DIRECT",
    "legendre_memory",
    "legendre_memory_macs",
    "legendre_memory_reference",
    "matrices",
    "reach",
]

#: Steps up to which one product costs less than transforms.
DIRECT = 64
#: Steps that are transformed at once; of a usual order, what a block makes on its way still lies in the caches.
BLOCK = 2048


@register(
    "op",
    "legendre-memory",
    paper=Paper("Chilkuri and Eliasmith", 2021, "2102.11417"),
    summary="Legendre coefficients of the last theta steps",
)
def legendre_memory(
    u: Tensor, order: int, theta: float, start: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """u (B, L), start (B, order) or None -> M (B, L, order), and the memory after each row's last step (B, order).

    ``lengths`` (B,): steps that each row brings, 0 included; anything at all may stand behind them. Half precision is
    computed in float32; the outputs have the dtype of ``u``, the last memory stays in float32. A value that is not
    finite spoils its row: all of it in the transformed form.
    """
    wide = u.float() if u.dtype in (torch.float16, torch.bfloat16) else u
    if lengths is not None:
        wide = wide.masked_fill(torch.arange(u.shape[1], device=u.device) >= lengths[:, None], 0.0)
    first = wide.new_zeros(len(u), order) if start is None else start.to(wide.dtype)
    response = response_of(order, theta, wide)
    made, now = [], start if start is None else first
    for block in wide.split(BLOCK, 1) if u.shape[1] else ():
        made.append(_block(block, response, now))
        now = made[-1][:, -1]
    memory = made[0] if len(made) == 1 else torch.cat([wide.new_zeros(len(u), 0, order), *made], 1)
    return memory.to(u.dtype), _last(memory, first, lengths)


def legendre_memory_macs(length: int, order: int, theta: float, started: bool) -> int:
    """Multiply-accumulates of one row of ``length`` steps; ``started``: behind a memory that is not empty."""
    blocks = _blocks(length)
    direct = sum(size * size for size in blocks if size <= DIRECT)
    behind = sum(reach(order, theta, size) for size in blocks[not started :])
    return direct * order + behind * order * order


def _blocks(length: int) -> list[int]:
    return [min(BLOCK, length - first) for first in range(0, length, BLOCK)]


def _block(u: Tensor, response: Response, start: Tensor | None) -> Tensor:
    length = u.shape[1]
    if length <= DIRECT:
        # Row t of the Toeplitz matrix is (0, ..., 0, u_0, ..., u_t), so the response meets it backwards.
        toeplitz = F.pad(u, (length - 1, 0)).unfold(1, length, 1)
        memory = (toeplitz.reshape(-1, length) @ response.impulse(length).flip(0)).unflatten(0, (len(u), length))
    else:
        seen = torch.fft.rfft(u, 2 * length)[..., None] * response.spectrum(length)
        memory = torch.fft.irfft(seen, 2 * length, dim=1)[:, :length]
    if start is None:
        return memory
    after = response.after(start, reach(response.order, response.theta, length))
    return memory + F.pad(after, (0, 0, 0, length - after.shape[1]))


def _last(memory: Tensor, first: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return memory[:, -1] if memory.shape[1] else first
    rows = torch.arange(len(memory), device=memory.device)
    return torch.cat((first[:, None], memory), 1)[rows, lengths]
