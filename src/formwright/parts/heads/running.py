"""Classifiers that can answer at any time: a linear of the mean of all tokens so far.

The mean of linears is the linear of the mean, so one product a row is enough (LMUFormer: Liu, Datta, Li and Beerel,
2024, 2402.04882, classifies every token and averages). In a stream each call answers for everything seen until then,
and the last call gives what one pass gives. Cost: one product a row; a stream remembers the sum and the count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.parts.base import dropout
from formwright.parts.context import Context
from formwright.parts.heads.pooling import Head, pool
from formwright.parts.linears.dense import Dense
from formwright.parts.norms.batch import BatchNorm
from formwright.parts.spikes import LIF
from formwright.registry import Paper, register


@register(
    "head",
    "running-classifier",
    paper=Paper("Liu, Datta, Li and Beerel", 2024, "2402.04882"),
    summary="one label a row, at any time of a stream",
)
class RunningClassifier(Head):
    """(B, classes) logits of the mean token; slot ``out``. A row that has seen nothing answers with the bias."""

    kind = "sequence"
    examples: tuple[dict, ...] = ({"classes": 3}, {"classes": 4, "labels": ["a", "b", "c", "d"]})

    def __init__(
        self, width: int, *, classes: int, dropout: float = 0.0, bias: bool = True, labels: list[str] | None = None
    ) -> None:
        super().__init__()
        if classes < 1 or (labels is not None and len(labels) != classes):
            raise SpecError(f"classes={classes} must be at least 1 and equal the number of labels")
        self.rate, self.labels = dropout, labels
        self.out = Dense(width, classes, bias, "out")

    def seen(self, x: Tensor, ctx: Context) -> Tensor:
        """What is averaged of the tokens (B, L, W)."""
        return x

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        inner, flat = ctx.at("head"), ctx.replace(lengths=None, offsets=None, borders=None)
        x = self.seen(x, inner)
        mean = pool(x, ctx, "mean") if ctx.state is None else self._so_far(x, inner)
        return self.out(dropout(mean, self.rate, inner, self.training, "dropout"), flat)

    def _so_far(self, x: Tensor, ctx: Context) -> Tensor:
        new = torch.cat((ctx.clear(x), ctx.valid(x)[..., None].to(x.dtype)), -1).sum(1)
        total = ctx.slot("total", lambda: torch.zeros_like(new)) + new
        ctx.keep("total", total)
        return total[:, :-1] / total[:, -1:].clamp(min=1)


@register(
    "head",
    "spiking-classifier",
    paper=Paper("Liu, Datta, Li and Beerel", 2024, "2402.04882"),
    summary="one label a row from firing rates",
)
class SpikingClassifier(RunningClassifier):
    """The same of what neurons fire: (B, classes) logits of firing rates; a batch norm before the neurons."""

    examples = ({"classes": 3},)

    def __init__(
        self,
        width: int,
        *,
        classes: int,
        tau: float = 2.0,
        dropout: float = 0.0,
        bias: bool = True,
        labels: list[str] | None = None,
    ) -> None:
        super().__init__(width, classes=classes, dropout=dropout, bias=bias, labels=labels)
        self.norm = BatchNorm(width)
        self.lif = LIF("stream", tau=tau)

    def seen(self, x: Tensor, ctx: Context) -> Tensor:
        return self.lif(self.norm(x, ctx), ctx)
