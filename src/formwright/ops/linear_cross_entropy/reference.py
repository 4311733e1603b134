"""The definition of the last product with its cross entropy, in plain PyTorch: all logits at once."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    smoothing: float = 0.0,
    z: float = 0.0,
    ignored: int = -100,
) -> Tensor:
    """x (N, W), weight (V, W), targets (N,) -> the sum over rows whose target is not ``ignored``."""
    logits = F.linear(x, weight, bias)
    logits = logits if logits.dtype.itemsize >= 4 else logits.float()
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing, ignore_index=ignored)
    if z:
        loss = loss + z * logits[targets != ignored].logsumexp(-1).square().sum()
    return loss
