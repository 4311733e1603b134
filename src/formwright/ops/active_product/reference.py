"""The definition: a product in which factors of no more than ``tolerance`` count as zero."""

from __future__ import annotations

import torch
from torch import Tensor


def active_product_reference(h: Tensor, weight: Tensor, bias: Tensor | None, tolerance: float) -> Tensor:
    """h (..., in), weight (in, out), bias (out) -> (..., out)."""
    kept = h if tolerance == 0.0 else torch.where(h.abs() <= tolerance, 0.0, h)
    y = kept @ weight
    return y if bias is None else y + bias
