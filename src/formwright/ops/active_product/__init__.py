"""A product that skips zeros: of a weight only the columns are read whose hidden unit is active.

    y = bias + sum over units u with |h_u| > tolerance of h_u w_u

What activation sparsity is worth at inference (Runwal et al., 2024, 2402.01911): with a tenth of the units active, a
tenth of the weight comes from memory, which is what one token's product costs. ``weight`` is held (in, out), so that a
unit's column lies together. ``native`` takes up to eight tokens; elsewhere the definition runs, a dense product. Cost:
out multiply-accumulates an active unit and token.
"""

from __future__ import annotations

from torch import Tensor

from formwright.ops.active_product.native import active_product_native
from formwright.ops.active_product.reference import active_product_reference
from formwright.registry import Paper, register

__all__ = ["active_product", "active_product_reference"]


@register(
    "op", "active_product", paper=Paper("Runwal et al.", 2024, "2402.01911"), summary="a product that skips zeros"
)
def active_product(h: Tensor, weight: Tensor, bias: Tensor | None = None, tolerance: float = 0.0) -> Tensor:
    """h (..., in), weight (in, out), bias (out) -> (..., out); NaN in ``h`` arrives, infinite columns of silent units
    do not."""
    made = active_product_native(h, weight, bias, tolerance)
    return active_product_reference(h, weight, bias, tolerance) if made is None else made
