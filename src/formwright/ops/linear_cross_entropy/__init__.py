"""The last product of a language model and its cross entropy in one: no more than a few rows of logits at a time.

    sum over n of  l_n - (1 - smoothing) logits_n[target_n] - smoothing mean(logits_n) + z l_n^2,
    logits_n = weight x_n + bias,   l_n = logsumexp(logits_n)

The gradients of states and weight are made in the same pass (Hsu et al., 2024, 2410.10989; Wijmans et al., 2024,
2411.09009), so logits are neither kept nor made twice. Label smoothing: Szegedy et al., 2015 (1512.00567); z-loss:
Chowdhery et al., 2022 (2204.02311). ``reference`` is the definition, ``chunked`` runs. Half precision: products are in
the inputs' dtype, everything else in float32. Cost: 3 N V W multiply-accumulates with the gradient, N V W without;
memory: ``logits`` numbers and a gradient of the weight, whatever N is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.ops.linear_cross_entropy.chunked import Chunked, Settings, passes
from formwright.ops.linear_cross_entropy.reference import linear_cross_entropy_reference
from formwright.registry import Paper, register

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]

#: Logits at a time: on a processor about what stays in its cache, elsewhere enough rows for a full product.
CPU, OTHER = 1 << 21, 1 << 25
#: Fewer rows than this would make the products slow, however large the vocabulary is.
ROWS = 128


@register(
    "op",
    "linear_cross_entropy",
    paper=Paper("Hsu et al.", 2024, "2410.10989"),
    summary="the last product and its cross entropy, without the logits",
)
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    smoothing: float = 0.0,
    z: float = 0.0,
    ignored: int = -100,
    logits: int | None = None,
) -> Tensor:
    """x (N, W), weight (V, W), targets (N,) int64, bias (V,) -> the sum over rows whose target is not ``ignored``.

    A scalar, float32 for half precision. ``logits``: numbers of logits held at once at most. Raises SpecError for
    shapes that do not fit, IndexError for a target that is no row of the weight.
    """
    check(x, weight, targets, bias, smoothing)
    kept = targets != ignored
    if not bool(kept.all()):
        x, targets = x[kept], targets[kept]
    if not len(targets):
        return x.sum(
            dtype=torch.float32 if x.dtype.itemsize < 4 else x.dtype
        )  # 0, and still a graph to go back through
    if torch._C._are_functorch_transforms_active():  # which cannot look into a pass of one's own
        return linear_cross_entropy_reference(x, weight, targets, bias, smoothing=smoothing, z=z)
    low, high = torch.aminmax(targets)
    if low < 0 or high >= len(weight):
        raise IndexError(f"linear_cross_entropy: target {int(low if low < 0 else high)} is none of {len(weight)} rows")
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        narrow = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(narrow), weight.to(narrow), None if bias is None else bias.to(narrow)
    rows = max(ROWS, (CPU if kind == "cpu" else OTHER) // len(weight))
    if logits is not None:
        rows = min(rows, max(1, logits // len(weight)))
    settings, tensors = Settings(smoothing, z, rows), (x, weight, bias)
    with torch.autocast(kind, enabled=False):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return Chunked.apply(settings, targets, *tensors)
        return passes(settings, targets, *tensors, (False, False, False))[0]


def check(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, smoothing: float) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise SpecError(
            f"linear_cross_entropy: x {tuple(x.shape)} and weight {tuple(weight.shape)} must be (N, W) and (V, W)"
        )
    if targets.shape != x.shape[:1]:
        raise SpecError(f"linear_cross_entropy: targets {tuple(targets.shape)} must be ({len(x)},), one a row of x")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise SpecError(f"linear_cross_entropy: bias {tuple(bias.shape)} must be ({len(weight)},), one a row of weight")
    if not 0.0 <= smoothing <= 1.0:
        raise SpecError(f"linear_cross_entropy: smoothing={smoothing} must lie between 0 and 1")
