"""The short causal convolution step by step: the definition that every faster form is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor, lengths: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    """x (B, L, C), weight (C, K), initial (B, K-1, C), lengths (B,) -> y (B, L, C), zero in the padding, and the last
    K-1 tokens of every row (B, K-1, C)."""
    rows, finals = [], []
    for row, window, length in zip(x, initial, lengths.tolist()):
        outputs = []
        for token in row[:length]:
            seen = torch.cat((window, token[None]))
            made = (seen * weight.T).sum(0)
            made = made if bias is None else made + bias
            outputs.append(F.silu(made) if silu else made)
            window = seen[1:]
        blank = [x.new_zeros(x.shape[2])] * (x.shape[1] - length)
        rows.append(torch.stack([*outputs, *blank]) if x.shape[1] else row)
        finals.append(window)
    return (torch.stack(rows), torch.stack(finals)) if rows else (x, initial)
