"""DeiT's two classifiers: one reads the class token, one the distillation token, and the answer is their mean.

Touvron et al., 2020 (2012.12877). Cost: two products a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.parts.context import Context
from formwright.parts.heads.pooling import Head
from formwright.parts.linears.dense import Dense
from formwright.registry import Paper, register


@register("head", "distilled-classifier", paper=Paper("Touvron et al.", 2020, "2012.12877"))
class DistilledClassifier(Head):
    """(B, classes): the mean of ``out`` on each row's first token and ``taught`` on its second (its last if alone)."""

    kind = "sequence"
    examples = ({"classes": 3},)

    def __init__(self, width: int, *, classes: int, bias: bool = True, labels: list[str] | None = None) -> None:
        super().__init__()
        if classes < 1 or (labels is not None and len(labels) != classes):
            raise SpecError(f"classes={classes} must be at least 1 and equal the number of labels")
        self.labels = labels
        self.out = Dense(width, classes, bias, "out")
        self.taught = Dense(width, classes, bias, "taught")

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        flat = ctx.replace(lengths=None, offsets=None, borders=None)
        first, second = self._tokens(x, ctx)
        return (self.out(first, flat) + self.taught(second, flat)) / 2

    def _tokens(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """(B, W) twice; zeros for a row without tokens."""
        if ctx.offsets is not None:
            sizes, starts = ctx.offsets.diff(), ctx.offsets[:-1]
        else:
            full = torch.full((x.shape[0],), x.shape[1], dtype=torch.long, device=x.device)
            sizes, starts = full if ctx.lengths is None else ctx.lengths, torch.zeros_like(full)
        if x.shape[1] == 0:
            return (x.new_zeros(len(sizes), x.shape[2]),) * 2
        rows = torch.zeros_like(sizes) if ctx.offsets is not None else torch.arange(len(sizes), device=x.device)
        filled = (sizes > 0)[:, None]
        places = [starts.clamp(max=x.shape[1] - 1), (starts + (sizes - 1).clamp(0, 1)).clamp(max=x.shape[1] - 1)]
        first, second = (torch.where(filled, x[rows, place], 0.0) for place in places)
        return first, second
