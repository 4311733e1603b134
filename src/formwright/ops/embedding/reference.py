"""The definition of summed embeddings, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


class Source(NamedTuple):
    """table (R, W) float, or int8 with steps (R,); ids (B, L), or None for its first row everywhere."""

    table: Tensor
    steps: Tensor | None
    ids: Tensor | None
    factor: float = 1.0


def embedding_reference(
    sources: Sequence[Source], gain: Tensor | None = None, shift: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """The sum over ``sources`` of ``factor * steps[ids] * table[ids]``, then LayerNorm where there is a ``gain``."""
    rows = [_rows(source) for source in sources]
    total = sum(rows[1:], rows[0])
    return total if gain is None else F.layer_norm(total, gain.shape, gain, shift, eps)


def _rows(source: Source) -> Tensor:
    table, steps, ids, factor = source
    rows = table[0] if ids is None else F.embedding(ids, table)
    if steps is not None:
        rows = rows.to(steps.dtype) * (steps[0] if ids is None else steps[ids][..., None])
    return rows if factor == 1.0 else rows * factor
