"""Short causal depthwise convolution over time: every channel mixes its last few tokens.

    y_t[c] = act(bias[c] + sum_j weight[c, j] x_{t-K+1+j}[c])

The last tap multiplies the present token. Recurrent mixers put one before their recurrence (Gu and Dao, 2023,
2312.00752; Poli et al., 2023, 2302.10866). ``reference`` is the definition, ``shifted`` the
general form, a sum of K shifted products, ``native`` a compiled one that reads and writes every token once, ``triton``
the same on a GPU. Half precision is computed in float32.
Cost: K multiply-adds a token and channel, no products of matrices; state: the last K-1 tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.ops.causal_conv.native import Tensors
from formwright.ops.causal_conv.reference import causal_conv_reference
from formwright.ops.causal_conv.shifted import shifted_conv
from formwright.ops.passes import run
from formwright.ops.rows import check_rows, repack, row_count, unpack
from formwright.registry import Paper, register

__all__ = ["causal_conv", "causal_conv_reference"]

#: Longest kernel: short ones are summed tap by tap, which is no way to apply a long one.
WIDEST = 8


@register(
    "op", "causal_conv", paper=Paper("Gu and Dao", 2023, "2312.00752"), summary="short causal depthwise convolution"
)
def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """x (B, L, C), weight (C, K), bias (C,) -> y (B, L, C) and the window after each row (B, K-1, C).

    ``initial`` (B, K-1, C) is the window before it, oldest first (zeros). ``lengths`` (B,): tokens beyond are padding,
    read by nobody; their outputs are zero. ``offsets`` (S+1,): documents end to end in x (1, T, C), each with its own
    window, so that ``initial`` and the result are (S, K-1, C). ``silu``: apply x * sigmoid(x) at the end. Raises
    SpecError where shapes do not fit or K is not 2 .. 8.
    """
    check(x, weight, bias, lengths, offsets, initial)
    if initial is None:
        initial = x.new_zeros(row_count(x, offsets), weight.shape[1] - 1, x.shape[2])

    def general(*tensors: Any) -> tuple[Tensor, Tensor]:
        return _general(Tensors(*tensors), lengths, offsets, silu)

    return run("causal_conv", general, Tensors(x, weight, bias, initial.to(x.dtype)), lengths, offsets, silu)


def _general(tensors: Tensors, lengths: Tensor | None, offsets: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """The shifted form in either layout."""
    if offsets is None:
        return shifted_conv(*tensors, lengths, silu)
    y, final = shifted_conv(*tensors._replace(x=unpack(tensors.x, offsets)), offsets.diff(), silu)
    return repack(y, offsets), final


def check(x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Any, offsets: Any, initial: Tensor | None) -> None:
    channels, taps = weight.shape
    if not 2 <= taps <= WIDEST:
        raise SpecError(f"causal_conv: a kernel of {taps} taps is not 2 to {WIDEST}")
    if x.dim() != 3 or x.shape[2] != channels:
        raise SpecError(f"causal_conv: x has shape {tuple(x.shape)}, but the weight is for (B, L, {channels})")
    if bias is not None and bias.shape != (channels,):
        raise SpecError(f"causal_conv: bias has shape {tuple(bias.shape)}, not ({channels},)")
    check_rows("causal_conv", x, lengths, offsets, initial)
    if initial is not None and initial.shape[1:] != (taps - 1, channels):
        raise SpecError(f"causal_conv: initial has shape {tuple(initial.shape)}, not (rows, {taps - 1}, {channels})")
