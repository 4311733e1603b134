"""What goes into a model and what comes out of a task, as plain records of tensors.

``Batch`` is the one input form: rows first, padded on the right with ``lengths``, or packed (one row of all tokens,
documents end to end, with ``offsets``). ``Score`` and ``Loss`` are what tasks and objectives give back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Batch:
    """One call's input.

    inputs: name -> tensor, rows first, e.g. ``tokens`` (B, L) int64, ``values`` (B, L, F), ``pixels`` (B, C, H, W);
        a tower's field is ``"query.tokens"``.
    lengths: name -> (B,) valid tokens of each row; absent means all.
    offsets: name -> (S+1,) borders of the documents of a packed input, whose tensor is (1, T).
    marks, condition: tensors passed to the context under the same names.
    targets: what an objective or a metric compares with. meta: one dict per row, never seen by a model.
    """

    inputs: Mapping[str, Tensor]
    lengths: Mapping[str, Tensor] = field(default_factory=lambda: EMPTY)
    marks: Mapping[str, Tensor] = field(default_factory=lambda: EMPTY)
    condition: Mapping[str, Tensor] = field(default_factory=lambda: EMPTY)
    targets: Mapping[str, Tensor] = field(default_factory=lambda: EMPTY)
    meta: tuple[dict, ...] = ()
    offsets: Mapping[str, Tensor] = field(default_factory=lambda: EMPTY)

    def replace(self, **changes: Any) -> Batch:
        return replace(self, **changes)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on ``device``."""
        moved: dict[str, Any] = {
            name: {key: value.to(device) for key, value in getattr(self, name).items()}
            for name in ("inputs", "lengths", "marks", "condition", "targets", "offsets")
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Loss:
    """``total`` is a sum over ``count`` items, so that accumulation and ranks weigh correctly; ``parts`` likewise."""

    total: Tensor
    count: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=lambda: EMPTY)


@dataclass(frozen=True)
class Score:
    """A metric's value, and per item where the metric is a mean over items (for paired bootstrap)."""

    value: float
    per_item: Tensor | None = None
    curves: Mapping[str, Tensor] = field(default_factory=lambda: EMPTY)
    extra: Mapping[str, float] = field(default_factory=lambda: EMPTY)


class View(Protocol):
    """How a task sees a model: models give ``encode`` and ``outputs``, the engine ``generate`` and ``act``."""

    def encode(self, batch: Batch) -> Tensor: ...
    def outputs(self, batch: Batch) -> Mapping[str, Tensor]: ...
    def generate(self, batch: Batch, **how: Any) -> list: ...
    def act(self, observation: Any, state: Any) -> tuple: ...


def pad(rows: list[list[int]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of ids of unequal length -> (B, Lmax) int64 padded with ``value`` on the right, and (B,) lengths."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    width = int(lengths.max()) if len(rows) else 0
    out = torch.full((len(rows), width), value, dtype=torch.long)
    for index, row in enumerate(rows):
        out[index, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return out, lengths


def pack(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids of unequal length -> (1, T) int64 end to end, and (S+1,) offsets."""
    flat = torch.tensor([token for row in rows for token in row], dtype=torch.long)[None]
    lengths = torch.tensor([0] + [len(row) for row in rows], dtype=torch.long)
    return flat, lengths.cumsum(0)
