"""Some rows of a batch as a batch of their own, padded or packed: what gradient caches and mixed batches are cut by.

Cost: one copy of the chosen rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from formwright.models.batch import Batch
from formwright.objectives.base import sizes_of

FIELDS = ("inputs", "marks", "condition", "targets")


def take(batch: Batch, rows: Sequence[int]) -> Batch:
    """The rows (documents, where the batch is packed) of ``batch`` in the order of ``rows``.

    A tensor with one entry a row is indexed, one with an entry a token of a packed field is cut along; anything else
    belongs to no row and stays.
    """
    meta = tuple(batch.meta[row] for row in rows) if batch.meta else ()
    count, chosen = len(sizes_of(batch)), torch.tensor(list(rows), dtype=torch.long)
    places = {int(offsets[-1]): _places(offsets, rows) for offsets in batch.offsets.values()}

    def own(value: Tensor) -> Tensor:
        if places and value.dim() > 1 and value.shape[0] == 1 and value.shape[1] in places:
            return value[:, places[value.shape[1]].to(value.device)]
        return value[chosen.to(value.device)] if value.dim() and len(value) == count else value

    changed = {name: {key: own(value) for key, value in getattr(batch, name).items()} for name in FIELDS}
    lengths = {key: value[chosen.to(value.device)] for key, value in batch.lengths.items()}
    offsets = {key: _borders(value, chosen.to(value.device)) for key, value in batch.offsets.items()}
    return batch.replace(meta=meta, lengths=lengths, offsets=offsets, **changed)


def _places(offsets: Tensor, rows: Sequence[int]) -> Tensor:
    borders = offsets.tolist()
    parts = [torch.arange(borders[row], borders[row + 1]) for row in rows]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)


def _borders(offsets: Tensor, chosen: Tensor) -> Tensor:
    sizes = offsets.diff()[chosen]
    return torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))
