"""Multi-query associative recall, and the short training that several proofs of recurrent mixers share.

    k1 v1 k2 v2 ... kP vP  .  .  k2 ->v2  .  k1 ->v1  .  .  .

A text lists pairs of key and value, then asks for the values of its keys: Arora et al., 2023 (2312.04927). A task is
anything with ``batch(rows, generator) -> tokens, targets``, both (rows, length), the targets -1 wherever nothing is
asked; loss and accuracy are of the places asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.kit.errors import SpecError

#: Steps over which a rate of learning rises from zero.
WARM = 50


@dataclass(frozen=True)
class Recall:
    """``pairs`` in texts of ``length`` tokens; keys are the lower half of ``vocab`` and values the upper.

    near: how much likelier early queries are; the share of gap g goes as (g + 1) ** (near - 1). What fills the rest is
    0, which is neither key nor value.
    """

    length: int = 128
    pairs: int = 16
    vocab: int = 1024
    near: float = 0.01

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
        tokens[:, 0:after:2], tokens[:, 1:after:2] = keys, values
        gaps = torch.arange(1, (self.length - after) // 2 + 1).log() * (self.near - 1)
        places = after + 2 * _distinct(gaps.expand(rows, -1), self.pairs, generator)
        tokens.scatter_(1, places, keys)
        return tokens, torch.full_like(tokens, -1).scatter_(1, places, values)

    def part(self, share: int) -> Recall:
        """The task with a ``share``-th of the pairs in as much shorter texts."""
        return replace(self, length=self.length // share, pairs=self.pairs // share)


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


class Lesson(NamedTuple):
    """``steps`` batches of ``rows`` texts of a task."""

    task: Any
    steps: int
    rows: int = 32


def train(model: Any, lessons: Sequence[Lesson], seed: int, *, lr: float, last: float = 0.05, eps: float = 1e-8) -> Any:
    """AdamW without decay of weights, its rate warmed up and then on a cosine down to ``last`` of ``lr``, over all
    lessons in turn.

    Equal seeds draw equal batches for every model. Returns the model in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), eps=eps, weight_decay=0.0)
    batches = [lesson for lesson in lessons for _ in range(lesson.steps)]
    model.train()
    for step, (task, _, rows) in enumerate(batches):
        cosine = (1 + math.cos(math.pi * step / len(batches))) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARM) * (last + (1 - last) * cosine)
        logits, wanted = asked(model, *task.batch(rows, generator))
        loss = F.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def asked(model: Any, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, vocab) and targets (N,) of the places where a value is asked for; the head runs nowhere else."""
    x, ctx = model.run(*model.embed(tokens))
    places = targets >= 0
    return model.read(x[places][None], ctx)[0], targets[places]


def accuracy(model: Any, task: Any, seed: int, rows: int = 256) -> float:
    """The share of values that come first among all tokens, on a batch that ``seed + 1000003`` draws."""
    tokens, targets = task.batch(rows, torch.Generator().manual_seed(seed + 1_000_003))
    with torch.inference_mode():
        logits, wanted = asked(model, tokens, targets)
    return float((logits.argmax(-1) == wanted).float().mean())
