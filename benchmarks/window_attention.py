"""Attention inside a window, forwards and with gradients, against PyTorch's fused causal attention.

    python -m benchmarks.window_attention
    python -m benchmarks.window_attention --lengths 2048 8192 --windows 64 1024 --json

Contenders: ``causal attention`` is the fused kernel without a window, the fastest that PyTorch has (it answers another
question, and stands there for its time), ``fused mask`` the same kernel given the window as a mask, up to 4,096 tokens,
``blocked`` this library's plain PyTorch form, ``window`` its kernel. Outputs and gradients are compared before anything
is timed, on the first head in float64: with the mask up to 4,096 tokens, beyond that with the blocked form, which makes
no matrix of all pairs. Agreement is the smallest cosine. Long rows get fewer rounds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.delta_rule import agree
from benchmarks.harness import arguments, race, show
from benchmarks.linear_attention import Form, first, gradients
from formwright.ops.window_attention import (
    Spans,
    sliding,
    window_attention,
    window_attention_blocked,
    window_attention_reference,
)

PEER = "causal attention"
#: Tokens up to which the kernel under a mask, and the definition, take part.
MASKED = 4096
#: Tokens that get all rounds, and the fewest rounds of more tokens.
BASE, FEWEST = 2048, 3


def forms(seen: Spans) -> dict[str, Form]:
    """Each contender, (1, L, H, D) three times -> (1, L, H, D)."""

    def fused(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2)

    made: dict[str, Form] = {
        PEER: lambda q, k, v: fused(q, k, v, is_causal=True),
        "blocked": lambda q, k, v: window_attention_blocked(q, k, v, seen, q.shape[-1] ** -0.5, None)[0],
        "window": lambda q, k, v: window_attention(q, k, v, seen)[0],
    }
    if seen.length <= MASKED:
        mask = torch.from_numpy(seen.mask())
        made["fused mask"] = lambda q, k, v: fused(q, k, v, attn_mask=mask)
    return made


def measure(length: int, window: int, heads: int, width: int, rounds: int) -> list[dict[str, Any]]:
    """Lines of one shape: forwards, then with gradients."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, length, heads, width, generator=generator) for _ in range(3)]
    weight = torch.randn(1, length, heads, width, generator=generator)
    seen = sliding(length, window - 1, 0)
    made = forms(seen)
    exact = made["blocked"] if length > MASKED else lambda q, k, v: window_attention_reference(q, k, v, seen)[0]
    wanted = gradients(exact, first(inputs), *first([weight]))
    sound = {name: agree(first(gradients(form, inputs, weight)), wanted) for name, form in made.items()}
    bars = {name: -1.0 if name == PEER else 0.99999 for name in made}
    rounds = max(min(rounds, FEWEST), rounds * BASE // length)
    alone = {name: (lambda form=form: form(*inputs)) for name, form in made.items()}
    both = {name: (lambda form=form: gradients(form, inputs, weight)) for name, form in made.items()}
    shape = f"{length}/{window}"
    with torch.no_grad():
        lines = race("window attention", shape, alone, sound, bars, PEER, rounds)
    return lines + race("window attention", f"{shape} grad", both, sound, bars, PEER, rounds)


def main() -> None:
    parser = arguments("attention inside a window against PyTorch's fused kernel")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--windows", type=int, nargs="+", default=[256])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    lines = [
        line
        for length in asked.lengths
        for window in asked.windows
        for line in measure(length, window, asked.heads, asked.width, asked.rounds)
    ]
    show(lines, asked.json)


if __name__ == "__main__":
    main()
