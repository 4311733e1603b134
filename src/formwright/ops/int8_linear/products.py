"""Exact integer products q_x q_w^T by the fastest route a machine has.

- ``onednn``: unsigned by signed bytes, the zero point of the unsigned side taken out by the kernel. Processors with
  VNNI add the products of bytes in 32 bits, so 127 levels a side are exact. Without VNNI (AVX2, older AVX-512) the
  kernel adds two neighbouring products in 16 bits, which clips: with ``u <= 128`` no pair exceeds 2 x 128 x 127 < 2^15,
  so inputs get 64 levels a side (7 bits) there and stay exact. Which holds is not read from a flag but tried, once,
  with the inputs that would clip.
- ``int_mm``: signed bytes on CUDA, padded to the shapes the kernel takes.
- ``float``: the integers as float32, in runs of columns short enough that float32 holds every partial sum.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from formwright.ops.int8_linear.reference import WEIGHT_LEVELS, product_reference

#: Input levels a side that each kind of processor multiplies exactly, best first.
ONEDNN_LEVELS = (127, 64)
#: Columns whose products, at most 127^2 each, add up below 2^24.
FLOAT_RUN = 1024
#: Rows that the packed layout is made for; it serves any number.
PACKED_ROWS = 128


def _offset(levels: int) -> int:
    return 128 if levels == 127 else levels


def _pack(weight: Tensor) -> Any:
    return torch.ops.onednn.qlinear_prepack(weight.contiguous(), [PACKED_ROWS, weight.shape[1]])


def _onednn(q_x: Tensor, offset: int, packed: Any, scale: Tensor, zeros: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_pointwise(
        q_x, 1.0, offset, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.lru_cache(maxsize=1)
def onednn_levels() -> int | None:
    """The input levels that oneDNN multiplies exactly on this processor, or None where the route does not exist."""
    for levels in ONEDNN_LEVELS:
        try:
            if all(_tried(levels, rows, columns, out) for rows, columns, out in ((1, 64, 32), (40, 192, 48))):
                return levels
        except (RuntimeError, AttributeError, NotImplementedError):
            return None
    return None


def _tried(levels: int, rows: int, columns: int, out: int) -> bool:
    """Whether the inputs most likely to clip multiply exactly: all extreme, and extreme with mixed signs."""
    q_w = torch.full((out, columns), WEIGHT_LEVELS, dtype=torch.int8)
    q_w[1::2] = -WEIGHT_LEVELS
    q_w[2::4, ::3] = -WEIGHT_LEVELS
    q_x = torch.full((rows, columns), levels)
    q_x[1::3] = -levels
    q_x[2::3, ::2] = -levels
    made = _onednn(
        (q_x + _offset(levels)).to(torch.uint8),
        _offset(levels),
        _pack(q_w),
        torch.ones(out),
        torch.zeros(out, dtype=torch.int32),
    )
    return torch.equal(made, product_reference(q_x, q_w).float())


def route(device: torch.device) -> tuple[str, int]:
    """(name of the route, input levels a side) for tensors on ``device``."""
    if device.type == "cpu":
        levels = onednn_levels()
        return ("float", WEIGHT_LEVELS) if levels is None else ("onednn", levels)
    return ("int_mm" if device.type == "cuda" else "float"), WEIGHT_LEVELS


class Product:
    """A weight q_w (O, K) int8 laid out once for its route.

    ``offset`` is what must be added to the signed inputs, ``dtype`` how they must come. Called with q_x (T, K) and
    s_w (O,), it gives (T, O) float32: the exact integer, rounded once to float32, times s_w.
    """

    def __init__(self, weight: Tensor, by: str | None = None, levels: int | None = None) -> None:
        name, most = route(weight.device)
        self.name = "float" if 0 in weight.shape else by or name
        self.levels = most if levels is None else levels
        self.offset = _offset(self.levels) if self.name == "onednn" else 0
        self.dtype = torch.uint8 if self.name == "onednn" else torch.int8
        self.weight = weight
        self.packed: Any = None
        if self.name == "onednn":
            self.packed = _pack(weight)
            self.zeros = torch.zeros(weight.shape[0], dtype=torch.int32)
        elif self.name == "int_mm":
            self.packed = _padded(weight, 0, 8).T

    def __call__(self, q_x: Tensor, scale: Tensor) -> Tensor:
        if self.name == "onednn":
            return _onednn(q_x, self.offset, self.packed, scale, self.zeros)
        if self.name == "int_mm":
            rows = max(32, q_x.shape[0] + -q_x.shape[0] % 8)
            made = torch._int_mm(_padded(q_x, rows, 8), self.packed)
            return made[: q_x.shape[0], : self.weight.shape[0]].float().mul_(scale)
        return _by_float(q_x, self.weight).float().mul_(scale)


def _padded(q: Tensor, rows: int, multiple: int) -> Tensor:
    """``q`` with zero rows up to ``rows`` (or the next multiple) and zero columns up to a multiple."""
    below = rows - q.shape[0] if rows else -q.shape[0] % multiple
    return torch.nn.functional.pad(q, (0, -q.shape[1] % multiple, 0, below))


def _by_float(q_x: Tensor, q_w: Tensor) -> Tensor:
    """(T, O) int32, exact: runs of columns whose sums float32 holds, added as integers."""
    total = torch.zeros(q_x.shape[0], q_w.shape[0], dtype=torch.int32, device=q_x.device)
    for first in range(0, q_w.shape[1], FLOAT_RUN):
        run = slice(first, first + FLOAT_RUN)
        total += (q_x[:, run].float() @ q_w[:, run].float().T).to(torch.int32)
    return total
