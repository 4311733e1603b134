"""Causal linear attention against PyTorch: forwards against fused causal attention, training against cumulative sums.

    python -m benchmarks.linear_attention [--lengths 512,1024,2048,4096,8192] [--threads N] [--json]

Batch 1, 4 heads of 64, float32, features 1 + ELU. The fused kernel computes softmax attention, another function of the
same shape; *cumulative* is linear attention as it is written down, a running sum of outer products. Outputs and
gradients are compared with the definition in float64, on the first head, before a time is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.delta_rule import HEADS, WIDTH, agree, attended
from benchmarks.harness import arguments, race, show
from formwright.ops.linear_attention import linear_attention

BAR = 0.99999
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192", help="tokens, each a round of its own")
    given = parser.parse_args()
    torch.set_num_threads(given.threads or torch.get_num_threads())
    lengths = [int(length) for length in given.lengths.split(",")]
    for measure in (forward, training):
        show([line for length in lengths for line in measure(length, given.rounds)], given.json)


def drawn(length: int) -> list[Tensor]:
    """Features of queries and keys, and values, as a layer gives them."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, length, HEADS, WIDTH, generator=generator) for _ in range(3))
    return [F.elu(q) + 1, F.elu(k) + 1, v]


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention(q, k, v, causal=True)[0]


def cumulative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """sum_(j <= i) (q_i . k_j) v_j over sum_(j <= i) q_i . k_j, by the running sums of k_j v_j^T and k_j."""
    sums = (k[..., :, None] * v[..., None, :]).cumsum(1)
    return (q[..., None, :] @ sums).squeeze(-2) / (q * k.cumsum(1)).sum(-1, keepdim=True)


def squares(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by the matrix of all pairs, which float64 affords for checking."""
    scores = torch.einsum("blhd,bshd->bhls", q, k).tril()
    return torch.einsum("bhls,bshd->blhd", scores / scores.sum(-1, keepdim=True), v)


def first(tensors: list[Tensor]) -> list[Tensor]:
    """Their first head, in float64."""
    return [t[:, :, :1].double() for t in tensors]


def forward(length: int, rounds: int) -> list[dict[str, Any]]:
    inputs = drawn(length)
    heads = [t.transpose(1, 2) for t in inputs]
    fused = lambda: F.scaled_dot_product_attention(*heads, is_causal=True)  # noqa: E731
    with torch.no_grad():
        agreement = {
            "causal attention": agree([fused().transpose(1, 2)], [attended(*inputs)]),
            "formwright": agree(first([ours(*inputs)]), [squares(*first(inputs))]),
        }
        runs: dict[str, Callable[[], Any]] = {"causal attention": fused, "formwright": lambda: ours(*inputs)}
        return race("linear-attention", f"infer {length}", runs, agreement, BAR, "causal attention", rounds)


def training(length: int, rounds: int) -> list[dict[str, Any]]:
    inputs = drawn(length)
    weight = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(1))
    wanted = gradients(squares, first(inputs), *first([weight]))
    forms: dict[str, Form] = {"cumulative": cumulative, "formwright": ours}
    agreement = {name: agree(first(gradients(form, inputs, weight)), wanted) for name, form in forms.items()}
    runs = {name: lambda form=form: gradients(form, inputs, weight) for name, form in forms.items()}
    return race("linear-attention", f"train {length}", runs, agreement, BAR, "cumulative", rounds)


def gradients(form: Form, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """The output and the gradients of its sum weighed by ``weight``."""
    held = [t.detach().requires_grad_() for t in inputs]
    out = form(*held)
    return [out.detach(), *torch.autograd.grad(out, held, weight)]


if __name__ == "__main__":
    main()
