"""Selective scan: a diagonal linear recurrence whose step, input and readout depend on the token.

    h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t        per channel e and state n
    y_t = (sum_n C_t[n] h_t[n] + D x_t) SiLU(z_t)         Delta = softplus(delta)

Gu and Dao, "Mamba", 2023 (2312.00752). ``reference`` is the definition, ``two_level`` the general form, ``native`` a
compiled one that keeps states only between chunks, ``triton`` the same on a GPU. Cost: about 9 operations per token,
channel and state; linear in length, and the state of a stream does not grow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from formwright.kit.errors import SpecError, all_of
from formwright.ops.gpu import on_gpu
from formwright.ops.passes import run
from formwright.ops.rows import check_rows, repack, row_count, unpack
from formwright.ops.selective_scan.native import Tensors
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
    tensors = Tensors(x, delta, A, B, C, D, z, initial.to(exact))

    def general(*given: Any) -> tuple[Tensor, Tensor]:
        y, final = _general(_as(exact, Tensors(*given)), lengths, offsets, softplus)
        return y.to(given[0].dtype), final

    if not on_gpu(x):  # where kernels read half precision as it is
        tensors = _as(exact, tensors)
    y, final = run("selective_scan", general, tensors, lengths, offsets, softplus)
    return y.to(x.dtype), final


def _as(dtype: torch.dtype, tensors: Tensors) -> Tensors:
    return Tensors(*(t if t is None else t.to(dtype) for t in tensors))  # type: ignore[arg-type]


def _general(tensors: Tensors, lengths: Tensor | None, offsets: Tensor | None, softplus: bool) -> tuple[Tensor, Tensor]:
    """The two-level form in either layout."""
    if offsets is None:
        return two_level_scan(*tensors, lengths, softplus)
    unpacked = {
        name: unpack(t, offsets)
        for name, t in tensors._asdict().items()
        if name in ("x", "delta", "B", "C", "z") and t is not None
    }
    y, final = two_level_scan(*tensors._replace(**unpacked), offsets.diff(), softplus)
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
