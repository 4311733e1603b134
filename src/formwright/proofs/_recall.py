"""Multi-query associative recall: a text lists pairs of key and value, then asks for the values of its keys.

    k1 v1 k2 v2 ... kP vP  .  .  k2 ->v2  .  k1 ->v1  .  .  .

Arora et al., 2023 (2312.04927). What several proofs of recurrent mixers train on, in batches of tensors: every row has
keys, values and places of its own, and a loss and an accuracy only where a value is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.kit.errors import SpecError


@dataclass(frozen=True)
class Recall:
    """``pairs`` in texts of ``length`` tokens; keys are the lower half of ``vocab`` and values the upper.

    near: how much likelier early queries are; the share of gap g goes as (g + 1) ** (near - 1). noise: what fills the
    rest, random tokens or 0, which is neither key nor value.
    """

    length: int = 128
    pairs: int = 16
    vocab: int = 1024
    near: float = 0.01
    noise: bool = False

    def __post_init__(self) -> None:
        if self.length < 4 * self.pairs or self.vocab // 2 <= self.pairs:
            room = f"length={self.length} must be at least 4 x pairs, and half of vocab={self.vocab} more than pairs"
            raise SpecError(f"recall of pairs={self.pairs}: {room}")

    def batch(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens (rows, length), and the wanted value where one is asked for, -1 elsewhere."""
        half, after = self.vocab // 2, 2 * self.pairs
        keys = 1 + _distinct(torch.zeros(rows, half - 1), self.pairs, generator)
        values = half + _distinct(torch.zeros(rows, self.vocab - half), self.pairs, generator)
        tokens = torch.zeros(rows, self.length, dtype=torch.long)
        if self.noise:
            tokens = torch.randint(1, self.vocab, tokens.shape, generator=generator)
        tokens[:, 0:after:2], tokens[:, 1:after:2] = keys, values
        gaps = torch.arange(1, (self.length - after) // 2 + 1).log() * (self.near - 1)
        places = after + 2 * _distinct(gaps.expand(rows, -1), self.pairs, generator)
        tokens.scatter_(1, places, keys)
        return tokens, torch.full_like(tokens, -1).scatter_(1, places, values)


def _distinct(logits: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(rows, count) different columns of each row, by their probabilities: the Gumbel trick."""
    noise = torch.rand(logits.shape, generator=generator).clamp(1e-12, 1 - 1e-7)
    return (logits - (-noise.log()).log()).topk(count, dim=1).indices


def spec(mixers: list[dict[str, Any]], vocab: int, width: int = 64) -> dict[str, Any]:
    """A block for each of the mixers, with a gated perceptron, between the table of tokens and the tied head."""
    perceptron = {"part": "gated-mlp", "hidden": 2 * width}
    return {
        "stem": {"part": "token-embedding", "vocab": vocab, "width": width},
        "defaults": {"norm": {"part": "rmsnorm"}, "order": "pre"},
        "layers": [{"repeat": 1, "layers": [mixer, perceptron]} for mixer in mixers],
        "final_norm": {"part": "rmsnorm"},
        "head": {"part": "lm", "tied": True},
    }


def asked(model: Any, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, vocab) and targets (N,) of the places where a value is asked for; the head runs nowhere else."""
    x, ctx = model.run(*model.embed(tokens))
    places = targets >= 0
    return model.read(x[places][None], ctx)[0], targets[places]


def train(
    model: Any,
    task: Any,
    steps: int,
    seed: int,
    *,
    rows: int = 32,
    lr: float = 4e-3,
    enough: float = 0.995,
) -> Any:
    """AdamW with warm-up and cosine on fresh batches of ``task``; ends early once ``enough`` of a fresh one is right.

    ``task`` is anything with ``batch(rows, generator)``. Equal seeds draw equal batches for every model. Returns the
    model in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    warm = max(1, steps // 20)
    shape = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, 1.0, warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm), 0.05 * lr),
        ],
        [warm],
    )
    model.train()
    for step in range(steps):
        logits, wanted = asked(model, *task.batch(rows, generator))
        loss = F.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shape.step()
        if step % 50 == 49 and accuracy(model, task, seed + step, rows=64) >= enough:
            break
    return model.eval()


def accuracy(model: Any, task: Any, seed: int, rows: int = 256) -> float:
    """The share of values that come first among all tokens, on a batch that ``seed + 1000003`` draws."""
    tokens, targets = task.batch(rows, torch.Generator().manual_seed(seed + 1_000_003))
    with torch.inference_mode():
        logits, wanted = asked(model, tokens, targets)
    return float((logits.argmax(-1) == wanted).float().mean())
