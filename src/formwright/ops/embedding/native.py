"""Summed embeddings by the compiled kernel: float32 on the CPU; see ``native.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from formwright.ops import native
from formwright.ops.embedding.reference import Source


class _Source(ctypes.Structure):
    """The same struct as in ``native.cpp``."""

    _fields_ = (("table", c_void_p), ("steps", c_void_p), ("ids", c_void_p), ("rows", c_int64), ("factor", c_float))


def embedding_native(sources: Sequence[Source], gain: Tensor | None, shift: Tensor | None, eps: float) -> Tensor | None:
    """As the definition, or None where the kernel does not take these. IndexError for a row that a table lacks."""
    ids, kept = sources[0].ids, []
    floats = [t for t in (gain, shift) if t is not None]
    for table, steps, rows, _ in sources:
        floats.append(table if steps is None else steps)
        if not table.is_contiguous() or (steps is not None and table.dtype != torch.int8):
            return None
        if rows is not None and (ids is None or rows.dtype != torch.int64 or rows.shape != ids.shape):
            return None
        kept.append(None if rows is None else rows.contiguous())
    if ids is None or not native.usable(*floats):
        return None
    call, width = (_Source * len(kept))(), sources[0].table.shape[1]
    for held, (table, steps, _, factor), rows in zip(call, sources, kept):
        held.table, held.rows, held.factor = table.data_ptr(), len(table), factor
        held.steps = None if steps is None else steps.data_ptr()
        held.ids = None if rows is None else rows.data_ptr()
    y = torch.empty(*ids.shape, width)
    lacking = native.library().fw_embedding(
        call, c_int64(len(kept)), c_int64(ids.numel()), c_int64(width),
        ctypes.byref(native.Norm.of(gain, shift, eps)), c_void_p(y.data_ptr()), torch.get_num_threads(),
    )  # fmt: skip
    if lacking >= 0:
        raise IndexError(f"an id is outside the {call[lacking].rows} rows of its embedding table")
    return y
