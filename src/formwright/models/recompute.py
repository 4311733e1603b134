"""Gradient checkpointing: spans of items keep their input only, and run once more in the backward pass.

Chen et al., 2016, 1604.06174. The pass is cut between items of the flat list. Noise is keyed, so a span draws the same
the second time, and what it says to the side (notes, losses, averages) it says the first time only. Gradients that
travel inside the context are kept: the graph of the first pass is the one that goes back, and only what it had saved is
made anew. Cost: one more forward pass; kept are one stream a span and the activations of one span.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from formwright.models.items import Item, run
from formwright.parts.context import Context


def run_spans(items: Iterable[Item], x: Tensor, ctx: Context, every: int) -> tuple[Tensor, Context]:
    """``x`` and ``ctx`` through ``items``, in spans of ``every``.

    A pass that keeps no gradient, that streams, or whose inner notes are asked for runs as it always does.
    """
    asked = ctx.notes is not None and bool(ctx.notes.want)
    if every < 1 or asked or ctx.state is not None or ctx.recompute or not torch.is_grad_enabled():
        return run(items, x, ctx)
    rest = iter(items)
    while span := list(islice(rest, every)):
        x, ctx = _again(span, x, ctx)
    return x, ctx


def _again(span: Sequence[Item], x: Tensor, ctx: Context) -> tuple[Tensor, Context]:
    passes = iter((ctx,))

    def through(x: Tensor) -> tuple[Tensor, Context]:
        return run(span, x, next(passes, None) or ctx.replace(recompute=True))

    return checkpoint(through, x, use_reentrant=False)
