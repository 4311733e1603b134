"""The state-space dual in chunks of ``q`` tokens: matrix products inside a chunk, one state carried between chunks.

Inside a chunk ``M_ij`` is the product of the decays after j up to i (0 above the diagonal); its first column says what
of the state at the chunk's start reaches i, its last row what of j reaches the chunk's end. It is a running product, or
where it is differentiated the exponential of a masked running sum: never a difference of two sums, which cancels.

The backward pass keeps the states between chunks only. The gradient of the logarithm of decay k sums what passes it:
pairs of tokens on either side, tokens and the chunk's borders, and both borders. No difference of sums here either.

Documents are apart where each begins a chunk, see ``documents``; elsewhere as long as all of a chunk is finite.

Cost a token and head of width P with states of N, G groups for H heads: q P + 2 P N multiply-accumulates forward (and
q N G / H once a group), about twice that backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.ops.ssd.reference import logarithms


class Pieces(NamedTuple):
    """One call cut into chunks: b rows, n chunks, q tokens, G groups of R heads."""

    values: Tensor  # (b, n, q, G, R, P): Δ x
    keys: Tensor  # (b, n, G, q, N)
    queries: Tensor  # (b, n, G, q, N)
    mask: Tensor  # (b, n, G, R, q, q)
    into: Tensor  # (b, n, q, G, R, 1): from the chunk's start to each token
    out: Tensor  # (b, n, q, G, R, 1): from each token to the chunk's end
    through: Tensor  # (b, n, G, R, 1, 1): from start to end


def cut(t: Tensor, q: int) -> Tensor:
    """(b, L, ...) -> (b, n, q, ...), filled up with zeros: a token with Δ = 0 changes nothing."""
    short = -t.shape[1] % q
    if short:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, short))
    return t.unflatten(1, (-1, q))


def join(t: Tensor, length: int) -> Tensor:
    """(b, n, q, G, R, ...) -> (b, L, H, ...)."""
    return t.flatten(1, 2)[:, :length].flatten(2, 3)


def merged(t: Tensor) -> Tensor:
    """(b, n, q, G, R, P) -> (b, n, G, q, R P): the heads of a group side by side, for one product."""
    return t.flatten(-2).transpose(2, 3)


def parted(t: Tensor, width: int) -> Tensor:
    """The inverse of :func:`merged`."""
    return t.transpose(2, 3).unflatten(-1, (-1, width))


def headed(t: Tensor) -> Tensor:
    """(b, n, q, G, R, P) -> (b, n, G, R, q, P)."""
    return t.permute(0, 1, 3, 4, 2, 5)


def unheaded(t: Tensor) -> Tensor:
    """The inverse of :func:`headed`."""
    return t.permute(0, 1, 4, 2, 3, 5)


def between(logs: Tensor) -> Tensor:
    """Logarithms of decays (..., q) -> (..., q, q): products of the decays after j up to i."""
    q = logs.shape[-1]
    lower = torch.ones(q, q, dtype=torch.bool, device=logs.device).tril()
    after = lower.tril(-1)
    spread = logs[..., None].expand(*logs.shape, q)
    if torch.is_grad_enabled() and logs.requires_grad:
        return spread.masked_fill(~after, 0.0).cumsum(-2).masked_fill(~lower, float("-inf")).exp()
    return spread.exp().masked_fill_(~after, 1.0).cumprod(-2).mul_(lower)


def pieces(x: Tensor, dt: Tensor, logs: Tensor, B: Tensor, C: Tensor, q: int) -> Pieces:
    groups = B.shape[2]
    values = cut(x * dt[..., None], q).unflatten(3, (groups, -1))
    decays = cut(logs, q).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)
    mask = between(decays)
    first = decays[..., :1].exp()
    keys, queries = (cut(t, q).transpose(2, 3) for t in (B, C))
    into, out = first * mask[..., 0], mask[..., -1, :]
    through = into[..., -1:, None]
    into, out = (t.permute(0, 1, 4, 2, 3)[..., None] for t in (into, out))
    return Pieces(values, keys, queries, mask, into, out, through)


def chunked_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    start: Tensor | None,
    resets: Tensor | None,
    *,
    q: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, L, H, P), the final state (b, H, P, N), and the state before each chunk (b, n, G, R P, N)."""
    rows, length, heads, width = x.shape
    groups, size = B.shape[2:]
    p = pieces(x, dt, logarithms(dt, A, resets), B, C, q)
    weights = (p.queries @ p.keys.mT)[:, :, :, None] * p.mask
    y = unheaded(weights @ headed(p.values))
    written = merged(p.values * p.out).mT @ p.keys
    shape = (rows, groups, heads // groups * width, size)
    state = x.new_zeros(shape) if start is None else start.reshape(shape)
    through = p.through.expand(-1, -1, -1, -1, width, 1).flatten(3, 4)
    begin = _begin(resets, q)
    states = []
    for index in range(p.values.shape[1]):
        state = state if begin is None else state.masked_fill(begin[:, index], 0.0)
        states.append(state)
        state = torch.addcmul(written[:, index], through[:, index], state)
    before = torch.stack(states, 1)
    y = y + p.into * parted(p.queries @ before.mT, width)
    y = join(y, length)
    if D is not None:
        y = torch.addcmul(y, D[:, None], x)
    return y.contiguous(), state.reshape(rows, heads, width, size), before


def chunked_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    start: Tensor | None,
    resets: Tensor | None,
    *,
    before: Tensor,
    q: int,
) -> tuple[Tensor, ...]:
    """Gradients of x, Δ, A, B, C, D and the start, from those of y and the final state."""
    length, width = x.shape[1], x.shape[3]
    p = pieces(x, dt, logarithms(dt, A, resets), B, C, q)
    dys = cut(dy, q).unflatten(3, (B.shape[2], -1))
    # Within a chunk: y = W X with W = (C B^T) * M.
    weights = (p.queries @ p.keys.mT)[:, :, :, None] * p.mask
    dvalues = unheaded(weights.mT @ headed(dys))
    dweights = headed(dys) @ headed(p.values).mT
    dlogs = crossing(weights.mul_(dweights))
    dscores = dweights.mul_(p.mask).sum(3)
    del weights, dweights
    # Through the states between chunks, last first.
    entering, leaving = merged(dys * p.into), merged(p.values * p.out)
    dread = entering.mT @ p.queries
    through = p.through.expand(-1, -1, -1, -1, width, 1).flatten(3, 4)
    dstate = torch.zeros_like(dread[:, 0]) if dfinal is None else dfinal.reshape(dread[:, 0].shape)
    begin = _begin(resets, q)
    dstates = []
    for index in reversed(range(dread.shape[1])):
        dstates.append(dstate)
        dstate = torch.addcmul(dread[:, index], through[:, index], dstate)
        dstate = dstate if begin is None else dstate.masked_fill(begin[:, index], 0.0)
    after = torch.stack(dstates[::-1], 1)
    dC = dscores @ p.keys + entering @ before
    dB = dscores.mT @ p.queries + leaving @ after
    read, written = p.queries @ before.mT, p.keys @ after.mT
    dvalues = join(dvalues + p.out * parted(written, width), length)
    # Decays between the chunk's start and each token, between each token and the end, and from start to end.
    late = parted(entering * read, width).sum(-1).flip(2).cumsum(2).flip(2)
    early = parted(leaving * written, width).sum(-1).cumsum(2)
    whole = (through * before * after).unflatten(3, (-1, width)).sum((-2, -1))
    dlogs = dlogs + late + F.pad(early, (0, 0, 0, 0, 1, -1)) + whole[:, :, None]
    dlogs = join(dlogs, length)
    dx = dt[..., None] * dvalues
    if D is not None:
        dx = torch.addcmul(dx, D[:, None], dy)
    ddt, dA, dD = of_decays(x, dt, A, dy, (x * dvalues).sum(-1), dlogs, resets)
    dB, dC = (t.transpose(2, 3).flatten(1, 2)[:, :length] for t in (dB, dC))
    dstart = dstate.reshape(*x.shape[:1], *x.shape[2:], B.shape[3])
    return dx, ddt, dA, dB, dC, dD, dstart


def _begin(resets: Tensor | None, q: int) -> Tensor | None:
    """(b, n, 1, 1, 1): chunks that begin with a document, into which no state passes."""
    return None if resets is None else resets[:, ::q, None, None, None]


class Chunked(NamedTuple):
    """The form in chunks of ``q`` tokens by PyTorch's operations: any dtype and device."""

    q: int

    def takes(self, *tensors: Tensor | None) -> bool:
        return True

    def forward(self, *given: Any, keep: bool) -> tuple[Tensor, ...]:
        return chunked_forward(*given, q=self.q)

    def backward(self, dy: Tensor, dfinal: Tensor | None, *tensors: Any) -> tuple[Tensor, ...]:
        *given, before = tensors
        return chunked_backward(dy, dfinal, *given, before=before, q=self.q)


def of_decays(
    x: Tensor, dt: Tensor, A: Tensor, dy: Tensor, toward: Tensor, dlogs: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of Δ, A and D; ``toward`` is that of Δ as a factor of x, ``dlogs`` that of the decays' logarithms."""
    if resets is not None:
        dlogs = dlogs.masked_fill(resets[..., None], 0.0)
    return torch.addcmul(toward, A, dlogs), (dt * dlogs).sum((0, 1)), (dy * x).sum((0, 1, 3))


def crossing(pairs: Tensor) -> Tensor:
    """(b, n, G, R, q, q) -> (b, n, q, G, R): at k the sum over i >= k > j, all pairs whose product holds decay k."""
    q = pairs.shape[-1]
    ones = pairs.new_ones(q, q)
    return (ones.triu() @ pairs).mul_(ones.tril(-1)).sum(-1).permute(0, 1, 4, 2, 3)
