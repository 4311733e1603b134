"""The short causal convolution as a sum of shifted products: every dtype and device, any number of derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.ops.rows import clear


def shifted_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor, lengths: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """x (B, L, C), weight (C, K), initial (B, K-1, C) -> y (B, L, C) and the last K-1 tokens of every row."""
    length, taps = x.shape[1], weight.shape[1]
    seen = torch.cat((initial.to(x.dtype), clear(x, lengths)), 1)
    exact = torch.promote_types(x.dtype, torch.float32)
    wide, weight = seen.to(exact), weight.to(exact)
    y = wide[:, :length] * weight[:, 0]
    for tap in range(1, taps):
        y = y + wide[:, tap : tap + length] * weight[:, tap]
    y = y if bias is None else y + bias.to(exact)
    y = F.silu(y) if silu else y
    return clear(y, lengths).to(x.dtype), _last(seen, taps - 1, lengths)


def _last(seen: Tensor, count: int, lengths: Tensor | None) -> Tensor:
    """The last ``count`` of each row's tokens, of which ``lengths`` follow the ``count`` first columns."""
    if lengths is None:
        return seen[:, seen.shape[1] - count :]
    index = lengths[:, None, None] + torch.arange(count, device=seen.device)[None, :, None]
    return seen.gather(1, index.expand(-1, -1, seen.shape[2]))
