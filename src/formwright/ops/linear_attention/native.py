"""The causal product by the compiled kernel: float32 on the CPU, any widths and lengths; see ``native.cpp``."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from formwright.ops import native


class Call(native.Call):
    """The struct of the same name in ``native.cpp``."""

    _fields_ = native.fields(
        (c_void_p, "a b c out state offsets"),
        (c_int64, "a_token a_head b_token b_head c_token c_head documents heads inner outer"),
        (c_int, "reverse"),
    )


def causal_product_native(
    a: Tensor, b: Tensor, c: Tensor, start: Tensor | None, borders: Sequence[int] | None, reverse: bool
) -> tuple[Tensor, Tensor] | None:
    """As ``causal_product``, or None where the kernel does not apply."""
    if not native.usable(a, b, c, *([] if start is None else [start])):
        return None
    rows, length, heads, inner = a.shape
    outer = c.shape[-1]
    borders = range(0, (rows + 1) * length, length) if borders is None and length else borders or [0] * (rows + 1)
    documents = len(borders) - 1
    out = torch.empty(rows, length, heads, outer)
    state = torch.empty(documents, heads, inner, outer)
    state = state.zero_() if start is None else state.copy_(start)
    a, b, c = (_flat(t) for t in (a, b, c))
    call = Call(
        a=a.data_ptr(), b=b.data_ptr(), c=c.data_ptr(), a_token=a.stride(1), a_head=a.stride(2),
        b_token=b.stride(1), b_head=b.stride(2), c_token=c.stride(1), c_head=c.stride(2),
        documents=documents, heads=heads, inner=inner, outer=outer, reverse=reverse,
    )  # fmt: skip
    call.give(out=out, state=state, offsets=borders)
    call.run("fw_causal_product")
    return out, state


def _flat(t: Tensor) -> Tensor:
    """``t`` (B, L, H, D) where one stride leads from token to token through all rows; a copy where none does."""
    plain = t.stride(3) == 1 and (len(t) == 1 or t.stride(0) == t.shape[1] * t.stride(1))
    return t if plain else t.contiguous()
