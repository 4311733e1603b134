"""The 8-bit linear map written out: the definition that every faster form is compared with.

A weight W (O, K) is kept as int8 ``q_w`` with one step a row (or one for all)::

    s_w[o] = max_k |W[o, k]| / 127        q_w[o, k] = round(W[o, k] / s_w[o])

and an input x (T, K) is quantised at every call with one step a row (or one for all) to ``levels`` steps a side::

    s_x[t] = max_k |x[t, k]| / levels     q_x[t, k] = round(x[t, k] / s_x[t])
    y[t, o] = s_x[t] s_w[o] sum_k q_x[t, k] q_w[o, k] + b[o]

Rounding is to the nearest even. The shifted ("zeropoint") schemes spread the same steps over [min, max]: every value
is ``s (q - z)`` with an integer z, and the sum is corrected by the sums of rows and columns. Outlier columns take no
part in any of this: they are multiplied in float by the dequantised weight and added. Where they are known beforehand
they do not share the steps of their rows either: column k has a gain ``g_k <= 1`` and stands for ``s_w[o] g_k
q_w[o, k]``, since large inputs tend to meet small weights, of which a row's step would leave little.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from formwright.kit.errors import SpecError, unknown

#: Steps a side of a weight: [-127, 127], so that -128 never occurs.
WEIGHT_LEVELS = 127
#: Added to x / s and read back from the low byte: rounds to the nearest even integer while below 2^22.
MAGIC = 12582912.0
#: Least range of an input row. A row of zeros has range 0 and must come out as zeros.
TINY = 1e-30


@dataclass(frozen=True)
class Scheme:
    """Where steps are shared. rows: one step an input row (else one a call). columns: one a weight row (else one a
    matrix). shifted: asymmetric ranges with zero points."""

    rows: bool
    columns: bool
    shifted: bool = False


#: The paper's grid. "vector" is LLM.int8(); each runs with and without outlier columns.
SCHEMES: dict[str, Scheme] = {
    "vector": Scheme(True, True),
    "row": Scheme(True, False),
    "tensor": Scheme(False, False),
    "zeropoint": Scheme(False, False, shifted=True),
    "zeropoint-vector": Scheme(True, True, shifted=True),
}


def scheme_named(name: str) -> Scheme:
    """The scheme, or a SpecError with the nearest name."""
    if name not in SCHEMES:
        raise SpecError(unknown("int8 scheme", name, SCHEMES))
    return SCHEMES[name]


def quantize_weight(weight: Tensor, scheme: Scheme = SCHEMES["vector"]) -> tuple[Tensor, Tensor, Tensor | None]:
    """weight (O, K) float -> q_w (O, K) int8, s_w (O,) float32, z_w (O,) float32 integers (None unless shifted)."""
    wide = weight.detach().double()
    if not bool(torch.isfinite(wide).all()):
        raise SpecError("a weight with NaN or infinite entries cannot be quantised")
    out = wide.shape[0]
    if wide.numel() == 0:
        empty = torch.ones(out, device=wide.device)
        return wide.to(torch.int8), empty, torch.zeros_like(empty) if scheme.shifted else None
    low, high = wide.amin(1, keepdim=True), wide.amax(1, keepdim=True)
    if not scheme.columns:
        low, high = low.amin().expand(out, 1), high.amax().expand(out, 1)
    if scheme.shifted:
        step = ((high - low) / (2 * WEIGHT_LEVELS)).float().double().clamp_min(TINY)
        zero = torch.round(-WEIGHT_LEVELS - low / step)
    else:
        step = (torch.maximum(high, -low) / WEIGHT_LEVELS).float().double().clamp_min(TINY)
        zero = torch.zeros_like(step)
    q = torch.round(wide / step + zero).clamp_(-WEIGHT_LEVELS, WEIGHT_LEVELS).to(torch.int8)
    return q, step[:, 0].float(), zero[:, 0].float() if scheme.shifted else None


def quantize_columns(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Outlier columns (O, n) float of a weight with steps (O,) -> q_w (O, n) int8, gains g > 0 (n,) float32."""
    wide = weight.detach().double() / scale.double()[:, None]
    gains = (wide.abs().amax(0) / WEIGHT_LEVELS).float().clamp_min(TINY) if len(wide) else wide.new_ones(wide.shape[1])
    q = torch.round(wide / gains.double()).clamp_(-WEIGHT_LEVELS, WEIGHT_LEVELS)
    return q.to(torch.int8), gains.float()


def dequantize_weight(weight: Tensor, scale: Tensor, zero: Tensor | None = None, gains: Tensor | None = None) -> Tensor:
    """(O, K) in the dtype of ``scale``: s_w (q_w - z_w), and s_w g q_w in columns whose gain (K,) is not 0."""
    wide = weight.to(scale.dtype)
    if zero is not None:
        wide = wide - (zero[:, None] if gains is None else zero[:, None] * (gains == 0))
    if gains is not None:
        wide = wide * torch.where(gains == 0, 1.0, gains.to(scale.dtype))
    return wide * scale[:, None]


def input_range(x: Tensor, scheme: Scheme, levels: int) -> tuple[Tensor, Tensor | None]:
    """x (T, K) float32 -> steps a unit (T or 1, 1) float32, z_x (T or 1, 1) float32 integers (None unless shifted).

    NaN where a row (or, without row steps, the call) holds NaN or infinity. This float32 arithmetic is part of the
    definition: every backend must find the same integers.
    """
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    if not scheme.rows:
        low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
    reach = torch.maximum(high, low.neg())
    defined = reach < torch.inf
    reach = torch.where(defined, reach, torch.nan).clamp_min_(TINY)
    if not scheme.shifted:
        return levels / reach, None
    # A narrow range far from zero would need a zero point beyond float32's integers, hence the second bound.
    per_unit = torch.minimum(2 * levels / (high - low).clamp_min_(TINY), 2**20 / reach)
    return per_unit, torch.round(-levels - low * per_unit)


def quantize_input_reference(x: Tensor, scheme: Scheme, levels: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """x (T, K) -> q_x (T, K) int64 in [-levels, levels], s_x and z_x (T or 1, 1) float32."""
    per_unit, zero = input_range(x.float(), scheme, levels)
    q = torch.round(x.float() * per_unit)
    q = q if zero is None else (q + zero).clamp_(-levels, levels)
    return q.nan_to_num(0.0).long(), per_unit.reciprocal(), zero


def product_reference(q_x: Tensor, q_w: Tensor) -> Tensor:
    """(T, K) integers, (O, K) integers -> (T, O) int64, exact (float64 holds every integer below 2^53)."""
    return torch.round(q_x.double() @ q_w.double().T).long()


def outlier_columns(x: Tensor, threshold: float) -> Tensor:
    """x (T, K) -> indices of the columns with an entry of magnitude >= threshold (or NaN); none for threshold 0."""
    if threshold <= 0 or x.shape[0] == 0:
        return torch.zeros(0, dtype=torch.long, device=x.device)
    reach = torch.maximum(x.amax(0), x.amin(0).neg_())
    return torch.nonzero(~(reach < threshold))[:, 0]


def int8_linear_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    scheme: str = "vector",
    zero: Tensor | None = None,
    gains: Tensor | None = None,
    outliers: Tensor | None = None,
    levels: int = 127,
) -> Tensor:
    """x (T, K), q_w (O, K), s_w (O,), z_w (O,) -> y (T, O) float64.

    Outlier columns: those with a gain, or those of the indices ``outliers``.
    """
    if gains is not None:
        outliers = torch.nonzero(gains)[:, 0]
    columns = torch.zeros(0, dtype=torch.long) if outliers is None else outliers
    q_x, s_x, z_x = quantize_input_reference(x.index_fill(1, columns, 0.0), scheme_named(scheme), levels)
    scale = scale.double()
    zero = torch.zeros_like(scale) if zero is None else zero.double()
    centred = q_x.double() if z_x is None else q_x.double() - z_x.double()
    dense = dequantize_weight(weight, scale, zero, None if gains is None else gains.double())
    y = centred @ (weight.double() - zero[:, None]).T * s_x.double() * scale
    y = y + x.double()[:, columns] @ dense[:, columns].T
    return y if bias is None else y + bias.double()
