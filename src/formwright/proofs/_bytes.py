"""A language model of bytes, trained here on Python's standard library: what several proofs cut and compare."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.models.build import build


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, PyTorch uses one thread: products this small are not made faster by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def spec(width: int, blocks: int, hidden: int | None = None, activation: str = "gelu") -> dict[str, Any]:
    """A pre-norm decoder; the head is tied to the table of 256 bytes."""
    attention = {"part": "attention", "heads": 4, "causal": True, "rotary": {}}
    perceptron = {"part": "mlp", "hidden": hidden or 4 * width, "activation": activation}
    return {
        "stem": {"part": "token-embedding", "vocab": 256, "width": width},
        "defaults": {"norm": "layernorm", "order": "pre"},
        "layers": [{"repeat": blocks, "layers": [attention, perceptron]}],
        "final_norm": "layernorm",
        "head": {"part": "lm", "tied": True},
    }


def text(limit: int = 2_000_000) -> tuple[Tensor, Tensor]:
    """(training bytes, held-out bytes): sources in order, the last tenth held out."""
    from formwright.tasks._stdlib import modules

    joined = "\n".join(source for _, source in modules()[::5]).encode()[:limit]
    data = torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def rows(data: Tensor, count: int, length: int) -> Tensor:
    """``count`` rows of ``length`` bytes, evenly spread over ``data``."""
    starts = torch.linspace(0, len(data) - length - 1, count).long().tolist()
    return torch.stack([data[start : start + length] for start in starts])


def train(
    model: Any, data: Tensor, steps: int, seed: int, *, batch: int = 16, length: int = 64, lr: float = 3e-3
) -> Any:
    """:func:`descend` on rows of ``data``; the same rows for every model of a seed."""
    generator = torch.Generator().manual_seed(seed)

    def nats(step: int) -> Tensor:
        starts = torch.randint(0, len(data) - length - 1, (batch,), generator=generator)
        drawn = torch.stack([data[start : start + length + 1] for start in starts.tolist()])
        return F.cross_entropy(model(drawn[:, :-1]).flatten(0, 1), drawn[:, 1:].flatten())

    return descend(model, nats, steps, lr)


def descend(model: Any, nats: Callable[[int], Tensor], steps: int, lr: float, warm: int = 20) -> Any:
    """AdamW on ``nats`` of each step, with ``warm`` steps of warm-up and linear decay. Returns the model in eval
    mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warm) * (1 - 0.9 * step / steps)
        optimizer.zero_grad()
        nats(step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def trained(width: int, blocks: int, steps: int, seed: int) -> tuple[Any, Tensor, Tensor]:
    """(model, training bytes, held-out bytes)."""
    data, held = text()
    return train(build(spec(width, blocks), seed=seed), data, steps, seed), data, held


def loss(model: Any, drawn: Tensor) -> float:
    """Mean nats a byte of rows (B, L), each byte after the first."""
    with torch.inference_mode():
        return float(F.cross_entropy(model(drawn[:, :-1]).flatten(0, 1), drawn[:, 1:].flatten()))
