"""The selective scan against mambapy's parallel scan and the token-by-token definition: forward, forward and backward.

Outputs and gradients are checked before a time is printed. Run: ``python -m benchmarks.scan --threads 2``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import arguments, race, show
from formwright.ops.selective_scan import selective_scan, selective_scan_reference

#: (batch, length, channels, states)
SHAPES = ((1, 256, 256, 16), (1, 1024, 256, 16), (1, 4096, 256, 16))
#: Longest for the definition, which takes time for every token.
LONGEST = 256


def drawn(batch: int, length: int, channels: int, states: int) -> list[Tensor]:
    """x, delta, A, B, C, D and z as a Mamba layer has them at its start."""
    token, memory = (batch, length, channels), (batch, length, states)
    decay = -torch.arange(1.0, states + 1).repeat(channels, 1)
    x, delta, B, C, z = (torch.randn(shape) for shape in (token, token, memory, memory, token))
    return [x, delta - 4.0, decay, B, C, torch.ones(channels), z]


def ours(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    return selective_scan(x, delta, A, B, C, D, z=z)[0]


def definition(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    lengths = torch.full((len(x),), x.shape[1])
    return selective_scan_reference(x, delta, A, B, C, D, z, x.new_zeros(len(x), *A.shape), lengths, True)[0]


def parallel(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    """The scan of a mambapy block: every state of every token in memory."""
    from mambapy.pscan import pscan

    step = F.softplus(delta)[..., None]
    h = pscan(torch.exp(step * A), step * B[:, :, None] * x[..., None])
    return ((h @ C[..., None]).squeeze(-1) + D * x) * F.silu(z)


def gradients(form: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    held = [t.detach().requires_grad_() for t in tensors]
    y = form(*held)
    return [y.detach(), *torch.autograd.grad(y.sum(), held)]


def agreement(found: list[Tensor], wanted: list[Tensor]) -> float:
    return min(float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in zip(found, wanted))


def lines(rounds: int) -> Iterator[list[dict[str, Any]]]:
    for shape in SHAPES:
        tensors = drawn(*shape)
        forms = {"formwright": ours, "mambapy": parallel}
        forms |= {"definition": definition} if shape[1] <= LONGEST else {}
        wanted = gradients(parallel, [t.double() for t in tensors])
        agree = {key: agreement([t.double() for t in gradients(form, tensors)], wanted) for key, form in forms.items()}
        for direction in ("forward", "both"):
            runs = {key: task(form, tensors, direction) for key, form in forms.items()}
            label = "x".join(map(str, shape[:3])) + ("" if direction == "forward" else " +b")
            yield race("scan", label, runs, agree, 0.9999, "mambapy", rounds)


def task(form: Callable[..., Tensor], tensors: list[Tensor], direction: str) -> Callable[[], Any]:
    def forward() -> Tensor:
        with torch.no_grad():
            return form(*tensors)

    return forward if direction == "forward" else lambda: gradients(form, tensors)


def main() -> None:
    given = arguments(__doc__ or "").parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    show([line for group in lines(given.rounds) for line in group], given.json)


if __name__ == "__main__":
    main()
