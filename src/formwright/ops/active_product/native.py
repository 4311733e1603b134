"""The compiled form: float32 on the CPU, no gradient wanted; see ``native.cpp``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from formwright.ops import native

#: Tokens up to which skipping is tried; more share what a dense product reads.
TOKENS = 8


class _Product(native.Call):
    """The same struct as in ``native.cpp``."""

    _fields_ = native.fields(
        (ctypes.c_void_p, "h weight bias y"), (ctypes.c_int64, "tokens input output"), (ctypes.c_float, "tolerance")
    )


def active_product_native(h: Tensor, weight: Tensor, bias: Tensor | None, tolerance: float) -> Tensor | None:
    """As the definition, or None where the kernel does not take these or would not pay."""
    tokens = h.numel() // max(1, h.shape[-1])
    given = [h, weight] if bias is None else [h, weight, bias]
    if not 0 < tokens <= TOKENS or not weight.is_contiguous() or not native.usable(*given):
        return None
    y = torch.empty(*h.shape[:-1], weight.shape[1])
    call = _Product(tokens=tokens, input=weight.shape[0], output=weight.shape[1], tolerance=tolerance)
    call.give(h=h, weight=weight, bias=bias, y=y)
    call.run("fw_active_product")
    return y
