"""Attention inside a window, forwards and with gradients, against PyTorch's fused kernel under the same mask.

    python -m benchmarks.window_attention
    python -m benchmarks.window_attention --lengths 2048 8192 --windows 64 1024 --json

Contenders: ``torch mask`` is the fused kernel given the window as a mask, ``torch causal`` the same kernel with full
causal attention (it answers another question, and stands there for its time), ``blocked`` this library's plain PyTorch
form, ``window`` its kernel. Outputs and gradients are compared with the mask in float64 on the first head before
anything is timed; agreement is the smallest cosine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import arguments, race, show
from formwright.ops.window_attention import (
    Spans,
    sliding,
    window_attention,
    window_attention_blocked,
    window_attention_reference,
)

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def forms(seen: Spans) -> dict[str, Form]:
    """Each contender, (1, L, H, D) three times -> (1, L, H, D)."""
    mask = torch.from_numpy(seen.mask())

    def fused(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2)

    return {
        "torch mask": lambda q, k, v: fused(q, k, v, attn_mask=mask),
        "torch causal": lambda q, k, v: fused(q, k, v, is_causal=True),
        "blocked": lambda q, k, v: window_attention_blocked(q, k, v, seen, q.shape[-1] ** -0.5, None)[0],
        "window": lambda q, k, v: window_attention(q, k, v, seen)[0],
    }


def results(form: Form, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """The output and the gradients of its sum weighed by ``weight``."""
    tracked = [t.detach().requires_grad_() for t in inputs]
    out = form(*tracked)
    return [out.detach(), *torch.autograd.grad(out, tracked, weight)]


def agreement(form: Form, seen: Spans, inputs: list[Tensor], weight: Tensor) -> float:
    """The smallest cosine of output and gradients with the definition, on the first head."""
    exact = [t[:, :, :1].double() for t in inputs]
    wanted = results(lambda q, k, v: window_attention_reference(q, k, v, seen)[0], exact, weight[:, :, :1].double())
    found = [t[:, :, :1].double() for t in results(form, inputs, weight)]
    return min(float(F.cosine_similarity(a.flatten(), b.flatten(), 0)) for a, b in zip(found, wanted))


def measure(length: int, window: int, heads: int, width: int, rounds: int) -> list[dict[str, Any]]:
    """Lines of one shape: forwards, then with gradients."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, length, heads, width, generator=generator) for _ in range(3)]
    weight = torch.randn(1, length, heads, width, generator=generator)
    seen = sliding(length, window - 1, 0)
    made = forms(seen)
    sound = {name: agreement(form, seen, inputs, weight) for name, form in made.items()}
    bars = {name: -1.0 if name == "torch causal" else 0.99999 for name in made}
    alone = {name: (lambda form=form: form(*inputs)) for name, form in made.items()}
    both = {name: (lambda form=form: results(form, inputs, weight)) for name, form in made.items()}
    shape = f"{length}/{window}"
    with torch.no_grad():
        lines = race("window attention", shape, alone, sound, bars, "torch mask", rounds)
    return lines + race("window attention", f"{shape} grad", both, sound, bars, "torch mask", rounds)


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
