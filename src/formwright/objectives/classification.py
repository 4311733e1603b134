"""Classification: cross entropy of the right label, of a row, of a pair of rows, or of every token.

    total = - sum over labelled items of log p(label)

Cost: one pass; the head is small.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from formwright.kit.errors import DataError
from formwright.models.batch import Batch, Loss
from formwright.objectives import base
from formwright.objectives.base import Gen, Models, Objective
from formwright.registry import register

KINDS = ("sequence", "pair", "tokens")


@register("objective", "classification", summary="the right label")
class Classification(Objective):
    """Reads ``targets["label"]`` (B,), or (B, L) (packed (1, T)) for a token classifier; -100 is ignored.

    Args: head: name of the head where there are several. smoothing: label smoothing, 0 to 1. weights: one weight a
        class, for classes of unequal size; the count is then the sum of the weights.
    """

    def __init__(self, head: str | None = None, smoothing: float = 0.0, weights: list[float] | None = None) -> None:
        self.head = head
        self.smoothing = base.check_unit("smoothing", smoothing, 0.0, 1.0)
        self.weights = weights

    def bind(self, models: Models) -> None:
        name, head = base.head_of(models["model"], KINDS, "classification", self.head)
        classes = head.out.out_features
        if self.weights is not None and len(self.weights) != classes:
            raise DataError(f"classification: {len(self.weights)} weights for the {classes} classes of head {name}")

    def loss(self, models: Models, batch: Batch, gen: Gen) -> Mapping[str, Loss]:
        model = models["model"]
        labels = base.target(batch, "label", "classification")
        name, _ = base.head_of(model, KINDS, "classification", self.head)
        notes = base.listening()
        logits = model(batch, head=name, notes=notes, **gen.context())
        if logits.shape[:-1] != labels.shape:
            raise DataError(
                f"classification: labels are {tuple(labels.shape)}, the model answers {tuple(logits.shape[:-1])}"
            )
        logits, labels = logits.flatten(0, -2).float(), labels.flatten()
        chosen = labels != -100
        bad = labels[chosen & ((labels < 0) | (labels >= logits.shape[-1]))]
        if len(bad):
            raise DataError(f"label {int(bad[0])} is none of the model's {logits.shape[-1]} classes")
        weights = None if self.weights is None else torch.tensor(self.weights, device=logits.device)
        total = F.cross_entropy(
            logits, labels, weight=weights, ignore_index=-100, reduction="sum", label_smoothing=self.smoothing
        )
        count = chosen.sum() if weights is None else weights[labels[chosen]].sum()
        right = ((logits.argmax(-1) == labels) & chosen).sum().float() / chosen.sum().clamp(min=1) * count
        whole, parts = base.with_auxiliary(total, count, notes)
        return {"model": Loss(whole, count, {"accuracy": right.detach(), **parts})}
