"""How far one model's hidden stream is from another's, a token at a time, and what bridges two widths.

    relative: |s - t|^2 / |t|^2        mse: |s - t|^2 / width        cosine: 1 - s . t / (|s| |t|)

Cost: one pass over the streams; a bridge is a product of the two widths a token, dropped after training.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.kit.errors import SpecError, unknown
from formwright.parts.context import Context, keyed_generator

KINDS = ("relative", "mse", "cosine")


def check_kind(kind: str) -> str:
    """``kind`` itself, or SpecError with the nearest name."""
    if kind not in KINDS:
        raise SpecError(unknown("difference of hidden streams", kind, KINDS))
    return kind


def difference(kind: str, ours: Tensor, theirs: Tensor, ctx: Context, chosen: Tensor | None = None) -> Tensor:
    """The difference of each token's streams, summed over the ``chosen`` (B, L) tokens, or without them each row's
    mean, summed over rows; an empty row counts 0."""
    theirs = theirs.to(ours.dtype)
    if kind == "cosine":
        gap = 1.0 - F.cosine_similarity(ours, theirs, dim=-1)
    elif kind == "mse":
        gap = (ours - theirs).square().mean(-1)
    else:
        gap = (ours - theirs).square().sum(-1) / theirs.square().sum(-1).clamp(min=1e-12)
    if chosen is not None:
        return gap[chosen].sum()
    if ctx.offsets is not None:
        sizes = ctx.offsets.diff()
        return (torch.segment_reduce(gap[0], "sum", lengths=sizes) / sizes.clamp(min=1)).sum()
    valid = ctx.valid(ours)
    return (torch.where(valid, gap, 0.0).sum(1) / valid.sum(1).clamp(min=1)).sum()


def relative_error(ours: Tensor, theirs: Tensor, ctx: Context, chosen: Tensor | None = None) -> Tensor:
    """:func:`difference` of the relative kind."""
    return difference("relative", ours, theirs, ctx, chosen)


class Same:
    """The bridge between streams of one width."""

    def __call__(self, id: str, x: Tensor) -> Tensor:
        return x


class Projections(nn.Module):
    """A linear an item, from one width to another; ``bridge(id, x)`` brings x (..., ours) to (..., theirs)."""

    def __init__(self, ids: Iterable[str], ours: int, theirs: int, seed: int = 0) -> None:
        super().__init__()
        self.weights = nn.ParameterDict()
        for id in ids:
            weight = nn.init.orthogonal_(torch.empty(theirs, ours), generator=keyed_generator(seed, f"projection.{id}"))
            self.weights[_key(id)] = nn.Parameter(weight)

    def forward(self, id: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[_key(id)])


def projections(student: Any, teacher: Any, hidden: Iterable[str], seed: int = 0) -> Projections:
    """Bridges from the student's width to the teacher's after its items ``hidden``, orthogonal at the start."""
    return Projections(hidden, student.width, teacher.width, seed).to(student.device)


def _key(id: str) -> str:
    return id.replace(".", "/")
