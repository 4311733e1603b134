"""Selective scan: a diagonal linear recurrence whose step, input and readout depend on the token.

    h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t        per channel e and state n
    y_t = (sum_n C_t[n] h_t[n] + D x_t) SiLU(z_t)         Delta = softplus(delta)

Gu and Dao, "Mamba", 2023 (2312.00752). ``reference`` is the definition, ``two_level`` the general form. Cost: about 9
operations per token, channel and state; linear in length, and the state of a stream does not grow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from formwright.kit.errors import SpecError, all_of
from formwright.ops.rows import check_rows, repack, row_count, unpack
from formwright.ops.selective_scan.reference import selective_scan_reference
from formwright.ops.selective_scan.two_level import two_level_scan
from formwright.registry import Paper, register

__all__ = ["selective_scan", "selective_scan_reference"]


@register(
    "op", "selective_scan", paper=Paper("Gu and Dao", 2023, "2312.00752"), summary="input-dependent diagonal recurrence"
)
def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    initial: Tensor | None = None,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    softplus: bool = True,
) -> tuple[Tensor, Tensor]:
    """x and delta (B, L, E), A (E, N), B and C (B, L, N), D (E,) -> y (B, L, E) and the state after each row (B, E, N).

    ``delta`` is what softplus is applied to (its bias included), or the step itself with ``softplus=False``; steps are
    at least 0 and A below 0 in any use. ``z`` (B, L, E): the gate, y times SiLU(z). ``initial`` (B, E, N): the state
    before the first token (zeros). ``lengths`` (B,): tokens beyond are padding, read by nobody; their outputs are zero.
    ``offsets`` (S+1,): documents end to end in (1, T, ...), each with its own state, so that ``initial`` and the state
    returned are (S, E, N). The last axis may be a slice of a wider tensor at no cost.

    Half precision is computed in float32: y has the type of x, the state is float32 (float64 where x is). Gradients
    flow to every tensor, to ``initial`` and from the state returned. Raises SpecError where shapes do not fit.
    """
    check(x, delta, A, B, C, D, z, initial, lengths, offsets)
    exact = torch.promote_types(x.dtype, torch.float32)
    if initial is None:
        initial = x.new_zeros(row_count(x, offsets), *A.shape, dtype=exact)
    tensors = [None if t is None else t.to(exact) for t in (x, delta, A, B, C, D, z, initial)]
    y, final = _general(*tensors, lengths, offsets, softplus)
    return y.to(x.dtype), final


def _general(x, delta, A, B, C, D, z, initial, lengths, offsets, softplus) -> tuple[Tensor, Tensor]:
    if offsets is None:
        return two_level_scan(x, delta, A, B, C, D, z, initial, lengths, softplus)
    x, delta, B, C = (unpack(t, offsets) for t in (x, delta, B, C))
    z = None if z is None else unpack(z, offsets)
    y, final = two_level_scan(x, delta, A, B, C, D, z, initial, offsets.diff(), softplus)
    return repack(y, offsets), final


def check(x, delta, A, B, C, D, z, initial, lengths, offsets) -> None:
    """Every complaint about the shapes at once."""
    if x.dim() != 3 or A.dim() != 2 or A.shape[0] != x.shape[2]:
        raise SpecError(f"selective_scan: x is {tuple(x.shape)} and A {tuple(A.shape)}, not (B, L, E) and (E, N)")
    if A.is_complex():
        raise SpecError("selective_scan: A is complex, but only real decays are computed")
    check_rows("selective_scan", x, lengths, offsets, initial)
    rows, states = row_count(x, offsets), A.shape[1]
    wanted = {
        "delta": (delta, tuple(x.shape)),
        "B": (B, (*x.shape[:2], states)),
        "C": (C, (*x.shape[:2], states)),
        "D": (D, (x.shape[2],)),
        "z": (z, tuple(x.shape)),
        "initial": (initial, (rows, *A.shape)),
    }
    problems = [
        f"selective_scan: {name} has shape {tuple(t.shape)}, not {shape}"
        for name, (t, shape) in wanted.items()
        if t is not None and tuple(t.shape) != shape
    ]
    all_of(SpecError, problems)
