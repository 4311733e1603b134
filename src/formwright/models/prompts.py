"""Prompts put before the rows of a call, and taken off again behind the last layer.

Between the two every part sees longer texts: lengths, borders, positions and marks are those of prompt and text. What
heads, pools and losses see has the places of the text alone. In a stream a prompt comes before a row's first token
only. Cost: one copy of the ids, and one of the last states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.parts.adapters.prompt import Prompted
from formwright.parts.context import Context, Led

#: What a stem reads for every token beside its id; a prompt has zeros there.
ALONG = ("types",)


def lead(table: Prompted, inputs: Mapping[str, Tensor], ctx: Context) -> tuple[dict[str, Tensor], Context]:
    """``inputs`` and the context with prompts before the rows; the positions of the texts move behind them."""
    ids = inputs["tokens"]
    packed = ctx.offsets is not None
    rows = len(ids) if ctx.offsets is None else len(ctx.offsets) - 1
    first, counts = (t.to(ids.device) for t in table.firsts(rows, ctx))
    if ctx.state is not None:
        counts = torch.where(ctx.state.seen == 0, counts, 0)
    longest = int(counts.max()) if len(counts) else 0
    if longest == 0:
        return dict(inputs), ctx
    fields: dict[str, Any] = {"visible": _rule(ctx, counts)}
    source = _packed(ctx, counts, fields) if packed else _padded(ids, ctx, counts, longest, fields)

    def moved(t: Tensor, fill: Tensor | int = 0) -> Tensor:
        """``t`` (rows, L, ...) at its new places, ``fill`` at those of the prompts."""
        index = source.clamp(min=0)
        shifted = t[torch.arange(len(t), device=t.device)[:, None], index]
        return torch.where((source < 0).reshape(*source.shape, *[1] * (t.dim() - 2)), fill, shifted).to(t.dtype)

    # Places before the text are negative: -count for the first of a prompt, -1 for the last.
    size = torch.repeat_interleave(counts, fields["offsets"].diff())[None] if packed else counts[:, None]
    start = torch.repeat_interleave(first, fields["offsets"].diff())[None] if packed else first[:, None]
    made = {name: moved(inputs[name]) for name in inputs if name in ALONG}
    made["tokens"] = moved(ids, start + size + source)
    fields["marks"] = {name: moved(mark) for name, mark in ctx.marks.items()}
    if ctx.positions is not None:
        fields["positions"] = moved(ctx.positions.expand(ids.shape) + 0, size + source) + size * (source >= 0)
    before = {name: getattr(ctx, name) for name in fields}
    return {**inputs, **made}, ctx.replace(**fields, led=Led(counts, before))


def _rule(ctx: Context, counts: Tensor) -> Any:
    """The rule of visibility in the new places."""
    rule = ctx.visible
    if rule.segments is not None or rule.context is not None:
        raise SpecError("a model with a prompt takes no rule of segments or context; undo the prompt for this call")
    if rule.prefix is None:
        return rule
    return replace(rule, prefix=torch.as_tensor(rule.prefix, device=counts.device) + counts)


def _padded(ids: Tensor, ctx: Context, counts: Tensor, longest: int, fields: dict[str, Any]) -> Tensor:
    """(B, longest + L): where each new place comes from in its row, negative for a prompt."""
    lengths = ctx.lengths
    if lengths is None and bool((counts != longest).any()):
        lengths = torch.full_like(counts, ids.shape[1])
    fields["lengths"] = None if lengths is None else lengths + counts
    steps = torch.arange(longest + ids.shape[1], device=ids.device)[None] - counts[:, None]
    return steps.clamp(max=max(ids.shape[1] - 1, 0))


def _packed(ctx: Context, counts: Tensor, fields: dict[str, Any]) -> Tensor:
    """(1, T'): the same in the packed layout; a prompt's places are negative from the end of the document before."""
    assert ctx.offsets is not None
    sizes = ctx.offsets.diff() + counts
    offsets = torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))
    fields["offsets"], fields["borders"] = offsets, tuple(accumulate(sizes.tolist(), initial=0))
    inside = torch.arange(int(offsets[-1]), device=offsets.device) - torch.repeat_interleave(offsets[:-1], sizes)
    own = inside - torch.repeat_interleave(counts, sizes)
    begin = torch.repeat_interleave(ctx.offsets[:-1], sizes)
    return torch.where(own < 0, own, begin + own)[None]


def follow(x: Tensor, ctx: Context) -> tuple[Tensor, Context]:
    """The stream and the context of the texts alone, as they were before :func:`lead`."""
    led = ctx.led
    if led is None:
        return x, ctx
    if ctx.offsets is not None:
        sizes = ctx.offsets.diff()
        inside = torch.arange(x.shape[1], device=x.device) - torch.repeat_interleave(ctx.offsets[:-1], sizes)
        x = x[:, inside >= torch.repeat_interleave(led.counts, sizes)]
    else:
        length = x.shape[1] - int(led.counts.max())
        steps = led.counts[:, None] + torch.arange(length, device=x.device)[None]
        x = x[torch.arange(len(x), device=x.device)[:, None], steps]
    return x, ctx.replace(**{"positions": None, **led.fields}, led=None)
