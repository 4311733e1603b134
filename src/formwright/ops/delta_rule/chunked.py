"""The delta rule in chunks of tokens, as matrix products; forwards and backwards, in PyTorch.

In a chunk of rows Q, K, V with rates b, let M = (I + tril(diag(b) K K^T, -1))^-1 and T = M diag(b). Reading the
incoming state S, the chunk writes X = T V - (T K) S under its keys:

    O = scale (Q S + tril(Q K^T) X),    S <- S + K^T X

All but X and S is made for every chunk at once, and only these two wait for the chunk before. The backward pass walks
the chunks in reverse with the gradient of S and makes the rest at once as well; it keeps the inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

#: q, k, v, beta and state -> outputs and the last state
Run = Callable[..., tuple[Tensor, Tensor]]

#: Tokens of a chunk; a shorter text is one chunk of its own length.
CHUNK = 64


class Chunks(NamedTuple):
    """All chunks of a call, (N, B, H, C, D), and what does not depend on the state."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    solved: Tensor  # M
    corrected: Tensor  # T
    reads: Tensor  # T K
    writes: Tensor  # T V
    weights: Tensor  # tril(Q K^T)


def _split(t: Tensor, size: int) -> Tensor:
    """(B, L, H, D) -> (N, B, H, size, D), zeros behind the last token."""
    t = F.pad(t, (0, 0, 0, 0, 0, -t.shape[1] % size))
    return t.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4)


def _join(t: Tensor, length: int) -> Tensor:
    """The way back, without what was padded."""
    return t.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]


def _prepare(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float, size: int) -> Chunks:
    size = min(size, q.shape[1])
    q, k, v, beta = (_split(t, size) for t in (q * scale, k, v, beta[..., None]))
    eye = torch.eye(size, dtype=k.dtype, device=k.device)
    overlap = beta * (k @ k.mT)
    # Only what lies below the diagonal is read.
    solved = torch.linalg.solve_triangular(overlap, eye.expand_as(overlap), upper=False, unitriangular=True)
    corrected = solved * beta.mT
    reads, writes = (corrected @ torch.cat((k, v), -1)).split((k.shape[-1], v.shape[-1]), -1)
    return Chunks(q, k, v, beta, solved, corrected, reads, writes, (q @ k.mT).tril())


def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, scale: float, size: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H, dv) and the last state, by operations that PyTorch can differentiate any number of times."""
    length = q.shape[1]
    if length == 0:
        return torch.zeros_like(v), state
    if length == 1:
        return step(q, k, v, beta, state, scale)
    given, found = _prepare(q, k, v, beta, scale, size), []
    for q, k, reads, writes, weights in zip(given.q, given.k, given.reads, given.writes, given.weights):
        written = writes - reads @ state
        found.append(q @ state + weights @ written)
        state = state + k.mT @ written
    return _join(torch.stack(found), length), state


def step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One token, L = 1, by the recurrence itself."""
    q, k, v, beta = (t.transpose(1, 2) for t in (q, k, v, beta[..., None]))
    state = state + k.mT * (beta * (v - k @ state))
    return scale * (q @ state).transpose(1, 2), state


class Chunked(torch.autograd.Function):
    """:func:`chunkwise` with the backward pass by hand; under ``create_graph`` the forward one is differentiated."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, scale: float, size: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, beta, state)
        ctx.scale, ctx.size = scale, size
        out, last = chunkwise(q, k, v, beta, state, scale, size)
        return out, last.clone() if last is state else last

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            run = partial(chunkwise, scale=ctx.scale, size=ctx.size)
            return *again(run, ctx.saved_tensors, ctx.needs_input_grad, d_out, d_last), None, None
        return *chunked_backward(ctx.saved_tensors, ctx.scale, ctx.size, d_out, d_last), None, None


def again(
    run: Run, inputs: Sequence[Tensor], needed: Sequence[bool], d_out: Tensor, d_last: Tensor
) -> list[Tensor | None]:
    """Gradients of the inputs by differentiating ``run``; they can be differentiated again where that is wanted."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not graph:
            inputs = [t.detach().requires_grad_(need) for t, need in zip(inputs, needed)]
        outputs = zip(run(*inputs), (d_out, d_last))
    pairs = [(y, d) for y, d in outputs if y.requires_grad]
    wanted = [t for t, need in zip(inputs, needed) if need]
    grads = torch.autograd.grad(
        [y for y, _ in pairs], wanted, [d for _, d in pairs], create_graph=graph, allow_unused=True
    )
    found = iter(grads)
    return [next(found) if need else None for need in needed[: len(inputs)]]


def documents(run: Run, inputs: Sequence[Tensor], borders: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``run`` on packed documents as rows, padded to the longest with tokens that write nothing."""
    *packed, state = inputs
    sizes = [stop - start for start, stop in pairwise(borders)]
    if not sizes:
        return torch.zeros_like(packed[2]), state
    rows = [pad_sequence(t[0].split(sizes), batch_first=True) for t in packed]
    out, last = run(*rows, state)
    return torch.cat([row[:size] for row, size in zip(out, sizes)])[None], last


def chunked_backward(
    inputs: Sequence[Tensor], scale: float, size: int, d_out: Tensor, d_last: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, beta and state from those of the outputs and of the last state.

    With the error E of every token before its write, X = diag(b) E. dX and the gradient dS of the state go from chunk
    to chunk, and then, with dR = T^T dX and G = -tril(dR X^T, -1):

        dP = tril(dO X^T),  dQ = dO S^T + dP K,  dV = dR,  db = sum_v (M^T dX) E
        dK = dP^T Q + (G + G^T) K + X dS^T - dR S^T
    """
    q, k, v, beta, state = inputs
    length = q.shape[1]
    if length == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(beta), d_last
    given = _prepare(q, k, v, beta, scale, size)
    states, written = [], []
    for key, reads, writes in zip(given.k, given.reads, given.writes):
        states.append(state)
        written.append(writes - reads @ state)
        state = state + key.mT @ written[-1]
    before, x = torch.stack(states), torch.stack(written)

    d_o = _split(d_out, x.shape[-2])
    own, pushed = given.weights.mT @ d_o, given.q.mT @ d_o
    after, d_x, d_state = [], [], d_last
    for index in reversed(range(len(x))):
        after.append(d_state)
        d_x.append(own[index] + given.k[index] @ d_state)
        d_state = d_state + pushed[index] - given.reads[index].mT @ d_x[-1]
    d_after, d_written = torch.stack(after[::-1]), torch.stack(d_x[::-1])

    solved = given.solved.mT @ d_written
    d_v = given.beta * solved
    error = given.v - given.k @ before - (given.k @ given.k.mT).tril(-1) @ x
    d_weights, pairs = (d_o @ x.mT).tril(), -(d_v @ x.mT).tril(-1)
    d_q = d_o @ before.mT + d_weights @ given.k
    d_k = d_weights.mT @ given.q + (pairs + pairs.mT) @ given.k + x @ d_after.mT - d_v @ before.mT
    d_beta = (solved * error).sum(-1, keepdim=True)
    d_q, d_k, d_v, d_beta = (_join(t, length) for t in (scale * d_q, d_k, d_v, d_beta))
    return d_q, d_k, d_v, d_beta[..., 0], d_state


def products(length: int, dk: int, dv: int) -> int:
    """Multiply-accumulates of the forward pass of one head over ``length`` tokens, in matrix products.

    The triangular solve of a chunk, C^3 / 3 at most, is none.
    """
    if length <= 1:
        return 2 * length * dk * dv
    size = min(CHUNK, length)
    return -(-length // size) * (size**2 * (3 * dk + 2 * dv) + 3 * size * dk * dv)
